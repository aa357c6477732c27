"""Merging experts into a few of them, called centres, with neurons in the centre's order."""

from collections.abc import Callable

import torch
from torch import Tensor

from moefuse.baselines import Layer
from moefuse.baselines._native import MergedExperts, native_experts
from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.clustering import canonical

Aligner = Callable[[int, int], ExpertWeights]
"""From the numbers of a centre and of another expert to that expert's weights, aligned."""


def expert_weights(layer: Layer, expert: int) -> ExpertWeights:
    """Return one expert of the layer."""
    return layer.experts.weights(expert)


def merge_into_centres(
    layer: Layer, centre_E: Tensor, weight_E: Tensor, aligned: Aligner
) -> MergedExperts:
    """Replace every group of experts by the weighted mean of its aligned members.

    ``centre_E`` (E,) int64 names each expert's centre (itself, for a centre), ``weight_E`` (E,)
    positive is what a member counts relative to the others of its group. The router stays: it
    chooses among all E experts as before and what it chooses is looked up.
    """
    group_E = canonical(centre_E)
    share_E = weight_E / torch.zeros_like(weight_E).index_add(0, group_E, weight_E)[group_E]
    groups = int(group_E.max()) + 1
    gate_up_GFD = torch.zeros_like(layer.experts.gate_up_EFD[:groups])
    down_GDF = torch.zeros_like(layer.experts.down_EDF[:groups])
    for expert, centre in enumerate(centre_E.tolist()):
        own = expert == centre
        weights = expert_weights(layer, expert) if own else aligned(centre, expert)
        share = float(share_E[expert])
        gate_up_GFD[group_E[expert]] += share * weights.gate_up()
        down_GDF[group_E[expert]] += share * weights.down_DF
    native = native_experts(layer, gate_up_GFD, down_GDF)
    return MergedExperts(native, group_E.to(gate_up_GFD.device))
