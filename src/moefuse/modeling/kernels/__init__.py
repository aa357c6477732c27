"""Which way the fused experts are computed: by Triton, grouped products, a CPU's way, or plainly.

``MOEFUSE_KERNELS`` in the environment, or ``use``, says which:

- ``auto`` (default): on a GPU, where they can, Triton if no gradient is wanted and grouped products
  if one is (bfloat16, from Hopper on); on a CPU its own way if no gradient is wanted; else plainly.
- ``triton``: Triton or an error that says why not. Gradients are those of the plain way, which is
  computed anew for them.
- ``grouped``: PyTorch's grouped products, with gradients, or an error that says why not.
- ``cpu``: the CPU's way, without gradients, or an error that says why not.
- ``plain``: PyTorch alone, as a checkpoint's own file has it.

``offered`` is this package's entry point ``moefuse.kernels``, by which the modelling file of a
checkpoint finds it without importing moefuse.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefuse.errors import UserError
from moefuse.modeling.kernels import cpu_path, grouped_path
from moefuse.modeling.kernels.installed import INSTALLED, INTERPRETED

SETTINGS = ("auto", "triton", "grouped", "cpu", "plain")

if INSTALLED or TYPE_CHECKING:
    from moefuse.modeling.kernels import repeating, triton_path


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

    Raises ``UserError`` where a way is asked for by name and cannot be had.
    """
    if _setting == "plain":
        return None
    if INSTALLED and _setting in ("auto", "triton") and _without_gradients_or_casts(x_TD):
        y_TD = repeating.repeated(module, (x_TD, index_TK, weight_TK))
        if y_TD is not None:
            return y_TD
    wanted = _wants_gradients(module, x_TD, weight_TK)
    way = _best_way(x_TD, wanted=wanted) if _setting == "auto" else _setting
    why_not = None if way == "plain" else _obstacle(way, module, x_TD, wanted=wanted)
    if why_not is not None and _setting != "auto":
        raise UserError(f"MOEFUSE_KERNELS is '{_setting}', but {why_not}.")
    if way == "plain" or why_not is not None:
        return None
    if way == "triton":
        return triton_path.forward(module, x_TD, index_TK, weight_TK, with_gradients=wanted)
    forward: Any = cpu_path.forward if way == "cpu" else grouped_path.forward
    return forward(module, x_TD, index_TK, weight_TK)


def _without_gradients_or_casts(x_TD: Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x_TD.device.type)


def _best_way(x_TD: Tensor, *, wanted: bool) -> str:
    """Name the way that ``auto`` takes if nothing is in its way; ``wanted``: gradients."""
    if x_TD.is_cuda:
        if not wanted:
            return "triton"
        return "grouped" if grouped_path.pays(x_TD) else "plain"
    return "cpu" if x_TD.device.type == "cpu" and not wanted else "plain"


def _obstacle(way: str, module: Any, x_TD: Tensor, *, wanted: bool) -> str | None:
    if way == "grouped":
        return grouped_path.obstacle(module, x_TD)
    if way == "cpu":
        return "gradients are wanted" if wanted else cpu_path.obstacle(module, x_TD)
    return obstacle(module, x_TD)


def _wants_gradients(module: Any, *given: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*given, *module.parameters()))
