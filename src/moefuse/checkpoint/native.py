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
    if layout == ExpertsLayout():
        return weights_of(parameters)
    return weights_of(
        {
            name: torch.stack([of_one(name, one, layout) for one in stacked])
            for name, stacked in parameters.items()
        }
    )


def weights_of(parameters: Mapping[str, Tensor]) -> Weights:
    """Return parameters that are laid out as here, by their names in native modules."""
    biases = None
    if "gate_up_proj_bias" in parameters:
        biases = ExpertBiases(parameters["gate_up_proj_bias"], parameters["down_proj_bias"])
    return parameters["gate_up_proj"], parameters["down_proj"], biases


def of_one(name: str, native: Tensor, layout: ExpertsLayout) -> Tensor:
    """Return one expert's part of the native parameter ``name`` as it is laid out here: a view."""
    if layout.transposed and native.ndim == 2:
        native = native.mT
    if layout.interleaved and name.startswith("gate_up_proj"):
        return torch.cat([native[::2], native[1::2]])
    return native


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


def _taking_turns(rows: Tensor, layout: ExpertsLayout) -> Tensor:
    return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2) if layout.interleaved else rows
