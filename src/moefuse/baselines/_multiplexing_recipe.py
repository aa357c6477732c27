"""How the earlier public attempt makes its fused experts: groups, bases, adapters, sizes.

The recipe of the repository moe-pruner of G. Olympie (2025), whose checkpoints are published, and
the variants that its README lists:

| its name | here |
|---|---|
| top-k pruning | ``frequency``: the experts that most tokens chose, with their rows of the router |
| activation clustering | the grouping of all ``multiplex-*`` but the next |
| state clustering | ``multiplex-output-clusters`` |
| progressive merge | ``multiplex-halving`` |
| multiplexage | ``multiplex-bases-only`` |
| fused LoRA | ``multiplex-fused-lora`` |
| mixture of LoRA | ``multiplex-mixture-of-lora``, the full recipe |
| multi-SLERP, SCE, naive averaging | the full recipe, ``multiplex-sce``, ``multiplex-mean`` |

How bases and adapters are made is told in ``moefuse.multiplexing``, which ``fuse --form
multiplexed`` makes them by as well. Not as in its code: its clusterings of the first two variants
also merge the router's rows, where here the teacher's router stays; and a single token is not
denied its adapters.

Shape suffixes: E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moefuse.baselines import Layer
from moefuse.mathematics import similarity
from moefuse.mathematics.clustering import equal_groups
from moefuse.multiplexing.recipe import RESCALE_TOKENS, Adapters, Making, Merge, build
from moefuse.multiplexing.student import MultiplexedExperts


@dataclass(frozen=True)
class Recipe:
    """A variant: how members (M, O, I) become a base (O, I), how alike experts are (E, E) fp64,
    and which adapters are added, if any."""

    merge: Merge
    affinity: Callable[[Layer], Tensor]
    adapters: Adapters | None


@dataclass(frozen=True)
class Size:
    """What a budget buys: bases, the adapters' rank, and whether the routing projection fits."""

    groups: int
    rank: int
    routed: bool


def coactivation(layer: Layer) -> Tensor:
    """Return how many tokens chose both of two experts, (E, E) fp64."""
    return layer.statistics.coactivation_EE


def output_states(layer: Layer) -> Tensor:
    """Return the mean over tokens of the cosine of two experts' outputs, (E, E) fp64."""
    return similarity.output_states(layer.experts, layer.call.x_TD)


def student_numbers(layer: Layer, size: Size, adapters: Adapters | None) -> int:
    """Count the numbers that a student of that size holds."""
    experts, double_intermediate, hidden = layer.experts.gate_up_EFD.shape
    intermediate = double_intermediate // 2
    numbers = size.groups * 3 * hidden * intermediate
    if size.routed:
        numbers += experts * hidden
    if size.rank:
        pairs = experts if adapters == "mixture" else size.groups
        numbers += pairs * 3 * size.rank * (hidden + intermediate)
        numbers += size.groups * (double_intermediate + hidden)
        numbers += 0 if adapters == "mixture" else 3 * experts * size.rank
    return numbers


def choose_size(layer: Layer, numbers: int, adapters: Adapters | None) -> Size:
    """Choose what fits ``numbers`` numbers; raises ``TooSmallError`` where no base does.

    With adapters, bases take half of the numbers and adapters of the highest rank that fits the
    rest. Without them, or where none of rank 1 fits, as many bases as fit beside the routing
    projection; where not even one does, the projection is left out.
    """
    room = layer.experts_within(numbers)
    _, double_intermediate, hidden = layer.experts.gate_up_EFD.shape

    def fits(size: Size) -> bool:
        return student_numbers(layer, size, adapters) <= numbers

    found: list[Size] = []
    if adapters:
        groups = max(1, room // 2)
        highest = min(hidden, double_intermediate // 2)
        found = [Size(groups, rank, routed=True) for rank in range(1, highest + 1)]
    fitting = [size for size in found if fits(size)]
    if not fitting:
        bare = [Size(groups, 0, routed=True) for groups in range(1, room + 1)]
        fitting = [size for size in bare if fits(size)]
    return fitting[-1] if fitting else Size(room, 0, routed=False)


@torch.no_grad()
def multiplex(layer: Layer, numbers: int, recipe: Recipe) -> MultiplexedExperts:
    """Make the student of at most ``numbers`` numbers; raises ``TooSmallError`` as told above."""
    size = choose_size(layer, numbers, recipe.adapters)
    group_of_expert = equal_groups(recipe.affinity(layer), size.groups)
    making = Making(recipe.merge, recipe.adapters, size.rank, size.routed)
    student = build(layer.experts, group_of_expert, making, layer.seed)
    student.rescale(layer.call.rows(slice(0, RESCALE_TOKENS)))
    return student
