"""Bases and deltas in closed form: planted structure is found, alternation never does harm."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.fusion.factor import MASS_FLOOR, factor_layer, factor_matrices
from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.lowrank import damped, expected_error, low_rank
from moefuse.modeling.modeling_moefuse import PlainGating

D, F, E = 14, 10, 6
GROUPS = torch.tensor([0, 1, 1, 0, 1, 2])
MASS = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5, 1.0], dtype=torch.float64)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(gate_up_EFD: Tensor, down_EDF: Tensor) -> Experts:
    return Experts(gate_up_EFD, down_EDF, PlainGating(torch.nn.functional.silu))


def factor(
    gate_up_EFD: Tensor, down_EDF: Tensor, rank: int, *, groups: Tensor = GROUPS, **options: Any
) -> dict[str, Tensor]:
    return factor_layer(plain(gate_up_EFD, down_EDF), groups, MASS, rank, FactorConfig(**options))


def effective(state: dict[str, Tensor], part: str) -> Tensor:
    """Return every expert's base plus delta."""
    bases = [
        state[f"bases.{group}.{part}_proj.weight"] for group in state["group_of_expert"].tolist()
    ]
    delta = state[f"delta.{part}_b"] @ state[f"delta.{part}_a"] if f"delta.{part}_b" in state else 0
    return torch.stack(bases) + delta


