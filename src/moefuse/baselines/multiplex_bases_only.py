"""Multiplexage alone: the earlier public attempt's recipe without adapters.

Of a member's own there is only its column of the projection of the routing weights that is added to
a group's input. All of the budget goes to bases.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, coactivation, multiplex
from moefuse.multiplexing.recipe import slerp_from_first

RECIPE = Recipe(slerp_from_first, coactivation, None)


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
