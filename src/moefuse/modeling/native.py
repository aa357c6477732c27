"""The native experts of a Transformers model, as everything here computes with them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moefuse.checkpoint.native import from_native
from moefuse.families import Family
from moefuse.mathematics.experts import Experts
from moefuse.modeling.modeling_moefuse import gating_of


def experts_of(native: nn.Module, family: Family, config: Mapping[str, Any]) -> Experts:
    """Return the routed experts of a native experts module, in its dtype and on its device.

    ``config`` is the teacher's ``config.json``. Nothing is copied that is laid out as here already.
    """
    parameters = {name: parameter.data for name, parameter in native.named_parameters()}
    gate_up_EFD, down_EDF, biases = from_native(parameters, family.layout)
    return Experts(gate_up_EFD, down_EDF, gating_of(native, family.gating(config)), biases)
