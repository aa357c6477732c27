"""What a plan of own neurons amounts to: how much is kept, and in plain words what that is.

Where (nearly) every neuron is kept nothing is pruned and nothing shared: the student is then the
teacher with quantised experts, and whoever asked for a fused one should know.
"""

from collections import Counter
from collections.abc import Mapping
from math import floor

from moefuse.families import MoeShape
from moefuse.sizes import LayerPlan

NEARLY_ALL = 0.99
"""Share of the neurons from which on a plan that shares none is called quantisation: what it drops
is the weakest, in a forecast's spread of energies 0.004% of the energy for 1% of the neurons."""
WHOLE = "16"

Layers = Mapping[int, LayerPlan]


def kept_share(shape: MoeShape, layers: Layers) -> float | None:
    """Return the share of the teacher's neurons that experts keep, 0 to 1.

    Shared neurons do not count. None for shared bases and deltas, which keep none as they are.
    """
    own = _own(layers)
    if own is None:
        return None
    return own.total() / (len(layers) * shape.experts * shape.intermediate)


def mean_bits(layers: Layers, itemsize: int) -> float | None:
    """Return the mean bits of a number of the kept neurons, scales and codebooks not counted.

    ``itemsize`` is the bytes of a number in the checkpoint's dtype, which "16" stands for. None for
    shared bases and deltas, 0 where no neuron is kept.
    """
    own = _own(layers)
    if own is None:
        return None
    bits = sum((8 * itemsize if b == WHOLE else float(b)) * count for b, count in own.items())
    return bits / max(own.total(), 1)


def advise(shape: MoeShape, layers: Layers, itemsize: int) -> str | None:
    """Say in plain words what a plan does to the experts; None for shared bases and deltas."""
    own, kept, bits = _own(layers), kept_share(shape, layers), mean_bits(layers, itemsize)
    if own is None or kept is None or bits is None:
        return None
    only_whole = own.keys() <= {WHOLE}
    if only_whole and kept == 1:
        return "the teacher's own numbers"
    shared = max(layer.shared for layer in layers.values())
    if shared and not kept:
        return f"share: up to {shared:,} neurons a layer stand for all experts, none has its own"
    some = "every neuron is" if kept == 1 else f"{percent_kept(kept)} of the neurons are"
    told = f"{some} kept, at {bits:.1f} bits on average"
    if only_whole:
        told = f"prune: {some} kept, in the teacher's own numbers"
    elif kept >= NEARLY_ALL and not shared:
        told = f"quantise, do not fuse: {told}"
    else:
        told = f"prune and quantise: {told}"
    return f"{told}, up to {shared:,} a layer shared" if shared else told


def percent_kept(share: float) -> str:
    """Write a share of neurons as a percentage, rounded down: 100.0% are all of them."""
    tenths = floor(1000 * share)
    return f"{tenths / 10:.1f}%" if tenths or not share else "under 0.1%"


def _own(layers: Layers) -> Counter[str] | None:
    """Count the own neurons of all layers by their bits; None for shared bases and deltas."""
    own = Counter[str]()
    for layer in layers.values():
        if layer.neurons is None:
            return None
        own.update(layer.neurons)
    return own
