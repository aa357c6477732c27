"""The earlier public attempt's recipe with experts grouped by their output states.

Experts are alike by the cosine of what they return for the same tokens, averaged over tokens, in
place of how often they are chosen together. See ``multiplex_mixture_of_lora`` for the rest.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, multiplex, output_states
from moefuse.multiplexing.recipe import slerp_from_first

RECIPE = Recipe(slerp_from_first, output_states, "mixture")


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
