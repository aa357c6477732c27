"""Scales of a base's neurons moved from its up projection into its down projection.

A neuron's value is linear in its up row. Divided there by s and multiplied by s where the down
projection reads it, in the base and in its members' deltas, the layer returns what it did. So a
quantiser may choose how large a column of the down projection is (``activation_aware``). Before
gate and up stands a norm, which router and shared experts read too; nothing is moved there.

Shape suffixes: F neurons of a base, E experts, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import FusedExperts


@torch.no_grad()
def scale_neurons(module: FusedExperts, group: int, scale_F: Tensor) -> None:
    """Multiply a group's columns of down by ``scale_F`` (F,), positive, and divide its up rows.

    In place, and in the dtype of the module, which rounds anew. Wrong for a gating that is not
    ``linear_in_up``.
    """
    assert module.gating.linear_in_up  # type: ignore[union-attr]
    width, base = len(scale_F), module.bases[group]
    stored: Any = base.get_submodule("gate_up_proj").weight
    up_FD, down_DF = stored[width:], base.get_submodule("down_proj").weight
    members = (module.group_of_expert == group).nonzero().flatten()
    _multiply(up_FD, 1 / scale_F.unsqueeze(-1))
    _multiply(down_DF, scale_F)
    delta: Any = module.delta
    for expert in members.tolist():
        if delta is not None:
            _multiply(delta.gate_up_b[expert, width:], 1 / scale_F.unsqueeze(-1))
            _multiply(delta.down_a[expert], scale_F)
        if module.bias is not None:
            _multiply(module.bias[expert, width:], 1 / scale_F)


def _multiply(part: Any, factor: Tensor) -> None:
    part.copy_(part.float() * factor)
