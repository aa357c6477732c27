"""Neuron alignment: what changes nothing, and what is recovered."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.fusion.factor import align_group, weighted_mean
from moefuse.mathematics.alignment import ExpertWeights, align, match_neurons

D, F = 9, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_expert(seed: int, hidden: int = D, width: int = F) -> ExpertWeights:
    gate, up, down = torch.randn(3, width, hidden, generator=generator(seed))
    return ExpertWeights(gate, up, down.T.contiguous())


def run(expert: ExpertWeights, x_TD: Tensor) -> Tensor:
    z_TF = torch.nn.functional.silu(x_TD @ expert.gate_FD.T) * (x_TD @ expert.up_FD.T)
    return z_TF @ expert.down_DF.T


def inputs(hidden: int = D) -> Tensor:
    return torch.randn(20, hidden, generator=generator(99))


def tensors(expert: ExpertWeights) -> tuple[Tensor, ...]:
    return expert.gate_FD, expert.up_FD, expert.down_DF


def assert_same_weights(actual: ExpertWeights, expected: ExpertWeights) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        assert_close(one, other)


def squared_distance(a: ExpertWeights, b: ExpertWeights) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(tensors(a), tensors(b), strict=True))


def disguised(expert: ExpertWeights, seed: int) -> tuple[ExpertWeights, Tensor, Tensor]:
    """Return the same function, its neurons permuted, flipped and rescaled, and how."""
    width = len(expert.gate_FD)
    order_F = torch.randperm(width, generator=generator(seed))
    sign_F = torch.randint(2, (width,), generator=generator(seed + 1)) * 2.0 - 1
    c_F = torch.rand(width, generator=generator(seed + 2)) * 4 + 0.25
    turned = expert.permuted(order_F, sign_F)
    rescaled = ExpertWeights(turned.gate_FD, turned.up_FD * c_F[:, None], turned.down_DF / c_F)
    return rescaled, order_F, sign_F


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_disguise_changes_no_output(seed: int, width: int, hidden: int) -> None:
    expert = random_expert(seed, hidden, width)
    other, _, _ = disguised(expert, seed)
    x_TD = inputs(hidden)

    assert_close(run(other, x_TD), run(expert, x_TD))
    assert_close(run(other.balanced(), x_TD), run(expert, x_TD))


def test_balanced_gives_up_and_down_equal_norms() -> None:
    expert, _, _ = disguised(random_expert(0), 1)
    balanced = expert.balanced()

    assert not torch.allclose(expert.up_FD.norm(dim=1), expert.down_DF.norm(dim=0))
    assert_close(balanced.up_FD.norm(dim=1), balanced.down_DF.norm(dim=0))
    assert torch.equal(balanced.gate_FD, expert.gate_FD)


def test_dead_neurons_stay_finite_and_dead() -> None:
    expert = random_expert(0)
    expert.up_FD[1] = 0
    expert.down_DF[:, 2] = 0
    expert.up_FD[3] = 0
    expert.down_DF[:, 3] = 0

    balanced = expert.balanced()

    assert all(tensor.isfinite().all() for tensor in tensors(balanced))
    assert_close(run(balanced, inputs()), run(expert, inputs()))


def test_gate_comes_first_when_stacked() -> None:
    expert = random_expert(0)
    gate_FD, up_FD = expert.gate_up().chunk(2)

    assert torch.equal(gate_FD, expert.gate_FD)
    assert torch.equal(up_FD, expert.up_FD)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_planted_disguise_is_recovered_exactly(seed: int) -> None:
    expert = random_expert(seed, 16, 12).balanced()
    other, planted_order_F, planted_sign_F = disguised(expert, seed)

    order_F, sign_F = match_neurons(expert, other.balanced())

    assert torch.equal(planted_order_F[order_F], torch.arange(12))
    assert torch.equal(planted_sign_F[order_F] * sign_F, torch.ones(12))
    assert_same_weights(align(expert, other.balanced()), expert)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_no_permutation_and_signs_come_closer(seed: int) -> None:
    width = 4
    reference, member = random_expert(seed, 3, width), random_expert(seed + 1, 3, width)

    found = squared_distance(align(reference, member), reference)

    best = min(
        squared_distance(member.permuted(torch.tensor(order), torch.tensor(sign)), reference)
        for order in permutations(range(width))
        for sign in product([1.0, -1.0], repeat=width)
    )
    assert found == pytest.approx(best, rel=1e-4)


def test_aligning_with_itself_changes_nothing() -> None:
    expert = random_expert(0)

    assert_same_weights(align(expert, expert), expert)


def test_a_group_of_one_function_in_disguise_becomes_one_set_of_weights() -> None:
    expert = random_expert(3, 16, 12)
    members = [disguised(expert, seed)[0] for seed in range(5)]

    aligned = list(align_group(members, torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1])))

    for member in aligned[1:]:
        assert_same_weights(member, aligned[0])
    assert_close(run(aligned[0], inputs(16)), run(expert, inputs(16)))


def test_aligning_a_group_changes_no_members_output() -> None:
    members = [random_expert(seed, 16, 12) for seed in range(4)]

    aligned = list(align_group(members, torch.full((4,), 0.25)))

    for before, after in zip(members, aligned, strict=True):
        assert_close(run(after, inputs(16)), run(before, inputs(16)))


def test_aligning_a_group_brings_its_members_closer() -> None:
    members = [disguised(random_expert(3, 16, 12), 10 * seed)[0] for seed in range(4)]
    weight_M = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def spread(group: list[ExpertWeights]) -> float:
        return sum(squared_distance(member, weighted_mean(group, weight_M)) for member in group)

    assert spread(align_group(members, weight_M)) < 1e-6 * spread(members)


def test_the_weighted_mean_by_its_formula() -> None:
    members = [random_expert(seed) for seed in range(3)]

    mean = weighted_mean(members, torch.tensor([0.5, 0.3, 0.2]))

    expected = 0.5 * members[0].up_FD + 0.3 * members[1].up_FD + 0.2 * members[2].up_FD
    assert_close(mean.up_FD, expected)
