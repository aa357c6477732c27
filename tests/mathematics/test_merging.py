"""Merging tensors: spherical interpolation against its closed form, SCE against its three steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics.merging import mean_merge, multi_slerp, sce_merge

seeds = st.integers(0, 10_000)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The closed form for two vectors of length one."""
    angle = (first * second).sum().clamp(-1, 1).acos()
    return (((1 - t) * angle).sin() * first + (t * angle).sin() * second) / angle.sin()


def unit(*shape: int, seed: int) -> Tensor:
    vector = normal(*shape, seed=seed)
    return vector / vector.norm()


def angles(direction_N: Tensor, member_MN: Tensor) -> Tensor:
    unit_MN = member_MN / member_MN.norm(dim=1, keepdim=True)
    return (unit_MN @ direction_N / direction_N.norm()).clamp(-1, 1).acos()


# Mean.


def test_the_mean_is_the_mean() -> None:
    members = normal(3, 4, 5)

    assert_close(mean_merge(members), (members[0] + members[1] + members[2]) / 3, 1e-12)


# Multi-SLERP.


@given(seeds, st.integers(2, 30), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_of_two_members_it_is_slerp(seed: int, size: int, t: float) -> None:
    first, second = unit(size, seed=seed), unit(size, seed=seed + 1)

    merged = multi_slerp(torch.stack([first, second]), torch.tensor([1 - t, t]))

    assert_close(merged, slerp(first, second, t), 1e-6)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_members_merge_into_themselves(members: int, dtype: torch.dtype) -> None:
    member = normal(4, 3, dtype=dtype)

    merged = multi_slerp(member.expand(members, 4, 3))

    assert merged.dtype == dtype
    assert_close(merged, member, 1e-6)


@given(seeds, st.integers(1, 8), st.floats(0.1, 10.0))
@settings(max_examples=50, deadline=None)
def test_members_of_one_length_keep_it(seed: int, members: int, length: float) -> None:
    member_MN = normal(members, 20, seed=seed)
    member_MN = length * member_MN / member_MN.norm(dim=1, keepdim=True)

    expected = torch.tensor(length, dtype=torch.float64)
    assert_close(multi_slerp(member_MN).norm(), expected, 1e-9)


def test_the_length_is_the_weighted_mean_of_lengths() -> None:
    members = torch.stack([2.0 * unit(9, seed=0), 5.0 * unit(9, seed=1)])

    merged = multi_slerp(members, torch.tensor([3.0, 1.0]))

    assert_close(merged.norm(), torch.tensor(2.75), 1e-9)
    assert_close(merged / 2.75, slerp(unit(9, seed=0), unit(9, seed=1), 0.25), 1e-6)


@given(seeds, st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_no_direction_nearby_is_closer_to_the_members(seed: int, members: int) -> None:
    member_MN = normal(members, 12, seed=seed) + 1.0
    weight_M = normal(members, seed=seed + 1).abs() + 0.1

    merged = multi_slerp(member_MN, weight_M)

    least = float((weight_M * angles(merged, member_MN).square()).sum())
    for step in (1e-3, 1e-1):
        other = merged + step * merged.norm() * normal(12, seed=seed + 2)
        assert float((weight_M * angles(other, member_MN).square()).sum()) >= least - 1e-12


def test_it_differs_from_the_direction_of_the_mean_where_weights_do() -> None:
    members = torch.stack([unit(6, seed=0), unit(6, seed=1)])
    weight_M = torch.tensor([0.9, 0.1], dtype=torch.float64)
    chord = weight_M @ members

    merged = multi_slerp(members, weight_M)

    assert float((merged - chord / chord.norm()).norm()) > 1e-2


def test_the_origin_is_the_centre_of_the_sphere() -> None:
    origin, members = normal(4, 3, seed=9), normal(3, 4, 3, seed=1)

    merged = multi_slerp(members, origin=origin)

    assert_close(merged, multi_slerp(members - origin) + origin, 1e-9)


def test_a_member_on_the_origin_counts_for_the_length_alone() -> None:
    members = torch.stack([torch.zeros(5, dtype=torch.float64), unit(5, seed=0), unit(5, seed=1)])

    merged = multi_slerp(members)

    assert_close(merged, multi_slerp(members[1:]) * 2 / 3, 1e-9)


def test_members_all_on_the_origin_merge_into_it() -> None:
    origin = normal(4)

    assert torch.equal(multi_slerp(origin.expand(3, 4), origin=origin), origin)


def test_opposite_members_have_no_mean_direction() -> None:
    members = torch.stack([normal(5), -normal(5)])

    with pytest.raises(UserError, match=r"cancel each other.*mean_merge"):
        multi_slerp(members)


# SCE.


def test_the_coordinates_of_greatest_variance_are_kept() -> None:
    origin = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Variances over members: 4, 0.01, 1, 0.
    delta_MN = torch.tensor([[4.0, 0.2, 2.0, 7.0], [8.0, 0.4, 4.0, 7.0]])

    # Of the three coordinates that vary, two thirds are kept; what does not vary goes as well.
    merged = sce_merge(origin + delta_MN, origin, 0.7)

    # What is left of the second is twice the first: their mean squares are as 1 to 4.
    assert_close(merged - origin, torch.tensor([7.2, 0.0, 3.6, 0.0]), 1e-6)


def test_the_sign_of_the_minority_is_erased() -> None:
    origin = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    # Each member's mean square is the same, so that members weigh the same.
    delta = torch.tensor(
        [[[3.0, 1.0], [2.0, 1.0]], [[-1.0, 3.0], [2.0, -1.0]], [[1.0, -2.0], [3.0, -1.0]]]
    )

    merged = sce_merge(origin + delta, origin, 1.0)

    assert_close(merged - origin, torch.tensor([[2.0, 2.0], [7 / 3, -1.0]]), 1e-6)


def test_members_weigh_by_their_mean_square() -> None:
    delta_MN = torch.tensor([[1.0, 1.0], [3.0, 3.0]])

    merged = sce_merge(delta_MN, torch.zeros(2), 1.0)

    assert_close(merged, torch.full((2,), (1 * 1 + 9 * 3) / 10), 1e-6)


@given(seeds, st.integers(1, 5), st.floats(0.0, 1.2))
@settings(max_examples=50, deadline=None)
def test_what_is_kept_lies_between_origin_and_members(
    seed: int, members: int, selected: float
) -> None:
    origin, member = normal(6, 5, seed=seed), normal(members, 6, 5, seed=seed + 1)

    merged = sce_merge(member, origin, selected)

    low = torch.minimum(member.min(0).values, origin)
    high = torch.maximum(member.max(0).values, origin)
    assert ((merged >= low - 1e-9) & (merged <= high + 1e-9)).all()
    if members > 1 and selected < 1:
        assert int((merged != origin).sum()) <= int(selected * 30)


@pytest.mark.parametrize("selected", [0.0, 0.5, 1.0])
def test_members_that_are_the_origin_merge_into_it(selected: float) -> None:
    origin = normal(3, 4)

    assert torch.equal(sce_merge(origin.expand(2, 3, 4), origin, selected), origin)
