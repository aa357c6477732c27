"""What "equal to float error" means in every test: one tolerance for fp32, one for bf16."""

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import PlainGating

SILU = PlainGating(torch.nn.functional.silu)
"""What joins gate and up in most families."""

FP32 = 1e-4
# bf16 keeps 8 bits: one rounding is up to 2^-9 = 0.002 of a value. A fused layer rounds about ten
# times between input and output and sums K of such values, in another order than the reference.
BF16 = 3e-2


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = FP32) -> None:
    """Compare to ``tolerance`` of the greatest value expected; zeros must be exactly zero."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    scale = float(expected.detach().double().abs().max())
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert error <= tolerance * scale, f"off by {error:.3g} where the greatest value is {scale:.3g}"
