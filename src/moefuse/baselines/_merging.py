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
    experts = layer.experts
    rows_GFD = torch.zeros_like(experts.rows_EFD[:groups])
    down_GDF = torch.zeros_like(experts.down_EDF[:groups])
    bias_GD = None if experts.biases is None else torch.zeros_like(experts.biases.down_ED[:groups])
    for expert, centre in enumerate(centre_E.tolist()):
        own = expert == centre
        weights = experts.weights(expert) if own else aligned(centre, expert)
        share = float(share_E[expert])
        rows_GFD[group_E[expert]] += share * weights.gate_up()
        down_GDF[group_E[expert]] += share * weights.down_DF
        if experts.biases is not None and bias_GD is not None:
            bias_GD[group_E[expert]] += share * experts.biases.down_ED[expert]
    native = native_experts(layer, rows_GFD, down_GDF, bias_GD)
    return MergedExperts(native, group_E.to(rows_GFD.device))
