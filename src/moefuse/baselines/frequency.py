"""Frequency: prune the experts that fewest tokens chose.

The oldest criterion, with which papers on pruning compare first; it is the hard counting of Muzio
et al., "SEER-MoE" (2024). An expert's score is the number of calibration tokens that chose it. The
router's rows of the pruned experts go with them.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._native import kept_experts
from moefuse.baselines._routing import routable_within
from moefuse.mathematics.clustering import strongest


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Keep as many experts as ``numbers`` hold, the most often chosen, ties to the lower number.

    Raises ``TooSmallError`` where they hold none, or fewer than the router can choose among.
    """
    experts = routable_within(layer, numbers)
    kept = strongest(layer.statistics.count_E, experts).sort().values
    return kept_experts(layer, kept)
