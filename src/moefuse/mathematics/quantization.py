"""Numbers of few bits: symmetric grids, their scales, their packing, and training through them.

A code k stands for the level ``k - (n - 1) / 2`` where n is the number of levels: 2^bits of them
without a zero, or three with one (ternary, "1.58 bits"). A group of neighbours along the last
dimension shares one scale, and a number is its level times that scale. With 1 bit the levels are
-1 and 1, so that its best scale is the mean magnitude.

Suffixes: I numbers along the last dimension, G groups of them, N numbers of one group, B bytes;
leading dimensions are whatever they are.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moefuse.errors import UserError

TERNARY = 1.58
WORDS: dict[float, tuple[int, int]] = {
    8: (1, 1),
    4: (2, 1),
    3: (8, 3),
    2: (4, 1),
    TERNARY: (5, 1),
    1: (8, 1),
}
"""By bits of a number: how many codes make a word of storage, and how many bytes a word takes."""
SCALE_BYTES = 2
"""Scales are stored as fp16."""
SHRINKS = tuple(0.2 ** (step / 39) for step in range(40))
"""What the scale that just reaches a group's greatest number is tried multiplied with: 1 to 0.2."""


@dataclass(frozen=True)
class Format:
    """How numbers are stored: ``bits`` each, ``group`` of them to a scale (None: a whole row).

    Raises ``UserError`` for bits that are not in ``WORDS`` and for a group of nothing.
    """

    bits: float
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in WORDS:
            choices = ", ".join(map(str, WORDS))
            raise UserError(f"Numbers cannot have {self.bits} bits; choose from {choices}.")
        if self.group is not None and self.group < 1:
            raise UserError(f"A group of {self.group} numbers is no group; take 1 or more.")

    @property
    def levels(self) -> int:
        """How many values a code can have."""
        return 3 if self.bits == TERNARY else 2 ** int(self.bits)

    @property
    def step(self) -> float:
        """The distance between neighbouring levels, in scales."""
        return 2.0 if self.bits == 1 else 1.0

    @property
    def top(self) -> float:
        """The highest level, in scales; the lowest is as far below zero."""
        return self.step * (self.levels - 1) / 2

    def groups(self, count: int) -> int:
        """Return how many scales ``count`` neighbours have."""
        return 1 if self.group is None else math.ceil(count / self.group)


def best_scale(weight_I: Tensor, fmt: Format) -> Tensor:
    """Return the scale of every group, (..., G), that brings its squared error near the least.

    ``weight_I`` is (..., I), any float dtype, which the result has too. With 1 bit the least is
    known: the mean magnitude (Rastegari et al., "XNOR-Net", 2016, equation 6). Otherwise the best
    of ``SHRINKS`` is refined by least squares on its codes. A group of zeros has the scale zero.
    """
    weight_GN = _grouped(weight_I, fmt)
    real_GN = _grouped(torch.ones_like(weight_I), fmt)
    if fmt.bits == 1:
        return weight_GN.abs().sum(-1) / real_GN.sum(-1)
    widest_G = weight_GN.abs().amax(-1) / fmt.top
    best_G, least_G = widest_G, torch.full_like(widest_G, torch.inf)
    for shrink in SHRINKS:
        scale_G = widest_G * shrink
        level_GN = _levels(_codes(weight_GN, scale_G.unsqueeze(-1), fmt), fmt) * real_GN
        error_G = (level_GN * scale_G.unsqueeze(-1) - weight_GN).square().sum(-1)
        best_G = torch.where(error_G < least_G, scale_G, best_G)
        least_G = torch.minimum(error_G, least_G)
    level_GN = _levels(_codes(weight_GN, best_G.unsqueeze(-1), fmt), fmt) * real_GN
    tiny = torch.finfo(weight_I.dtype).tiny
    return (weight_GN * level_GN).sum(-1) / level_GN.square().sum(-1).clamp_min(tiny)


def to_codes(weight_I: Tensor, scale_G: Tensor, fmt: Format) -> Tensor:
    """Return the codes of the levels nearest to ``weight_I`` (..., I), uint8 of its shape.

    ``scale_G`` is (..., G); numbers whose scale is zero get codes that do not matter.
    """
    return _codes(weight_I, _spread(scale_G, weight_I.shape[-1], fmt), fmt).to(torch.uint8)


def from_codes(codes_I: Tensor, scale_G: Tensor, fmt: Format) -> Tensor:
    """Return the numbers that uint8 codes (..., I) stand for, in the dtype of ``scale_G``.

    ``scale_G`` is (..., G); the result can be differentiated by it.
    """
    level_I = _levels(codes_I.to(scale_G.dtype), fmt)
    return level_I * _spread(scale_G, codes_I.shape[-1], fmt)


