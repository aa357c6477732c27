"""Whole numbers with a zero and fp8, as quantisers store them: scales, rounding, error feedback.

A number is its code times the scale of its group. Codes of b bits are whole, -2^(b-1) to
2^(b-1) - 1; codes in fp8 are float8_e4m3fn. This is the symmetric grid of compressed-tensors; the
one of ``mathematics.quantization`` has no zero and is moefuse's own.

Shape suffixes: O outputs, I inputs, G groups of a row, N numbers of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefuse.mathematics.error_feedback import Round, feedback_factor, round_with_feedback

SHRINKS = tuple(1.0 - 0.5 * step / 39 for step in range(40))
"""What the scale that just reaches a group's greatest number is tried multiplied with."""
TOP_FP8 = 448.0


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits`` bits, ``group`` numbers of a row to a scale (None: the row)."""

    bits: int
    group: int | None = None
    is_float: bool = False

    @property
    def reach(self) -> float:
        """How many scales the greatest number of a group lies away from zero."""
        return TOP_FP8 if self.is_float else (2**self.bits - 1) / 2

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the codes nearest to ``weight``, as fp32; ``scale`` broadcasts to it."""
        place = weight / torch.where(scale == 0, torch.ones_like(scale), scale)
        if self.is_float:
            return place.clamp(-TOP_FP8, TOP_FP8).to(torch.float8_e4m3fn).float()
        return place.round().clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: ``codes_OI`` fp32 and ``scale_OG`` in the dtype that is stored."""

    codes_OI: Tensor
    scale_OG: Tensor

    def weight(self) -> Tensor:
        """Return the numbers that the codes stand for, (O, I) fp32."""
        rows, columns = self.codes_OI.shape
        codes_OGN = self.codes_OI.view(rows, self.scale_OG.shape[1], -1)
        return (codes_OGN * self.scale_OG.float().unsqueeze(-1)).view(rows, columns)


def nearest(
    weight_OI: Tensor, grid: Grid, dtype: torch.dtype, *, search: bool, energy_I: Tensor | None
) -> Rounded:
    """Round every number to the nearest code; scales are stored in ``dtype``.

    Without ``search`` a scale just reaches the group's greatest number, as usual; with it the one
    of ``SHRINKS`` is taken that has the least squared error, inputs weighed by ``energy_I`` (I,),
    their mean square, where it is known.
    """
    size = grid.group or weight_OI.shape[1]
    weight_OGN = weight_OI.float().unflatten(1, (-1, size))
    energy_GN = None if energy_I is None else energy_I.float().view(-1, size)
    scale_OG = _scales(weight_OGN, grid, dtype, energy_GN, search=search)
    codes_OGN = grid.codes(weight_OGN, scale_OG.float().unsqueeze(-1))
    return Rounded(codes_OGN.flatten(1), scale_OG)


def _scales(
    weight_OGN: Tensor, grid: Grid, dtype: torch.dtype, energy_GN: Tensor | None, *, search: bool
) -> Tensor:
    widest_OG = weight_OGN.abs().amax(-1) / grid.reach
    best_OG, least_OG = widest_OG.to(dtype), torch.full_like(widest_OG, torch.inf)
    for shrink in SHRINKS if search and not grid.is_float else ():
        scale_OG = (widest_OG * shrink).to(dtype)
        spread_OG1 = scale_OG.float().unsqueeze(-1)
        error_OGN = (grid.codes(weight_OGN, spread_OG1) * spread_OG1 - weight_OGN).square()
        if energy_GN is not None:
            error_OGN = error_OGN * energy_GN
        error_OG = error_OGN.sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def with_feedback(weight_OI: Tensor, grid: Grid, dtype: torch.dtype, moment_II: Tensor) -> Rounded:
    """Round as GPTQ does (see ``error_feedback``): later columns make up for earlier ones' errors.

    ``moment_II`` is the second moment of the inputs. A group's scale is sought, by least squared
    error, for its numbers as they are when its turn comes.
    """
    assert not grid.is_float
    size = grid.group or weight_OI.shape[1]
    lowest = 2 ** (grid.bits - 1)
    scales: list[Tensor] = []

    def begin(weight_1ON: Tensor) -> Round:
        scale_1O = _scales(weight_1ON, grid, dtype, None, search=True)
        scales.append(scale_1O[0])

        def round_column(weight_1O: Tensor) -> tuple[Tensor, Tensor]:
            codes_1O = grid.codes(weight_1O, scale_1O.float())
            return (codes_1O + lowest).to(torch.uint8), codes_1O * scale_1O.float()

        return round_column

    factor_1II = feedback_factor(moment_II.float().unsqueeze(0))
    codes_1OI = round_with_feedback(weight_OI.float().unsqueeze(0), factor_1II, size, begin)
    return Rounded(codes_1OI[0].float() - lowest, torch.stack(scales, -1))
