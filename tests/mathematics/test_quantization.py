"""Few-bit numbers: grids, best scales, packing, sizes, and gradients through rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_close
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics.quantization import (
    WORDS,
    Format,
    best_scale,
    fake_quantize,
    from_codes,
    pack,
    stored_bytes,
    to_codes,
    unpack,
)

BITS = list(WORDS)
seeds = st.integers(0, 10_000)
formats = st.builds(Format, st.sampled_from(BITS), st.one_of(st.none(), st.integers(1, 20)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_codes(*shape: int, bits: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, Format(bits).levels, shape, generator=generator, dtype=torch.uint8)


def rounded(weight: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    return from_codes(to_codes(weight, scale, fmt), scale, fmt)


def group_errors(weight: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return the squared error of every group, computed group by group."""
    error = (rounded(weight, scale, fmt) - weight).square()
    parts = error.split(fmt.group or weight.shape[-1], dim=-1)
    return torch.stack([part.sum(-1) for part in parts], -1)


def widest_scale(weight: Tensor, fmt: Format) -> Tensor:
    parts = weight.split(fmt.group or weight.shape[-1], dim=-1)
    return torch.stack([part.abs().amax(-1) / fmt.top for part in parts], -1)


# Grids.


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (1, [-1, 1]),
        (1.58, [-1, 0, 1]),
        (2, [-1.5, -0.5, 0.5, 1.5]),
        (3, [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_the_levels_of_a_format(bits: float, levels: list[float]) -> None:
    codes = torch.arange(len(levels), dtype=torch.uint8)

    assert from_codes(codes, torch.tensor([2.0]), Format(bits)).tolist() == [2 * x for x in levels]


@given(formats, seeds, st.integers(1, 45))
@settings(max_examples=60, deadline=None)
def test_every_number_goes_to_the_nearest_level(fmt: Format, seed: int, count: int) -> None:
    weight = normal(3, count, seed=seed)
    scale = normal(3, fmt.groups(count), seed=seed + 1).abs() + 0.05
    levels = from_codes(
        torch.arange(fmt.levels, dtype=torch.uint8).expand(3, fmt.levels),
        torch.ones(3, 1, dtype=torch.float64),
        Format(fmt.bits),
    )

    actual = rounded(weight, scale, fmt)

    for group, part in enumerate(weight.split(fmt.group or count, dim=-1)):
        grid = levels * scale[:, group, None]
        nearest = (part.unsqueeze(-1) - grid.unsqueeze(1)).abs().amin(-1)
        start = group * (fmt.group or count)
        assert_close((actual[:, start : start + part.shape[1]] - part).abs(), nearest, 1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_the_way_through_numbers(bits: float) -> None:
    fmt = Format(bits, 7)
    codes = random_codes(4, 5, 40, bits=bits)
    scale = normal(4, 5, fmt.groups(40)).abs() + 0.1

    assert torch.equal(to_codes(from_codes(codes, scale, fmt), scale, fmt), codes)


@pytest.mark.parametrize("bits", [0, 5, 16, 1.5])
def test_bits_that_cannot_be_are_told_with_those_that_can(bits: float) -> None:
    with pytest.raises(UserError, match=rf"cannot have {bits} bits; choose from 8, 4, 3, 2, 1.58"):
        Format(bits)


@pytest.mark.parametrize("group", [0, -64])
def test_a_group_of_nothing_is_refused(group: int) -> None:
    with pytest.raises(UserError, match=f"group of {group} numbers"):
        Format(4, group)


# Scales.


@given(formats, seeds, st.integers(1, 45))
@settings(max_examples=60, deadline=None)
def test_the_best_scale_is_never_worse_than_the_widest(fmt: Format, seed: int, count: int) -> None:
    weight = normal(3, count, seed=seed)

    scale = best_scale(weight, fmt)

    assert scale.shape == (3, fmt.groups(count))
    widest = group_errors(weight, widest_scale(weight, fmt), fmt)
    assert (group_errors(weight, scale, fmt) <= widest * (1 + 1e-9) + 1e-20).all()


@pytest.mark.parametrize("bits", [4, 3, 2, 1.58, 1])
def test_the_best_scale_of_normal_numbers_beats_the_widest_by_far(bits: float) -> None:
    fmt = Format(bits, 64)
    weight = normal(50, 256)

    best = group_errors(weight, best_scale(weight, fmt), fmt).sum()

    assert best < 0.95 * group_errors(weight, widest_scale(weight, fmt), fmt).sum()


@pytest.mark.parametrize("bits", [4, 3, 2, 1.58, 1])
def test_no_scale_of_a_fine_search_is_much_better(bits: float) -> None:
    fmt = Format(bits)
    weight = normal(20, 64)
    found = group_errors(weight, best_scale(weight, fmt), fmt)

    searched = torch.stack(
        [
            group_errors(weight, widest_scale(weight, fmt) * shrink, fmt)
            for shrink in torch.linspace(0.15, 1.05, 1500, dtype=torch.float64)
        ]
    ).amin(0)

    assert found.sum() <= 1.03 * searched.sum()


@given(seeds, st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 45))
@settings(max_examples=40, deadline=None)
def test_with_one_bit_the_scale_is_the_mean_magnitude(
    seed: int, group: int | None, count: int
) -> None:
    weight = normal(3, count, seed=seed)

    scale = best_scale(weight, Format(1, group))

    parts = weight.split(group or count, dim=-1)
    assert_close(scale, torch.stack([part.abs().mean(-1) for part in parts], -1), 1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_shorter_last_group_has_the_scale_that_it_would_have_alone(bits: float) -> None:
    weight = normal(6, 64 + 64 + 5)

    scale = best_scale(weight, Format(bits, 64))

    assert scale.shape == (6, 3)
    assert_close(scale[:, 2:], best_scale(weight[:, 128:], Format(bits)), 1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_have_the_scale_zero_and_stay_zeros(bits: float) -> None:
    weight = torch.cat([torch.zeros(2, 8), torch.ones(2, 8)], -1)
    fmt = Format(bits, 8)

    scale = best_scale(weight, fmt)

    assert torch.equal(scale[:, 0], torch.zeros(2))
    assert torch.equal(rounded(weight, scale, fmt)[:, :8], weight[:, :8])


# Packing.


@given(st.sampled_from(BITS), seeds, st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_packed_codes_come_back(bits: float, seed: int, count: int) -> None:
    codes = random_codes(2, 3, count, bits=bits, seed=seed)

    packed = pack(codes, bits)

    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [255, 7], [255, 7]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [1, 2, 3, 0, 3], [0b00111001, 0b11]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0b10000001, 1]),
        (3, [7, 0, 7, 0, 0, 0, 0, 4], [0b11000111, 0b00000001, 0b10000000]),
        (3, [1, 0, 5], [0b01000001, 0b1]),
        (1.58, [2, 1, 0, 0, 1, 2], [2 + 3 + 81, 2]),
    ],
)
def test_how_codes_lie_in_bytes(bits: float, codes: list[int], expected: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


@given(formats, st.integers(1, 70))
@settings(max_examples=100, deadline=None)
def test_stored_bytes_are_the_bytes_of_the_packed_tensors(fmt: Format, count: int) -> None:
    weight = normal(2, 3, count)
    scale = best_scale(weight, fmt)
    packed = pack(to_codes(weight, scale, fmt), fmt.bits)

    assert stored_bytes((2, 3, count), fmt) == packed.nbytes + scale.half().nbytes


@pytest.mark.parametrize(
    ("bits", "per_number"), [(8, 8.25), (4, 4.25), (3, 3.25), (2, 2.25), (1.58, 1.85), (1, 1.25)]
)
def test_bits_stored_for_a_number_in_groups_of_64(bits: float, per_number: float) -> None:
    """A scale is a quarter of a bit; ternary numbers take a fifth of a byte."""
    assert stored_bytes((1, 320), Format(bits, 64)) * 8 / 320 == pytest.approx(per_number)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_another_width_are_told(bits: float) -> None:
    packed = pack(random_codes(2, 40, bits=bits), bits)

    with pytest.raises(UserError, match=r"cannot hold 99 numbers .* check shape and bits"):
        unpack(packed, bits, 99)


# Training through rounding.


@given(formats, seeds, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_fake_quantize_rounds(fmt: Format, seed: int, count: int) -> None:
    weight = normal(3, count, seed=seed)
    scale = best_scale(weight, fmt)

    assert torch.equal(fake_quantize(weight, scale, fmt), rounded(weight, scale, fmt))


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1.58])
def test_gradients_are_those_of_learned_step_sizes(bits: float) -> None:
    """Compared with the paper's formulas, number by number."""
    fmt = Format(bits, 8)
    weight, scale = normal(2, 20).requires_grad_(), torch.full((2, 3), 1.0 / fmt.top).double()
    scale.requires_grad_()
    upstream = normal(2, 20, seed=1)

    (fake_quantize(weight, scale, fmt) * upstream).sum().backward()

    weight_gradient, scale_gradient = torch.zeros(2, 20).double(), torch.zeros(2, 3).double()
    value = rounded(weight.detach(), scale.detach(), fmt)
    for row in range(2):
        for column in range(20):
            step = scale.detach()[row, column // 8]
            ratio, level = weight.detach()[row, column] / step, value[row, column] / step
            inside = bool(ratio.abs() <= fmt.top + 0.5)
            weight_gradient[row, column] = upstream[row, column] * inside
            slope = level - ratio if inside else level
            size = min(8, 20 - column // 8 * 8)
            scale_gradient[row, column // 8] += (
                upstream[row, column] * slope / (size * fmt.top) ** 0.5
            )
    assert 0 < int((weight_gradient == 0).sum()) < 40, "some are inside the grid, some beyond"
    assert weight.grad is not None
    assert scale.grad is not None
    assert_close(weight.grad, weight_gradient, 1e-9)
    assert_close(scale.grad, scale_gradient, 1e-9)


def test_the_scale_of_signs_has_its_true_gradient() -> None:
    weight, scale = normal(4, 32), best_scale(normal(4, 32), Format(1)).requires_grad_()
    codes, upstream = to_codes(weight, scale.detach(), Format(1)), normal(4, 32, seed=1)
    (true,) = torch.autograd.grad((from_codes(codes, scale, Format(1)) * upstream).sum(), scale)

    (found,) = torch.autograd.grad(
        (fake_quantize(weight, scale, Format(1)) * upstream).sum(), scale
    )

    assert_close(found * 32**0.5, true, 1e-12)


@pytest.mark.parametrize("bits", [2, 1.58, 1])
def test_training_through_rounding_lowers_the_output_error(bits: float) -> None:
    fmt = Format(bits, 16)
    teacher, x = normal(8, 32), normal(300, 32, seed=1) @ normal(32, 32, seed=2)
    weight = teacher.clone().requires_grad_()
    scale = best_scale(teacher, fmt).requires_grad_()
    optimizer = torch.optim.Adam([weight, scale], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    losses = []
    for _ in range(300):
        loss = (x @ (fake_quantize(weight, scale, fmt) - teacher).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))

    assert losses[-1] < 0.8 * losses[0]
