"""Rounding with error feedback: the optimal change of what is left, and what follows from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.error_feedback import (
    Round,
    feedback_factor,
    round_with_feedback,
)
from moefuse.mathematics.lowrank import expected_error

STEP = 0.5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(experts: int, size: int, *, seed: int, samples: int = 60) -> Tensor:
    x_EMI = normal(experts, samples, size, seed=seed) @ normal(experts, size, size, seed=seed + 1)
    return x_EMI.mT @ x_EMI / samples


def begin(_: Tensor) -> Round:
    """Round to multiples of STEP between -8 and 7 of them."""

    def round_column(weight_EO: Tensor) -> tuple[Tensor, Tensor]:
        whole_EO = (weight_EO / STEP).round().clamp(-8, 7)
        return (whole_EO + 8).byte(), whole_EO * STEP

    return round_column


def values(codes: Tensor) -> Tensor:
    return (codes.double() - 8) * STEP


def rounded_one_by_one(weight_OI: Tensor, moment_II: Tensor) -> Tensor:
    """Round column by column; after each, fit the others anew by least squares. Codes (O, I)."""
    left_OI, columns = weight_OI.clone(), []
    for column in range(weight_OI.shape[1]):
        codes_O, value_O = begin(left_OI)(left_OI[:, column])
        columns.append(codes_O)
        error_O = left_OI[:, column] - value_O
        rest = slice(column + 1, None)
        fit_I = torch.linalg.solve(moment_II[rest, rest], moment_II[rest, column])
        left_OI[:, rest] += error_O[:, None] * fit_I
    return torch.stack(columns, 1)


@given(st.integers(0, 10_000), st.integers(1, 14), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_it_is_least_squares_column_by_column(seed: int, inputs: int, block: int) -> None:
    weight_EOI = normal(2, 5, inputs, seed=seed)
    moment_EII = moments(2, inputs, seed=seed + 2)
    damped_EII = moment_EII + 0.01 * moment_EII.diagonal(dim1=1, dim2=2).mean(1)[
        :, None, None
    ] * torch.eye(inputs)

    codes_EOI = round_with_feedback(weight_EOI, feedback_factor(moment_EII), block, begin)

    for expert in range(2):
        expected = rounded_one_by_one(weight_EOI[expert], damped_EII[expert])
        assert torch.equal(codes_EOI[expert], expected)


@pytest.mark.parametrize("block", [8, 64])
def test_it_lowers_the_output_error_of_correlated_inputs(block: int) -> None:
    weight_EOI, moment_EII = normal(3, 20, 40), moments(3, 40, seed=5)

    codes_EOI = round_with_feedback(weight_EOI, feedback_factor(moment_EII), block, begin)

    nearest_EOI = values(begin(weight_EOI)(weight_EOI)[0])
    with_feedback_E = expected_error(values(codes_EOI) - weight_EOI, moment_EII)
    assert (with_feedback_E < 0.7 * expected_error(nearest_EOI - weight_EOI, moment_EII)).all()


@pytest.mark.parametrize("moment", ["identity", "zero"])
def test_inputs_without_correlation_leave_rounding_to_nearest(moment: str) -> None:
    weight_EOI = normal(2, 6, 10)
    moment_EII = torch.eye(10, dtype=torch.float64).expand(2, 10, 10)
    if moment == "zero":
        moment_EII = torch.zeros_like(moment_EII)

    codes_EOI = round_with_feedback(weight_EOI, feedback_factor(moment_EII), 4, begin)

    assert torch.equal(codes_EOI, begin(weight_EOI)(weight_EOI)[0])


def test_blocks_begin_with_what_feedback_has_made_of_them() -> None:
    weight_EOI, moment_EII = normal(2, 6, 10), moments(2, 10, seed=7)
    seen: list[Tensor] = []

    def begin_and_note(block_EOB: Tensor) -> Round:
        seen.append(block_EOB.clone())
        return begin(block_EOB)

    before = weight_EOI.clone()
    round_with_feedback(weight_EOI, feedback_factor(moment_EII), 4, begin_and_note)

    assert [block.shape[-1] for block in seen] == [4, 4, 2]
    assert torch.equal(seen[0], weight_EOI[..., :4])
    assert not torch.equal(seen[1], weight_EOI[..., 4:8])
    assert torch.equal(weight_EOI, before), "the weights themselves are left alone"


def test_the_factor_is_the_inverse_moment_s() -> None:
    moment_EII = moments(3, 12, seed=1)
    damped_EII = moment_EII + 0.05 * moment_EII.diagonal(dim1=1, dim2=2).mean(1)[
        :, None, None
    ] * torch.eye(12)

    factor_EII = feedback_factor(moment_EII, damping=0.05)

    assert torch.equal(factor_EII, factor_EII.triu())
    assert_close(factor_EII.mT @ factor_EII @ damped_EII, torch.eye(12).double().expand(3, 12, 12))
