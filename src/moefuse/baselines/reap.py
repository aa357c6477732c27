"""REAP: prune the experts that add least, by routing weight times output norm.

Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression" (2025). The
score of an expert is the mean, over the tokens routed to it, of its routing weight times the norm
of its output; the router's rows of the pruned experts go with them.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._native import kept_experts
from moefuse.baselines._routing import routable_within


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Keep as many experts as ``numbers`` hold, those of highest score, in their order."""
    experts = routable_within(layer, numbers)
    score_E = layer.statistics.mean_weighted_norm_E
    kept = score_E.sort(descending=True, stable=True).indices[:experts].sort().values
    return kept_experts(layer, kept)
