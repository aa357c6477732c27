"""Which way the fused experts are computed: by Triton's kernels, or plainly.

``MOEFUSE_KERNELS`` in the environment, or ``use``, says which:

- ``auto`` (default): Triton on a GPU where it is installed and no gradient is wanted, else plainly.
- ``triton``: Triton or an error that says why not. Gradients are those of the plain way, which is
  computed anew for them.
- ``plain``: PyTorch alone.

``offered`` is this package's entry point ``moefuse.kernels``, by which the modelling file of a
checkpoint finds it without importing moefuse.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefuse.errors import UserError

SETTINGS = ("auto", "triton", "plain")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = find_spec("triton") is not None and (torch.cuda.is_available() or INTERPRETED)

if INSTALLED or TYPE_CHECKING:
    from moefuse.modeling.kernels import triton_path


def use(setting: str) -> None:
    """Choose the way from now on: one of ``SETTINGS``. Raises ``UserError`` for any other."""
    global _setting  # noqa: PLW0603
    if setting not in SETTINGS:
        raise UserError(f"MOEFUSE_KERNELS is '{setting}'; choose from {', '.join(SETTINGS)}.")
    _setting = setting


_setting = "auto"
use(os.environ.get("MOEFUSE_KERNELS", "auto"))


def obstacle(module: Any, x_TD: Tensor) -> str | None:
    """Say what keeps Triton's kernels from computing ``module`` for ``x_TD``, if anything does."""
    if not INSTALLED:
        return "Triton needs its package and a CUDA GPU (or TRITON_INTERPRET=1)"
    if not (x_TD.is_cuda or INTERPRETED):
        return f"the input is on {x_TD.device.type}"
    return triton_path.obstacle(module, x_TD)


def offered(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
    """Return the fused experts' output, (T, D), or None where the plain way is the way.

    Raises ``UserError`` where Triton is asked for and cannot be had.
    """
    if _setting == "plain" or (_setting == "auto" and not x_TD.is_cuda):
        return None
    why_not = obstacle(module, x_TD)
    if _setting == "triton" and why_not is not None:
        raise UserError(f"MOEFUSE_KERNELS is 'triton', but {why_not}.")
    wanted = _wants_gradients(module, x_TD, weight_TK)
    if why_not is not None or (_setting == "auto" and wanted):
        return None
    return triton_path.forward(module, x_TD, index_TK, weight_TK, with_gradients=wanted)


def _wants_gradients(module: Any, *given: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*given, *module.parameters()))
