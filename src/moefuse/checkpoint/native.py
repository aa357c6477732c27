"""Experts as Transformers' modules hold them, and as everything here computes with them.

A family's ``layout`` says how its experts module lays its parameters out. Here gate and up are
always stacked, gate first, and matrices map from right to left.

Shape suffixes: E experts, D hidden width, F neurons of an expert.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moefuse.families import ExpertsLayout
from moefuse.mathematics.experts import ExpertBiases

Weights = tuple[Tensor, Tensor, ExpertBiases | None]
"""Gate and up (E, 2F, D), gate first, down (E, D, F), and the biases where there are any."""


def from_native(parameters: Mapping[str, Tensor], layout: ExpertsLayout) -> Weights:
    """Return the weights of native experts, by the names of the module's parameters.

    What is laid out as here already is not copied.
    """
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if layout.transposed:
        gate_up, down = gate_up.mT, down.mT
    biases = None
    if layout.biased:
        gate_up_bias = _gate_first(parameters["gate_up_proj_bias"], layout)
        biases = ExpertBiases(gate_up_bias, parameters["down_proj_bias"])
    return _gate_first(gate_up, layout).contiguous(), down.contiguous(), biases


def to_native(weights: Weights, layout: ExpertsLayout) -> dict[str, Tensor]:
    """Return what ``from_native`` was given."""
    gate_up, down, biases = weights
    gate_up = _taking_turns(gate_up, layout)
    if layout.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    if layout.biased:
        assert biases is not None
        parameters["gate_up_proj_bias"] = _taking_turns(biases.gate_up_EF, layout)
        parameters["down_proj_bias"] = biases.down_ED
    return parameters


def _gate_first(rows: Tensor, layout: ExpertsLayout) -> Tensor:
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1) if layout.interleaved else rows


def _taking_turns(rows: Tensor, layout: ExpertsLayout) -> Tensor:
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2) if layout.interleaved else rows
