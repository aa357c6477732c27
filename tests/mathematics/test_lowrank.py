"""The closed forms: best of their rank, by weight error or by expected output error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics.lowrank import (
    damped,
    expected_error,
    low_rank,
    symmetric_root,
    whitened_low_rank,
)

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 9)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(size: int, *, seed: int, samples: int | None = None, spread: float = 1.0) -> Tensor:
    """Return a second moment; with fewer ``samples`` than ``size`` it is singular."""
    x_TI = normal(samples or 3 * size, size, seed=seed) * torch.logspace(
        0, spread, size, dtype=torch.float64
    )
    return x_TI.T @ x_TI / len(x_TI)


@given(seeds, sizes, sizes, st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_the_error_is_the_tail_of_the_singular_values(
    seed: int, outputs: int, inputs: int, rank: int
) -> None:
    matrix_OI = normal(outputs, inputs, seed=seed)

    b_OR, a_RI = low_rank(matrix_OI, rank)

    assert b_OR.shape == (outputs, rank)
    assert a_RI.shape == (rank, inputs)
    tail = torch.linalg.svdvals(matrix_OI)[rank:].square().sum()
    error = (matrix_OI - b_OR @ a_RI).square().sum()
    assert float((error - tail).abs()) <= 1e-10 * float(matrix_OI.square().sum())


@given(seeds, st.integers(2, 8), st.integers(2, 8), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_nothing_of_the_same_rank_nearby_is_better(
    seed: int, outputs: int, inputs: int, rank: int
) -> None:
    matrix_OI = normal(outputs, inputs, seed=seed)
    b_OR, a_RI = low_rank(matrix_OI, rank)
    best = (matrix_OI - b_OR @ a_RI).square().sum()

    for step in (1e-3, 1e-1, 1.0):
        other_b = b_OR + step * normal(outputs, rank, seed=seed + 1)
        other_a = a_RI + step * normal(rank, inputs, seed=seed + 2)
        assert (matrix_OI - other_b @ other_a).square().sum() >= best - 1e-12


def test_singular_values_are_split_evenly() -> None:
    b_OR, a_RI = low_rank(normal(6, 5, seed=0), 3)

    assert_close(b_OR.norm(dim=0), a_RI.norm(dim=1))
    assert_close(b_OR.norm(dim=0).square(), torch.linalg.svdvals(normal(6, 5, seed=0))[:3])


def test_a_batch_is_factored_matrix_by_matrix() -> None:
    matrix_MOI = normal(4, 6, 5, seed=0)

    b_MOR, a_MRI = low_rank(matrix_MOI, 2)

    for number, matrix_OI in enumerate(matrix_MOI):
        b_OR, a_RI = low_rank(matrix_OI, 2)
        assert_close(b_MOR[number] @ a_MRI[number], b_OR @ a_RI)


def test_a_matrix_of_zeros_has_factors_of_zeros() -> None:
    b_OR, a_RI = low_rank(torch.zeros(4, 3), 2)

    assert not b_OR.any() and not (b_OR @ a_RI).any()
    assert a_RI.isfinite().all()


@given(seeds, sizes)
@settings(max_examples=50, deadline=None)
def test_the_root_squares_to_the_moment_and_has_an_inverse(seed: int, size: int) -> None:
    moment_II = moment(size, seed=seed)

    root_II, inverse_II = symmetric_root(moment_II)

    assert_close(root_II @ root_II, moment_II, 1e-9)
    assert_close(root_II @ inverse_II, torch.eye(size, dtype=torch.float64), 1e-6)
    assert_close(root_II, root_II.T, 1e-9)


@given(seeds, sizes, sizes, st.integers(1, 6), st.floats(0.0, 2.0), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_whitened_is_never_worse_than_plain_in_expected_output_error(
    seed: int, outputs: int, inputs: int, rank: int, spread: float, samples: int
) -> None:
    matrix_OI = normal(outputs, inputs, seed=seed)
    moment_II = moment(inputs, seed=seed + 1, samples=samples, spread=spread)

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return float(expected_error(matrix_OI - factors[0] @ factors[1], moment_II))

    plain = error(low_rank(matrix_OI, rank))
    whitened = error(whitened_low_rank(matrix_OI, rank, moment_II))

    assert whitened <= plain + 1e-7 * float(expected_error(matrix_OI, moment_II))


def test_whitened_is_better_where_inputs_have_directions() -> None:
    matrix_OI, moment_II = normal(8, 8, seed=0), moment(8, seed=1, spread=2.0)

    def error(factors: tuple[Tensor, Tensor]) -> float:
        return float(expected_error(matrix_OI - factors[0] @ factors[1], moment_II))

    plain = error(low_rank(matrix_OI, 2))

    assert error(whitened_low_rank(matrix_OI, 2, moment_II)) < 0.5 * plain


def test_whitening_by_the_identity_is_plain() -> None:
    matrix_OI = normal(6, 5, seed=0)
    b_OR, a_RI = whitened_low_rank(matrix_OI, 2, torch.eye(5, dtype=torch.float64))
    plain_b, plain_a = low_rank(matrix_OI, 2)

    assert_close(b_OR @ a_RI, plain_b @ plain_a)


@given(seeds, sizes, st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_expected_error_is_the_mean_over_inputs(seed: int, size: int, samples: int) -> None:
    x_TI, error_OI = normal(samples, size, seed=seed), normal(4, size, seed=seed + 1)

    expected = (x_TI @ error_OI.T).square().sum(1).mean()

    assert_close(expected_error(error_OI, x_TI.T @ x_TI / samples), expected, 1e-10)


def test_expected_error_of_a_batch() -> None:
    error_MOI, moment_II = normal(3, 4, 5, seed=0), moment(5, seed=1)

    batched = expected_error(error_MOI, moment_II)

    assert batched.shape == (3,)
    assert_close(batched[1], expected_error(error_MOI[1], moment_II), 1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.25, 1.0])
def test_damping_goes_from_the_moment_to_the_identity_of_equal_trace(damping: float) -> None:
    moment_II = moment(5, seed=0)
    identity_II = torch.eye(5, dtype=torch.float64) * moment_II.trace() / 5

    result_II = damped(moment_II, damping)

    assert_close(result_II, (1 - damping) * moment_II + damping * identity_II, 1e-12)
    assert_close(result_II.trace(), moment_II.trace(), 1e-12)


def test_damping_lowers_the_condition_number_step_by_step() -> None:
    moment_II = moment(6, seed=0, spread=2.0)

    conditions = [float(torch.linalg.cond(damped(moment_II, d))) for d in (0.0, 0.1, 0.5, 1.0)]

    assert conditions == sorted(conditions, reverse=True)
    assert conditions[-1] == pytest.approx(1.0)


def spectrum(kind: str) -> torch.Tensor:
    """Return a matrix too large to be decomposed whole, whose singular values go down somehow."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = 700, 560

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    if kind == "flat":
        return noise(rows, columns)
    if kind == "rank 3":
        return noise(rows, 3) @ noise(3, columns)
    if kind == "zero":
        return torch.zeros(rows, columns)
    left, right = (torch.linalg.qr(noise(size, columns)).Q for size in (rows, columns))
    return left * torch.arange(1, columns + 1) ** -0.5 @ right.T


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["flat", "decaying", "rank 3", "zero"])
def test_of_a_large_matrix_next_to_nothing_is_lost(kind: str, turned: bool) -> None:
    matrix_OI = spectrum(kind).T if turned else spectrum(kind)
    best = torch.linalg.svdvals(matrix_OI.double())[6:].square().sum()

    b_OR, a_RI = low_rank(matrix_OI, 6)

    assert (b_OR.shape, a_RI.shape) == ((len(matrix_OI), 6), (6, matrix_OI.shape[1]))
    left = (matrix_OI - b_OR @ a_RI).double().square().sum()
    assert left <= best + 2e-5 * matrix_OI.double().square().sum()
    again = low_rank(matrix_OI, 6)
    assert torch.equal(b_OR, again[0])
    assert torch.equal(a_RI, again[1])


def test_large_matrices_of_a_batch_are_factored_one_by_one() -> None:
    matrices = torch.stack([spectrum("flat"), spectrum("decaying")])

    b_NOR, a_NRI = low_rank(matrices, 4)

    for matrix_OI, b_OR, a_RI in zip(matrices, b_NOR, a_NRI, strict=True):
        expected = low_rank(matrix_OI, 4)
        assert torch.equal(b_OR, expected[0])
        assert torch.equal(a_RI, expected[1])
    norms_NR = b_NOR.norm(dim=1)
    assert_close(norms_NR, a_NRI.norm(dim=2), 1e-4)
