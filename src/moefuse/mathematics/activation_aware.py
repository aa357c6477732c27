"""Rounding that spares the inputs that matter, as AWQ does.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023). An input's column is multiplied by s
before rounding, and what gives that input is divided by s; columns of strong inputs, made larger,
lose less of themselves. s is the input's root mean square to a power, and of powers from 0 to 1 the
one is taken that has the least expected output error (section 3.2, where it is the mean size).

Shape suffixes: O outputs, I inputs.
"""

import torch
from torch import Tensor

from moefuse.mathematics.integers import Grid, nearest
from moefuse.mathematics.lowrank import expected_error

POWERS = tuple(step / 20 for step in range(20))
LARGEST = 1e4
"""An input is not multiplied by more, nor by less than its inverse."""


@torch.no_grad()
def input_scales(weight_OI: Tensor, grid: Grid, dtype: torch.dtype, moment_II: Tensor) -> Tensor:
    """Return what to multiply every column with before it is rounded, (I,) fp32, positive.

    ``moment_II`` is the second moment of the inputs; scales of codes are stored in ``dtype``.
    """
    weight_OI, moment_II = weight_OI.float(), moment_II.float()
    size_I = moment_II.diagonal().clamp_min(0).sqrt()
    if not bool((size_I > 0).any()):
        return torch.ones_like(size_I)
    size_I = size_I.clamp_min(float(size_I.max()) / LARGEST)
    tried = [_centred(size_I**power) for power in POWERS]
    errors = [_error(weight_OI, grid, dtype, moment_II, scale_I) for scale_I in tried]
    return tried[int(torch.stack(errors).argmin())]


def _centred(scale_I: Tensor) -> Tensor:
    """Return scales whose greatest is as far above one as the least is below."""
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def _error(
    weight_OI: Tensor, grid: Grid, dtype: torch.dtype, moment_II: Tensor, scale_I: Tensor
) -> Tensor:
    rounded = nearest(weight_OI * scale_I, grid, dtype, search=False, energy_I=None)
    return expected_error(weight_OI - rounded.weight() / scale_I, moment_II)
