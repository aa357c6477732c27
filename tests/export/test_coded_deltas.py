"""Deltas at few bits: what is stored, what is decoded, and what the layer makes of it."""

from typing import Any

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.export.quantized.deltas import coded
from moefuse.mathematics.lowrank import balanced_factors
from moefuse.modeling.modeling_moefuse import FACTORS, FusedExperts, LowRankDelta, PlainGating
from moefuse.modeling.naive import naive_forward

T, E, K, G, D, F = 9, 8, 3, 3, 24, 20


def experts_of(rank: int, delta: str = "low_rank") -> Any:
    """Make a layer of random weights."""
    module = FusedExperts(
        D, F, E, G, rank, PlainGating(torch.nn.functional.silu), delta=delta, scale=True
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return module.requires_grad_(False)


def call() -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs; two experts are chosen by none."""
    generator = torch.Generator().manual_seed(1)
    index_TK = torch.stack([torch.randperm(E - 2, generator=generator)[:K] for _ in range(T)])
    return torch.randn(T, D, generator=generator), index_TK, torch.rand(T, K, generator=generator)


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_balanced_factors_have_the_same_product_and_equal_lengths(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    b_EOR = torch.randn(E, D, rank, generator=generator)
    a_ERI = torch.randn(E, rank, F, generator=generator) * 100

    other_b, other_a = balanced_factors(b_EOR, a_ERI)

    assert (other_b.shape, other_a.shape) == (b_EOR.shape, a_ERI.shape)
    assert_close(other_b @ other_a, b_EOR @ a_ERI, 1e-3)
    assert_close(other_b.norm(dim=1), other_a.norm(dim=2))


@pytest.mark.parametrize(("bits", "most"), [("8", 0.01), ("4", 0.1)])
def test_products_of_coded_factors_are_near(bits: str, most: float) -> None:
    delta = experts_of(4).delta
    found = coded(delta.state_dict(), bits)

    for part in ("gate_up", "down"):
        wanted, got = (
            getattr(one, f"{part}_b") @ getattr(one, f"{part}_a") for one in (delta, found)
        )
        assert float((got - wanted).norm() / wanted.norm()) < most


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_a_layer_of_coded_deltas_is_that_of_the_factors_they_stand_for(
    bits: str, rank: int
) -> None:
    plain = experts_of(rank)
    module = experts_of(rank, f"low_rank_{bits}_bits")
    module.load_state_dict(
        {**plain.state_dict(), **_named(coded(plain.delta.state_dict(), bits))}, strict=False
    )
    twin = experts_of(rank)
    twin.load_state_dict(plain.state_dict())
    for name in FACTORS:
        getattr(twin.delta, name).copy_(getattr(module.delta, name))

    y_TD = module(*call())

    assert_close(y_TD, naive_forward(twin, *call()))
    assert_close(y_TD, naive_forward(module, *call()))


def _named(delta: LowRankDelta) -> dict[str, Tensor]:
    return {f"delta.{name}": tensor for name, tensor in delta.state_dict().items()}


def test_no_tokens_and_a_fresh_layer() -> None:
    module = experts_of(4, "low_rank_4_bits")
    x_TD, index_TK, w_TK = call()

    assert module(x_TD[:0], index_TK[:0], w_TK[:0]).shape == (0, D)
    module.delta.reset_parameters()
    assert not module.delta.gate_up_b.any() and not module.delta.down_b.any()
