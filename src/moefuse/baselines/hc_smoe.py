"""HC-SMoE: cluster experts by their mean outputs and merge each cluster.

Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (2024):
agglomerative clustering with average linkage on the Euclidean distance of experts' mean outputs
over the calibration text, then a mean of the members' weights, weighed by how often each is chosen.
The router stays.
"""

import torch
from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._native import MergedExperts, native_experts
from moefuse.mathematics.clustering import agglomerate
from moefuse.mathematics.similarity import mean_output_affinity


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Merge the layer's experts into as many clusters as ``numbers`` hold."""
    experts = layer.experts_within(numbers)
    statistics = layer.statistics
    cluster_E = agglomerate(mean_output_affinity(statistics.mean_output_ED), experts)
    share_EM = torch.zeros(len(cluster_E), experts, dtype=torch.float64)
    # An expert that was never chosen still counts a little, so that no cluster is empty of weight.
    share_EM[torch.arange(len(cluster_E)), cluster_E] = statistics.count_E.clamp_min(1e-6)
    share_EM = (share_EM / share_EM.sum(0)).to(layer.experts.gate_up_EFD)
    rows = torch.einsum("em,efd->mfd", share_EM, layer.experts.rows_EFD)
    down = torch.einsum("em,edf->mdf", share_EM, layer.experts.down_EDF)
    biases = layer.experts.biases
    bias = None if biases is None else share_EM.T @ biases.down_ED
    cluster_E = cluster_E.to(rows.device)
    return MergedExperts(native_experts(layer, rows, down, bias), cluster_E)
