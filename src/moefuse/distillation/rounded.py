"""A fused layer whose rounded bases and whose deltas learn what the layer was before.

The errors of rounding are as many as a base has numbers, and a delta of low rank can carry but few
of them, so that no closed form of it helps much. What helps is to choose again which way each
number is rounded, together with the scales and the deltas, by the error of the layer's output on
real inputs (Nagel et al., "Up or Down?", 2020; Cheng et al., "AutoRound", 2023). The number that
is rounded learns by the gradient of its code, straight through (Bengio et al., 2013).

Shape suffixes: O outputs, I inputs, G groups of a row, N numbers of a group.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.config import DistillConfig
from moefuse.distillation.loop import DistillResult, distill_layer
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.integers import Grid, Rounded
from moefuse.modeling.modeling_moefuse import FusedExperts
from moefuse.modeling.training import TrainedLowRankDelta

SCALE_STEP = 0.5
"""How much of itself a scale changes by where a number moves by a whole code; both learn at one
rate."""


class LearntRounding(nn.Module):
    """A linear layer on a grid: ``latent`` (O, G, N) in units of each group's scale, rounded in
    every step, and ``scale`` (O, G, 1), how many times ``SCALE_STEP`` the scales that it began with
    have grown."""

    start_OG1: Tensor

    def __init__(self, weight_OI: Tensor, rounded: Rounded, grid: Grid) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.grid, self.dtype = grid, rounded.scale_OG.dtype
        start_OG1 = rounded.scale_OG.float().unsqueeze(-1)
        self.register_buffer("start_OG1", start_OG1)
        codes_OGN = rounded.codes_OI.view(*rounded.scale_OG.shape, -1)
        wanted_OGN = weight_OI.float().view_as(codes_OGN) / torch.where(
            start_OG1 == 0, torch.ones_like(start_OG1), start_OG1
        )
        # Where rounding was not to the nearest it begins at the code that was chosen.
        place_OGN = wanted_OGN.clamp(codes_OGN - 0.49, codes_OGN + 0.49)
        self.latent = nn.Parameter(place_OGN)
        self.scale = nn.Parameter(torch.zeros_like(start_OG1))

    @property
    def weight(self) -> Tensor:
        """The numbers that the codes stand for in this step, (O, I)."""
        low, high = -(2 ** (self.grid.bits - 1)), 2 ** (self.grid.bits - 1) - 1
        inside_OGN = self.latent.clamp(low - 0.5, high + 0.5)
        codes_OGN = self.latent.detach().round().clamp(low, high)
        through_OGN = codes_OGN + (inside_OGN - inside_OGN.detach())
        return (through_OGN * self._scale_OG1()).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply rows (..., I) by what is rounded in this step, (..., O)."""
        return nn.functional.linear(x, self.weight)

    def _scale_OG1(self) -> Tensor:
        return self.start_OG1 * (1 + SCALE_STEP * self.scale)

    @torch.no_grad()
    def wanted(self) -> Tensor:
        """Return the numbers that were rounded, as they were learnt, (O, I) on the CPU: what a
        layer that learns on begins with."""
        return (self.latent * self._scale_OG1()).flatten(1).cpu()

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """Return what was learnt as it will be stored, on the CPU."""
        low, high = -(2 ** (self.grid.bits - 1)), 2 ** (self.grid.bits - 1) - 1
        codes_OGN = self.latent.round().clamp(low, high)
        scale_OG = self._scale_OG1().squeeze(-1).to(self.dtype)
        return Rounded(codes_OGN.flatten(1).cpu(), scale_OG.cpu())


def refit_layer(
    module: FusedExperts,
    rounded: Mapping[str, Rounded] | Mapping[str, Tensor],
    grid: Grid | None,
    call: ExpertsCall,
    options: DistillConfig,
    *,
    delta: TrainedLowRankDelta | None = None,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> tuple[dict[str, LearntRounding], dict[str, Tensor], DistillResult]:
    """Let a layer with rounded bases learn what ``module``, the same before, returns.

    ``module`` and ``call`` in fp32 and on one device; what ``call`` says of outputs does not count.
    ``rounded`` are the bases by names such as ``bases.3.down_proj``: on a ``grid`` they learn too,
    without one or as weights (O, I) they stay. ``delta`` are the module's deltas at few bits, if
    they are to be. Returns those that learnt, the module's tensors beside bases, fp32 and on the
    CPU, and how far it came.
    """
    call = replace(call, y_TD=_outputs(module, call, options.batch_tokens))
    student, device = deepcopy(module), call.x_TD.device
    student.bases.requires_grad_(False)
    student.delta = student.delta if delta is None else delta.to(device)
    learning: dict[str, LearntRounding] = {}
    for name, base in rounded.items():
        stem, _, projection = name.rpartition(".")
        linear: Any = student.get_submodule(name)
        if isinstance(base, Rounded) and grid is not None:
            learning[name] = LearntRounding(linear.weight.detach().cpu(), base, grid).to(device)
            setattr(student.get_submodule(stem), projection, learning[name])
        else:
            linear.weight.copy_(base.weight() if isinstance(base, Rounded) else base)
    result = distill_layer(student, call, options, seed=seed, progress=progress)
    if delta is not None:
        student.delta = delta.packed()
    state = student.state_dict()
    rest = {name: t.cpu() for name, t in state.items() if not name.startswith("bases.")}
    return learning, rest, result


@torch.no_grad()
def _outputs(module: FusedExperts, call: ExpertsCall, batch_tokens: int) -> Tensor:
    parts = [call.rows(rows) for rows in torch.arange(len(call.x_TD)).split(batch_tokens)]
    return torch.cat([module(part.x_TD, part.index_TK.long(), part.weight_TK) for part in parts])