def fake_quantize(weight_I: Tensor, scale_G: Tensor, fmt: Format) -> Tensor:
    """Round ``weight_I`` (..., I) to its format and let gradients through.

    Forward is ``from_codes`` of ``to_codes``. Backward, as in Esser et al., "Learned Step Size
    Quantization" (2019), equations 3 and 5: the weight gets the gradient where it is within the
    grid, up to half a step past the outer levels, and nothing beyond; the scale gets ``level -
    weight / scale`` within the grid and the level beyond it, times ``1 / sqrt(N * top)`` (section
    2.2). With 1 bit the scale moves no code, so the level alone is its gradient everywhere.
    """
    return _FakeQuantize.apply(weight_I, scale_G, fmt)  # type: ignore[return-value]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_I: Tensor, scale_G: Tensor, fmt: Format) -> Tensor:
        ctx.save_for_backward(weight_I, scale_G)
        ctx.fmt = fmt
        return from_codes(to_codes(weight_I, scale_G, fmt), scale_G, fmt).to(weight_I.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient_I: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        weight_I, scale_G = ctx.saved_tensors
        fmt: Format = ctx.fmt
        ratio_I = weight_I / _never_zero(_spread(scale_G, weight_I.shape[-1], fmt))
        inside_I = ratio_I.abs() <= fmt.top + fmt.step / 2
        slope_I = _levels(to_codes(weight_I, scale_G, fmt).to(ratio_I.dtype), fmt)
        if fmt.bits != 1:
            slope_I = slope_I - ratio_I * inside_I
        count_G = _grouped(torch.ones_like(weight_I), fmt).sum(-1)
        scale_gradient_G = _grouped(gradient_I * slope_I, fmt).sum(-1)
        scale_gradient_G = (scale_gradient_G * (count_G * fmt.top).rsqrt()).to(scale_G.dtype)
        return gradient_I * inside_I, scale_gradient_G, None


def pack(codes_I: Tensor, bits: float) -> Tensor:
    """Pack uint8 codes (..., I) into uint8 bytes (..., B), every row padded to whole bytes.

    A word of storage (see ``WORDS``) holds its codes as the digits of a number, the first one
    lowest, and is written lowest byte first: bits side by side, or five ternary digits to a byte.
    """
    per_word, word_bytes = WORDS[bits]
    count = codes_I.shape[-1]
    padded = torch.nn.functional.pad(codes_I, (0, -count % per_word)).int()
    digits = padded.unflatten(-1, (-1, per_word))
    word = (digits * _place_values(bits, codes_I.device)).sum(-1, dtype=torch.int32)
    parts = [word >> 8 * byte & 255 for byte in range(word_bytes)]
    return torch.stack(parts, -1).flatten(-2)[..., : row_bytes(count, bits)].to(torch.uint8)


def unpack(packed_B: Tensor, bits: float, count: int) -> Tensor:
    """Return the ``count`` codes of every row, uint8 (..., I), that ``pack`` gave (..., B).

    Raises ``UserError`` if the rows have not the bytes that ``count`` codes take.
    """
    per_word, word_bytes = WORDS[bits]
    expected = row_bytes(count, bits)
    if packed_B.shape[-1] != expected:
        raise UserError(
            f"Packed rows of {packed_B.shape[-1]} bytes cannot hold {count} numbers of {bits} bits,"
            f" which take {expected}; check shape and bits."
        )
    padded = torch.nn.functional.pad(packed_B, (0, -expected % word_bytes)).int()
    parts = padded.unflatten(-1, (-1, word_bytes))
    word = sum(parts[..., byte] << 8 * byte for byte in range(word_bytes))
    assert isinstance(word, Tensor)
    digits = word.unsqueeze(-1) // _place_values(bits, packed_B.device) % _base(bits)
    codes = digits.reshape(*packed_B.shape[:-1], word.shape[-1] * per_word)
    return codes[..., :count].to(torch.uint8)


def row_bytes(count: int, bits: float) -> int:
    """Return the bytes of one packed row of ``count`` codes."""
    per_word, word_bytes = WORDS[bits]
    return math.ceil(count * word_bytes / per_word)


def stored_bytes(shape: tuple[int, ...], fmt: Format) -> int:
    """Return the bytes of packed codes and fp16 scales of a tensor of this shape."""
    rows = math.prod(shape[:-1])
    return rows * (row_bytes(shape[-1], fmt.bits) + SCALE_BYTES * fmt.groups(shape[-1]))


def _codes(weight: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return codes as whole floats; ``scale`` broadcasts to ``weight``."""
    place = weight / (_never_zero(scale) * fmt.step) + (fmt.levels - 1) / 2
    return place.round_().clamp_(0, fmt.levels - 1)


def _levels(codes: Tensor, fmt: Format) -> Tensor:
    return (codes - (fmt.levels - 1) / 2) * fmt.step


def _never_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _spread(scale_G: Tensor, count: int, fmt: Format) -> Tensor:
    """Return the scale of each of ``count`` numbers, or something that broadcasts to it."""
    if fmt.groups(count) == 1:
        return scale_G
    assert fmt.group is not None
    spread = scale_G.unsqueeze(-1).expand(*scale_G.shape, fmt.group)
    return spread.flatten(-2)[..., :count]


def _grouped(values_I: Tensor, fmt: Format) -> Tensor:
    """Return (..., G, N); the last group, should it be shorter, is padded with zeros."""
    if fmt.group is None:
        return values_I.unsqueeze(-2)
    padded = torch.nn.functional.pad(values_I, (0, -values_I.shape[-1] % fmt.group))
    return padded.unflatten(-1, (-1, fmt.group))


def _base(bits: float) -> int:
    return Format(bits).levels


def _place_values(bits: float, device: torch.device) -> Tensor:
    per_word, _ = WORDS[bits]
    values = [_base(bits) ** place for place in range(per_word)]
    return torch.tensor(values, dtype=torch.int32, device=device)
