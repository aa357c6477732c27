"""A fused layer's experts as ordinary ones: three matrices each, nothing shared.

An expert of a group is its base with the scale on the rows and the delta added; an expert of own
neurons is those and the shared neurons, their gains in the down projection::

    gate_up_e = s_e * Wgu_g + Bgu_e Agu_e        down_e = Wd_g + Bd_e Ad_e
    down_e[:, shared f] = gain_ef * down_f

Both are exact but for the rounding of the dtype. A bias is not: an ordinary expert has none.

Shape suffixes: E experts, F neurons of an ordinary expert, D hidden width, O own neurons, S shared.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import FusedExperts, NeuronExperts

Ordinary = tuple[Tensor, Tensor]
"""``gate_up`` (2F, D), gate first, and ``down`` (D, F) of one expert, fp32."""


@torch.no_grad()
def ordinary_experts(module: FusedExperts | NeuronExperts, width: int) -> Iterator[Ordinary]:
    """Yield a layer's experts in order, each filled up with zeros to ``width`` neurons.

    Neurons of zeros add nothing. A bias is left out; who must not lose it asks before.
    """
    experts = _of_groups(module) if isinstance(module, FusedExperts) else _of_neurons(module)
    for gate_FD, up_FD, down_DF in experts:
        missing = width - len(gate_FD)
        assert missing >= 0
        rows = [torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (gate_FD, up_FD)]
        yield torch.cat(rows), torch.nn.functional.pad(down_DF, (0, missing))


def widest(module: FusedExperts | NeuronExperts) -> int:
    """Return how many neurons the largest of a layer's experts has as an ordinary one."""
    if isinstance(module, FusedExperts):
        return module.bases[0].down_proj.in_features  # type: ignore[union-attr, return-value]
    shared = 0 if module.gain is None else module.gain.read(0, 1).shape[-1]  # type: ignore[operator]
    return int(module.widths.sum(0).max()) + shared if module.widths.numel() else shared


def _of_groups(module: FusedExperts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    delta: Any = module.delta
    for expert, group in enumerate(module.group_of_expert.tolist()):
        base: Any = module.bases[group]
        gate_up_FD, down_DF = base.gate_up_proj.weight.float(), base.down_proj.weight.float()
        if module.scale is not None:
            gate_up_FD = gate_up_FD * module.scale[expert].float().unsqueeze(-1)
        if delta is not None:
            down_b_DR, gate_up_b_FR = delta.down_b[expert].float(), delta.gate_up_b[expert].float()
            gate_up_FD = gate_up_FD + gate_up_b_FR @ delta.gate_up_a[expert].float()
            down_DF = down_DF + down_b_DR @ delta.down_a[expert].float()
        gate_FD, up_FD = gate_up_FD.chunk(2)
        yield gate_FD, up_FD, down_DF


def _of_neurons(module: NeuronExperts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    own: Any = list(module.own.values())
    starts = [0] * len(own)
    for expert in range(module.num_experts):
        widths = module.widths[:, expert].tolist()
        spans = [
            rows.read(start, start + width).float()
            for rows, start, width in zip(own, starts, widths, strict=True)
        ]
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
        gate_FD, up_FD, down_FD = torch.cat([*spans, *_shared(module, expert)], 1).unbind(0)
        yield gate_FD, up_FD, down_FD.T


def _shared(module: NeuronExperts, expert: int) -> list[Tensor]:
    """Return the shared neurons as they are in one expert, (3, S, D), if there are any."""
    shared: Any = module.shared
    gain: Any = module.gain
    if shared is None:
        return []
    gate_SD, up_SD, down_SD = shared.read(0, None).float().unbind(0)
    gain_S = gain.read(expert, expert + 1)[0, 0].float()
    return [torch.stack([gate_SD, up_SD, down_SD * gain_S.unsqueeze(-1)])]
