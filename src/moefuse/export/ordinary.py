"""A fused layer's experts as ordinary ones: three matrices each, nothing shared.

An expert of a group is its base with the scale on the rows and the delta added; an expert of own
neurons is those and the shared neurons, their gains in the down projection::

    gate_up_e = s_e * Wgu_g + Bgu_e Agu_e        down_e = Wd_g + Bd_e Ad_e
    down_e[:, shared f] = gain_ef * down_f

Both are exact but for the rounding of the dtype. Multiplexed experts are what they are when a token
chooses no other member of their group, without the shift of their input: a beginning, not the same
function. In families whose experts have biases an expert
has its own, and so has each of its neurons; elsewhere an ordinary expert has none, and a student's
are lost.

Shape suffixes: E experts, F neurons of an ordinary expert, D hidden width, O own neurons, S shared.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import (
    FACTORS,
    FusedExperts,
    MaskedDelta,
    MixtureDelta,
    MultiplexedExperts,
    NeuronExperts,
)

Ordinary = tuple[Tensor, Tensor, Tensor | None]
"""``gate_up`` (2F, D), gate first, ``down`` (D, F) and, where there is one, the bias of ``gate_up``
(2F,) of one expert, fp32."""
Parts = tuple[Tensor, Tensor, Tensor | None]
"""Gate and up, (2, F, D), down, (D, F), and biases, (2, F)."""


@torch.no_grad()
def ordinary_experts(module: FusedExperts | NeuronExperts, width: int) -> Iterator[Ordinary]:
    """Yield a layer's experts in order, each filled up with zeros to ``width`` neurons.

    Neurons of zeros add nothing. Who must not lose a bias that the family has none of asks before.
    """
    experts = _parts(module)
    pad = torch.nn.functional.pad
    for gate_up_PFD, down_DF, bias_PF in experts:
        missing = width - down_DF.shape[1]
        assert missing >= 0
        rows_FD = pad(gate_up_PFD, (0, 0, 0, missing)).flatten(0, 1)
        bias_F = None if bias_PF is None else pad(bias_PF, (0, missing)).flatten()
        yield rows_FD, pad(down_DF, (0, missing)), bias_F


def _parts(module: FusedExperts | NeuronExperts) -> Iterator[Parts]:
    if isinstance(module, MultiplexedExperts):
        return _of_multiplexed(module)
    return _of_groups(module) if isinstance(module, FusedExperts) else _of_neurons(module)


def widest(module: FusedExperts | NeuronExperts) -> int:
    """Return how many neurons the largest of a layer's experts has as an ordinary one."""
    if isinstance(module, FusedExperts):
        return module.bases[0].down_proj.in_features  # type: ignore[union-attr, return-value]
    shared = 0 if module.gain is None else module.gain.read(0, 1).shape[-1]  # type: ignore[operator]
    return int(module.widths.sum(0).max()) + shared if module.widths.numel() else shared


def _of_groups(module: FusedExperts) -> Iterator[Parts]:
    # Taken once, because deltas of few bits are decoded each time.
    factors = [] if module.delta is None else [getattr(module.delta, name) for name in FACTORS]
    for expert, group in enumerate(module.group_of_expert.tolist()):
        base: Any = module.bases[group]
        gate_up_FD, down_DF = base.gate_up_proj.weight.float(), base.down_proj.weight.float()
        if module.scale is not None:
            gate_up_FD = gate_up_FD * module.scale[expert].float().unsqueeze(-1)
        if factors:
            up_a_RD, up_b_FR, down_a_RF, down_b_DR = (factor[expert].float() for factor in factors)
            gate_up_FD = gate_up_FD + up_b_FR @ up_a_RD
            down_DF = down_DF + down_b_DR @ down_a_RF
        bias_PF = None if module.bias is None else module.bias[expert].float().unflatten(0, (2, -1))
        yield gate_up_FD.unflatten(0, (2, -1)), down_DF, bias_PF


def _of_multiplexed(module: MultiplexedExperts) -> Iterator[Parts]:
    delta: Any = module.delta
    for expert, group in enumerate(module.group_of_expert.tolist()):
        base: Any = module.bases[group]
        own = [_alone(adapter, expert, group) for adapter in (delta.gate, delta.up, delta.down)]
        gate_up_PFD = base.gate_up_proj.weight.float().unflatten(0, (2, -1))
        yield gate_up_PFD + torch.stack(own[:2]), base.down_proj.weight.float() + own[2], None


def _alone(adapter: MixtureDelta | MaskedDelta, expert: int, group: int) -> Tensor:
    """Return what an adapter adds to a projection for a member that is chosen alone, (O, I)."""
    if isinstance(adapter, MixtureDelta):
        return adapter.b[expert].float() @ adapter.a[expert].float()
    masked_OR = adapter.b[group].float() * adapter.mask[expert].float()
    return masked_OR @ adapter.a[group].float()


def _of_neurons(module: NeuronExperts) -> Iterator[Parts]:
    own: Any = module.own
    starts = [0] * len(own)
    for expert in range(module.num_experts):
        widths = module.widths[:, expert].tolist()
        spans = [slice(at, at + width) for at, width in zip(starts, widths, strict=True)]
        starts = [span.stop for span in spans]
        rows = [own[name].read(at.start, at.stop) for name, at in zip(own, spans, strict=True)]
        rows_3FD = torch.cat([part.float() for part in rows] + _shared(module, expert), 1)
        yield rows_3FD[:2], rows_3FD[2].T, _biases(module, spans)


def _biases(module: NeuronExperts, spans: list[slice]) -> Tensor | None:
    """Return the biases of an expert's neurons, own ones first: (2, F)."""
    own: Any = module.own_bias
    shared: Any = module.shared_bias
    if own is None:
        return None
    parts = [rows.read(at.start, at.stop) for rows, at in zip(own.values(), spans, strict=True)]
    parts += [] if shared is None else [shared.read(0, None)]
    return torch.cat(parts, 1).squeeze(-1).float()


def _shared(module: NeuronExperts, expert: int) -> list[Tensor]:
    """Return the shared neurons as they are in one expert, (3, S, D), if there are any."""
    shared: Any = module.shared
    gain: Any = module.gain
    if shared is None:
        return []
    gate_SD, up_SD, down_SD = shared.read(0, None).float().unbind(0)
    gain_S = gain.read(expert, expert + 1)[0, 0].float()
    return [torch.stack([gate_SD, up_SD, down_SD * gain_S.unsqueeze(-1)])]
