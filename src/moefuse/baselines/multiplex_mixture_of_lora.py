"""Mixture of LoRA: the full recipe of the earlier public attempt at fusing experts.

Groups of equal size by co-activation, bases by multi-SLERP, a low-rank adapter for each member,
mixed before the non-linearity by a softmax over the chosen members' routing weights, and a
projection of those weights added to the input. See ``_multiplexing_recipe`` for the table of
its variants and their names here, and ``moefuse.multiplexing`` for what it does in full.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, coactivation, multiplex
from moefuse.multiplexing.recipe import slerp_from_first

RECIPE = Recipe(slerp_from_first, coactivation, "mixture")


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
