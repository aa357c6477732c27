"""Progressive merge: halve the number of bases again and again, with training in between.

The earlier public attempt's README lists it among its variants; ``moefuse.multiplexing.halving``
tells how it is done. Pairs are merged by SCE. After the last halving the student is left as it is,
for the arena to distil as any other. All of the budget goes to bases, as in
``multiplex_bases_only``.
"""

from torch import nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing_recipe import choose_size
from moefuse.multiplexing.halving import halve


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Halve the layer's experts until they are a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    size = choose_size(layer, numbers, None)
    return halve(layer.experts, layer.call, size.groups, layer.seed, routed=size.routed)
