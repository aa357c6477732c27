"""Fused LoRA: the earlier public attempt's recipe with one low-rank adapter for a whole group.

Its rank is gated, direction by direction, by a projection of the members' routing weights; the kind
``lora`` of the published checkpoints. Sharing one pair of factors buys a far higher rank.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import Recipe, coactivation, multiplex
from moefuse.multiplexing.recipe import slerp_from_first

RECIPE = Recipe(slerp_from_first, coactivation, "lora")


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Fuse the layer's experts into a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    return multiplex(layer, numbers, RECIPE)
