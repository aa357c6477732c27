"""How alike two experts are, against each definition."""

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.similarity import (
    coactivation_affinity,
    mean_output_affinity,
    output_affinity,
    weight_affinity,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_affinity(affinity_EE: Tensor, experts: int) -> None:
    assert affinity_EE.shape == (experts, experts)
    assert affinity_EE.dtype == torch.float64
    assert_close(affinity_EE, affinity_EE.T, 1e-12)


def test_coactivation_is_the_share_of_common_tokens() -> None:
    counts = torch.tensor([[8.0, 4.0, 0.0], [4.0, 2.0, 1.0], [0.0, 1.0, 0.0]])

    affinity_EE = coactivation_affinity(counts)

    assert affinity_EE[0, 1] == pytest.approx(4 / (8 * 2) ** 0.5)
    assert affinity_EE[0, 0] == 1
    assert affinity_EE[0, 2] == 0


def test_experts_never_chosen_are_like_none() -> None:
    affinity_EE = coactivation_affinity(torch.tensor([[5.0, 0.0], [0.0, 0.0]]))

    assert affinity_EE.tolist() == [[1, 0], [0, 0]]


def test_output_affinity_is_the_cosine() -> None:
    outputs_ED = normal(4, 6)

    affinity_EE = output_affinity(outputs_ED)

    assert_affinity(affinity_EE, 4)
    expected = torch.nn.functional.cosine_similarity(outputs_ED[1], outputs_ED[3], dim=0)
    assert_close(affinity_EE[1, 3], expected, 1e-12)
    assert_close(output_affinity(outputs_ED * torch.tensor([[1.0], [5], [0.1], [9]])), affinity_EE)


def test_outputs_of_many_tokens_are_compared_together() -> None:
    outputs_ESD = normal(3, 5, 4)

    assert_close(output_affinity(outputs_ESD), output_affinity(outputs_ESD.reshape(3, 20)), 1e-12)


def test_an_expert_that_returns_nothing_is_like_none() -> None:
    outputs_ED = normal(3, 4)
    outputs_ED[1] = 0

    affinity_EE = output_affinity(outputs_ED)

    assert not affinity_EE[1].any()
    assert affinity_EE.isfinite().all()


def test_mean_output_affinity_is_minus_the_distance() -> None:
    outputs_ED = normal(40, 6)

    affinity_EE = mean_output_affinity(outputs_ED)

    assert affinity_EE.shape == (40, 40)
    expected_EE = -(outputs_ED[:, None] - outputs_ED[None]).norm(dim=2)
    assert_close(affinity_EE, expected_EE, 1e-6)


def expert(seed: int) -> ExpertWeights:
    gate, up, down = normal(3, 7, 9, seed=seed)
    return ExpertWeights(gate, up, down.T).balanced()


def test_weight_affinity_sees_through_permuted_flipped_and_rescaled_neurons() -> None:
    order_F = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    sign_F = torch.tensor([1.0, -1, -1, 1, 1, -1, 1], dtype=torch.float64)
    turned = expert(0).permuted(order_F, sign_F)
    rescaled = ExpertWeights(turned.gate_FD, turned.up_FD * 3, turned.down_DF / 3).balanced()

    affinity_EE = weight_affinity([expert(0), rescaled, expert(1)])

    assert_affinity(affinity_EE, 3)
    assert affinity_EE.diagonal().tolist() == [1, 1, 1]
    assert affinity_EE[0, 1] == pytest.approx(1.0)
    assert affinity_EE[0, 2] < 0.9
    assert affinity_EE[1, 2] == pytest.approx(float(affinity_EE[0, 2]))
