"""Codebooks fit, codes name the nearest entry, and packed codes come back as they were."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefuse.mathematics.codebooks import AT_ONCE, fit_codebook, fit_levels, nearest, pack_codes
from moefuse.modeling.modeling_moefuse import CODED, unpack_codes

CODE_BITS = sorted({code_bits for _, code_bits in CODED.values()})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from(CODE_BITS),
    st.integers(0, 23),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_unpacking_undoes_packing(code_bits: int, count: int, lead: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**code_bits, (*lead, count), generator=generator)

    packed = pack_codes(codes, code_bits)

    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, -(-count * code_bits // 8))
    unpacked = unpack_codes(packed, code_bits, count)
    assert unpacked.dtype == torch.int64
    assert torch.equal(unpacked, codes)


def test_six_bit_codes_lie_lowest_first() -> None:
    packed = pack_codes(torch.tensor([63, 0, 1, 0, 2]), 6)

    assert packed.tolist() == [63, 16, 0, 2]


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_nearest_is_by_squared_distance(count: int, size: int, entries: int, seed: int) -> None:
    vector_NV, codebook_CV = normal(count, size, seed=seed), normal(entries, size, seed=seed + 1)

    code_N = nearest(vector_NV, codebook_CV)

    distance_NC = (vector_NV.unsqueeze(1) - codebook_CV).square().sum(-1)
    assert code_N.shape == (count,)
    chosen_N = distance_NC.gather(1, code_N.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen_N, distance_NC.amin(1), atol=1e-5, rtol=1e-5)


def test_many_vectors_are_looked_up_in_parts() -> None:
    vector_NV, codebook_CV = normal(AT_ONCE + 3, 2), normal(5, 2, seed=1)

    code_N = nearest(vector_NV, codebook_CV)

    assert torch.equal(code_N[-3:], nearest(vector_NV[-3:], codebook_CV))


@pytest.mark.parametrize("period", [4, 16, 64])
def test_vectors_that_recur_with_any_period_are_all_learnt(period: int) -> None:
    """Entries at equal distances would all start from the same place of every row."""
    planted_CV = 10 * normal(period, 3)

    codebook_CV = fit_codebook(planted_CV.repeat(64, 1), 4 * period)

    found_CV = codebook_CV[nearest(planted_CV, codebook_CV)]
    assert (found_CV - planted_CV).square().sum() < 0.05 * planted_CV.square().sum()


@pytest.mark.parametrize("count", [1, 3, 256, 700])
def test_a_codebook_has_its_size_whatever_it_is_fitted_to(count: int) -> None:
    vector_NV = normal(count, 4)

    codebook_CV = fit_codebook(vector_NV, 256)

    assert codebook_CV.shape == (256, 4)
    assert torch.isfinite(codebook_CV).all()
    if count <= 256:
        assert torch.equal(codebook_CV[nearest(vector_NV, codebook_CV)], vector_NV)


def test_fitting_is_deterministic_and_every_round_helps() -> None:
    vector_NV = normal(3000, 4)

    def error(rounds: int) -> float:
        codebook_CV = fit_codebook(vector_NV, 64, rounds=rounds)
        return float((codebook_CV[nearest(vector_NV, codebook_CV)] - vector_NV).square().mean())

    assert torch.equal(fit_codebook(vector_NV, 64), fit_codebook(vector_NV, 64))
    assert error(12) < error(3) < error(0)


@pytest.mark.parametrize("levels", [16, 64, 256])
def test_levels_come_near_to_the_least_error_that_there_is(levels: int) -> None:
    """Panter and Dite's bound for a normal density; values drawn from all over miss it six-fold."""
    value_N = normal(60_000)

    level_L = fit_levels(value_N, levels)

    assert torch.equal(level_L, level_L.sort().values)
    near_N = level_L[nearest(value_N.unsqueeze(1), level_L.unsqueeze(1))]
    bound = math.pi * math.sqrt(3) / 2 / levels**2
    assert 0.85 * bound < float((near_N - value_N).square().mean()) < 1.1 * bound


@pytest.mark.parametrize("distinct", [1, 2, 255, 256])
def test_no_more_values_than_levels_are_all_levels(distinct: int) -> None:
    value_N = normal(distinct).repeat(3)

    level_L = fit_levels(value_N, 256)

    assert level_L.shape == (256,)
    assert set(level_L.tolist()) == set(value_N.tolist())
