"""The earlier public attempt's recipe with bases by the plain mean of members, unaligned.

See ``multiplex_mixture_of_lora`` for the rest, which is the same.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, coactivation, multiplex
from moefuse.mathematics.merging import mean_merge

RECIPE = Recipe(mean_merge, coactivation, "mixture")


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