def silu_outputs(gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """Return every expert's output on the same inputs, (E, T, D)."""
    gate, up = (normal(30, D, seed=77) @ gate_up_EFD.mT).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down_EDF.mT


def weighted(matrix_MOI: Tensor, weight_M: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> float:
    base_OI, b_MOR, a_MRI = parts
    error_M = (matrix_MOI - base_OI - b_MOR @ a_MRI).square().sum((1, 2))
    return float((weight_M * error_M).sum())


# Planted structure.


def centred(deltas_EOI: Tensor) -> Tensor:
    """Shift the deltas of every group so that their mean, weighted by mass, is zero."""
    shifted = deltas_EOI.clone()
    for group in GROUPS.unique():
        members = group == GROUPS
        share = (MASS[members] / MASS[members].sum()).to(deltas_EOI.dtype)
        shifted[members] -= torch.tensordot(share, deltas_EOI[members], dims=1)
    return shifted


def planted(outputs: int, inputs: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return bases (G, O, I) and matrices (E, O, I): base plus a delta of ``rank``.

    The deltas of a group share their column space, so that their differences keep the rank.
    """
    base_GOI = normal(3, outputs, inputs, seed=seed)
    a_GRI = normal(3, rank, inputs, seed=seed + 1)
    delta_EOI = normal(E, outputs, rank, seed=seed + 2) @ a_GRI[GROUPS]
    return base_GOI, base_GOI[GROUPS] + 0.3 * centred(delta_EOI)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_planted_difference_is_recovered_at_its_rank(rank: int) -> None:
    base_gate_up, gate_up_EFD = planted(2 * F, D, rank, 0)
    base_down, down_EDF = planted(D, F, rank, 10)

    state = factor(gate_up_EFD, down_EDF, rank, align=False)

    for group in range(3):
        assert_close(state[f"bases.{group}.gate_up_proj.weight"], base_gate_up[group])
        assert_close(state[f"bases.{group}.down_proj.weight"], base_down[group])
    assert_close(effective(state, "gate_up"), gate_up_EFD)
    assert_close(effective(state, "down"), down_EDF)


@pytest.mark.parametrize("rank", [1, 2])
def test_below_the_planted_rank_something_is_lost(rank: int) -> None:
    _, gate_up_EFD = planted(2 * F, D, rank + 1, 0)
    _, down_EDF = planted(D, F, rank + 1, 10)

    state = factor(gate_up_EFD, down_EDF, rank, align=False)

    with pytest.raises(AssertionError, match="off by"):
        assert_close(effective(state, "gate_up"), gate_up_EFD)


def test_any_differences_of_rank_r_fit_in_the_sum_of_their_ranks() -> None:
    """Differences from a mean of M members have at most M times their rank."""
    deltas = normal(E, 2 * F, 1, seed=1) @ normal(E, 1, D, seed=2)
    gate_up_EFD = normal(3, 2 * F, D, seed=0)[GROUPS] + deltas
    down_EDF = normal(3, D, F, seed=3)[GROUPS]

    state = factor(gate_up_EFD, down_EDF, 3, align=False)

    assert_close(effective(state, "gate_up"), gate_up_EFD)
    assert_close(effective(state, "down"), down_EDF)


def test_a_planted_difference_is_recovered_behind_permuted_and_flipped_neurons() -> None:
    """The plant keeps the norms of up rows and down columns, which balancing equalises."""
    base_GOI = normal(3, 2 * F, D, seed=0)
    base_down = normal(3, D, F, seed=3)
    _, gate_EFD = planted(F, D, 2, 5)
    gate_up_EFD = base_GOI[GROUPS].clone()
    gate_up_EFD[:, :F] += 0.1 * (gate_EFD - gate_EFD[torch.tensor([0, 1, 1, 0, 1, 5])])
    hidden = []
    for number in range(E):
        generator = torch.Generator().manual_seed(number)
        gate_FD, up_FD = gate_up_EFD[number].chunk(2)
        expert = ExpertWeights(gate_FD, up_FD, base_down[GROUPS[number]])
        order_F = torch.randperm(F, generator=generator)
        sign_F = torch.randint(2, (F,), generator=generator) * 2.0 - 1
        hidden.append(expert.permuted(order_F, sign_F))
    gate_up = torch.stack([expert.gate_up() for expert in hidden])
    down = torch.stack([expert.down_DF for expert in hidden])

    state = factor(gate_up, down, 2)

    outputs = silu_outputs(effective(state, "gate_up"), effective(state, "down"))
    assert_close(outputs, silu_outputs(gate_up, down))
    unaligned = factor(gate_up, down, 2, align=False)
    lost = silu_outputs(effective(unaligned, "gate_up"), effective(unaligned, "down"))
    assert float((lost - outputs).norm()) > 0.1 * float(outputs.norm())


# The two half steps.


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_alternation_never_raises_the_weighted_error(
    seed: int, members: int, outputs: int, inputs: int, rank: int
) -> None:
    matrix_MOI = normal(members, outputs, inputs, seed=seed, dtype=torch.float64)
    weight_M = torch.rand(members, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    weight_M /= weight_M.sum()

    errors = [
        weighted(
            matrix_MOI,
            weight_M,
            factor_matrices(matrix_MOI, weight_M, rank, FactorConfig(alternations=rounds)),
        )
        for rounds in range(5)
    ]

    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-9) + 1e-18


def test_alternation_helps_where_members_weigh_differently() -> None:
    matrix_MOI = normal(4, 12, 12, seed=0, dtype=torch.float64)
    weight_M = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)

    def error(rounds: int) -> float:
        options = FactorConfig(alternations=rounds)
        return weighted(matrix_MOI, weight_M, factor_matrices(matrix_MOI, weight_M, 2, options))

    assert error(8) < 0.99 * error(0)


def test_without_a_delta_the_base_is_the_weighted_mean() -> None:
    matrix_MOI = normal(3, 5, 4, seed=0)
    weight_M = torch.tensor([0.5, 0.3, 0.2])

    base_OI, b_MOR, a_MRI = factor_matrices(matrix_MOI, weight_M, 0, FactorConfig())

    assert_close(base_OI, (weight_M[:, None, None] * matrix_MOI).sum(0))
    assert b_MOR.shape == (3, 5, 0)
    assert a_MRI.shape == (3, 0, 4)


@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.0, 0.9))
@settings(max_examples=60, deadline=None)
def test_at_the_plain_base_whitened_deltas_have_the_lesser_expected_error(
    seed: int, rank: int, damping: float
) -> None:
    matrix_MOI = normal(3, 6, 7, seed=seed, dtype=torch.float64)
    x_TI = normal(40, 7, seed=seed + 1, dtype=torch.float64) * torch.logspace(0, 1.5, 7).double()
    moment_II = x_TI.T @ x_TI / 40
    weight_M = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    options = FactorConfig(alternations=0, damping=damping)

    base_OI, b_MOR, a_MRI = factor_matrices(matrix_MOI, weight_M, rank, options, moment_II)

    target_II = damped(moment_II, damping)
    difference_MOI = matrix_MOI - base_OI
    plain_b, plain_a = low_rank(difference_MOI, rank)
    assert_close(base_OI, torch.tensordot(weight_M, matrix_MOI, dims=1), 1e-6)
    whitened = expected_error(difference_MOI - b_MOR @ a_MRI, target_II)
    plain = expected_error(difference_MOI - plain_b @ plain_a, target_II)
    assert bool((whitened <= plain * (1 + 1e-9)).all())


@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_whitening_loses_nothing_in_directions_that_inputs_never_take(tokens: int) -> None:
    """Fewer tokens than the width leave the moment singular; full rank must stay exact."""
    matrix_MOI, weight_M = normal(3, 24, 12, seed=0), torch.tensor([0.5, 0.3, 0.2])
    x_TI = normal(tokens, 12, seed=1) * torch.logspace(0, 2, 12)

    base_OI, b_MOR, a_MRI = factor_matrices(
        matrix_MOI, weight_M, 12, FactorConfig(damping=0.0), x_TI.T @ x_TI / tokens
    )

    assert base_OI.dtype == b_MOR.dtype == a_MRI.dtype == torch.float32
    assert_close(base_OI + b_MOR @ a_MRI, matrix_MOI)


def test_full_damping_ignores_the_moment() -> None:
    matrix_MOI, weight_M = normal(3, 6, 7, seed=0), torch.full((3,), 1 / 3)
    moment_II = torch.diag(torch.logspace(0, 3, 7))

    with_moment = factor_matrices(matrix_MOI, weight_M, 2, FactorConfig(damping=1.0), moment_II)
    without = factor_matrices(matrix_MOI, weight_M, 2, FactorConfig(damping=1.0))

    assert all(torch.equal(a, b) for a, b in zip(with_moment, without, strict=True))


# Weights of the members.


def test_members_weigh_by_their_routed_mass() -> None:
    gate_up_EFD, down_EDF = normal(E, 2 * F, D, seed=0), normal(E, D, F, seed=1)

    state = factor(gate_up_EFD, down_EDF, 0, align=False)

    assert_close(state["bases.0.down_proj.weight"], (down_EDF[0] + 3 * down_EDF[3]) / 4)
    assert torch.equal(state["bases.2.gate_up_proj.weight"], gate_up_EFD[5])


def test_an_expert_never_routed_counts_a_little() -> None:
    gate_up_EFD, down_EDF = normal(2, 2 * F, D, seed=0), normal(2, D, F, seed=1)
    groups, mass_E = torch.tensor([0, 0]), torch.tensor([1.0, 0.0], dtype=torch.float64)

    layer = plain(gate_up_EFD, down_EDF)
    state = factor_layer(layer, groups, mass_E, 0, FactorConfig(align=False))

    little = MASS_FLOOR * 0.5 / (1 + MASS_FLOOR * 0.5)
    expected = (1 - little) * down_EDF[0] + little * down_EDF[1]
    assert_close(state["bases.0.down_proj.weight"], expected)
    assert not torch.equal(state["bases.0.down_proj.weight"], down_EDF[0])


def test_a_layer_never_routed_has_plain_means() -> None:
    gate_up_EFD, down_EDF = normal(2, 2 * F, D, seed=0), normal(2, D, F, seed=1)

    layer = plain(gate_up_EFD, down_EDF)
    state = factor_layer(layer, torch.tensor([0, 0]), torch.zeros(2), 0, FactorConfig(align=False))

    assert_close(state["bases.0.down_proj.weight"], down_EDF.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whatever_the_teachers_dtype_the_state_is_fp32(dtype: torch.dtype) -> None:
    gate_up_EFD, down_EDF = normal(E, 2 * F, D, seed=0), normal(E, D, F, seed=1)

    state = factor(gate_up_EFD.to(dtype), down_EDF.to(dtype), 2, scale=True, bias=True)

    floats = {name: tensor for name, tensor in state.items() if name != "group_of_expert"}
    assert {tensor.dtype for tensor in floats.values()} == {torch.float32}
    assert state["group_of_expert"].dtype == torch.int64
    assert bool((state["scale"] == 1).all()) and not state["bias"].any()


def test_factoring_twice_gives_the_same_bits() -> None:
    gate_up_EFD, down_EDF = normal(E, 2 * F, D, seed=0), normal(E, D, F, seed=1)

    first, second = (factor(gate_up_EFD, down_EDF, 2) for _ in range(2))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_routed_mass_every_member_weighs_alike() -> None:
    gate_up_EFD, down_EDF = normal(E, 2 * F, D, seed=1), normal(E, D, F, seed=2)
    alone = {"align": False, "routed_mass": False}

    state = factor(gate_up_EFD, down_EDF, 0, **alone)

    for group in range(3):
        members = [expert for expert, own in enumerate(GROUPS.tolist()) if own == group]
        base = state[f"bases.{group}.gate_up_proj.weight"]
        assert_close(base, gate_up_EFD[members].mean(0))
        assert_close(state[f"bases.{group}.down_proj.weight"], down_EDF[members].mean(0))
    weighed = factor(gate_up_EFD, down_EDF, 0, align=False)["bases.1.gate_up_proj.weight"]
    assert not torch.allclose(weighed, state["bases.1.gate_up_proj.weight"])
