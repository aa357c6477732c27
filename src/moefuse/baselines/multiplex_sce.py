"""The earlier public attempt's recipe with bases by SCE: select, calculate, erase.

See ``multiplex_mixture_of_lora`` for the rest, which is the same.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, coactivation, multiplex
from moefuse.multiplexing.recipe import sce_from_first

RECIPE = Recipe(sce_from_first, coactivation, "mixture")


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
