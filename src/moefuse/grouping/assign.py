"""Group: which experts of a layer share a base.

Each way of grouping is an affinity and a clustering (see ``mathematics``):

- ``output``: experts that return alike, by agglomerative clustering;
- ``hierarchical``: the same on mean outputs alone, as HC-SMoE does;
- ``coactivation``: experts chosen for the same tokens;
- ``weight``: experts whose weights are alike once their neurons are matched;
- ``dominant``: the experts of greatest mass are centres, the others join the most alike output;
- ``state``: experts whose outputs for the same tokens are alike, token by token;
- ``topk``: the experts chosen most often are centres, the others join the one that they were chosen
  together with most often.

Multiplexed experts have ``coactivation``, ``state`` and ``topk`` alone, of which the first two then
make groups of equal size, or of sizes one apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics import clustering, similarity
from moefuse.mathematics.alignment import Members
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.statistics import LayerStatistics

Grouping = Callable[[LayerStatistics, Any, int], Tensor]
"""From statistics, experts that were looked at and a number of groups to ``group_of_expert``."""


@dataclass(frozen=True)
class Seen:
    """A layer's ``experts`` and, where outputs are to be compared, tokens ``x_SD`` fp32."""

    experts: Experts
    x_SD: Tensor | None = None

    def states(self) -> Tensor:
        """Return how alike outputs are token by token, (E, E) fp64."""
        assert self.x_SD is not None
        return similarity.output_states(self.experts, self.x_SD)


def _coactivation(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.coactivation_affinity(statistics.coactivation_EE)
    return clustering.agglomerate(affinity_EE, groups)


def _output(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.output_affinity(statistics.mean_output_ED)
    return clustering.agglomerate(affinity_EE, groups)


def _hierarchical(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.mean_output_affinity(statistics.mean_output_ED)
    return clustering.agglomerate(affinity_EE, groups)


def _weight(_: LayerStatistics, seen: Seen, groups: int) -> Tensor:
    experts = seen.experts
    count = len(experts.gate_up_EFD)
    balanced = Members(count, lambda expert: experts.weights(expert).balanced())
    affinity_EE = similarity.weight_affinity(balanced)
    return clustering.agglomerate(affinity_EE, groups)


def _dominant(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.output_affinity(statistics.mean_output_ED)
    return clustering.join_centres(affinity_EE, clustering.strongest(statistics.mass_E, groups))


def _state(_: LayerStatistics, seen: Seen, groups: int) -> Tensor:
    return clustering.agglomerate(seen.states(), groups)


def _topk(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    centres = clustering.strongest(statistics.count_E, groups)
    return clustering.join_centres(statistics.coactivation_EE, centres)


def _equal_coactivation(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    return clustering.equal_groups(statistics.coactivation_EE, groups)


def _equal_state(_: LayerStatistics, seen: Seen, groups: int) -> Tensor:
    return clustering.equal_groups(seen.states(), groups)


GROUPINGS: dict[str, Grouping] = {
    "coactivation": _coactivation,
    "output": _output,
    "weight": _weight,
    "hierarchical": _hierarchical,
    "dominant": _dominant,
    "state": _state,
    "topk": _topk,
}
RECIPE_GROUPINGS: dict[str, Grouping] = {
    "coactivation": _equal_coactivation,
    "state": _equal_state,
    "topk": _topk,
}
"""The ways of the recipe of 2025, as it groups."""
BY_WEIGHTS = frozenset({"weight", "state"})
"""Ways that look at the experts' weights."""


def group_layer(
    statistics: LayerStatistics,
    experts: Experts | None,
    groups: int,
    grouping: str,
    *,
    x_SD: Tensor | None = None,
    multiplexed: bool = False,
) -> Tensor:
    """Return ``group_of_expert`` (E,) int64, every number below ``groups`` used at least once.

    ``experts`` may be None for a way that is not in ``BY_WEIGHTS``; ``x_SD`` are tokens that the
    layer received, fp32, which ``state`` alone needs.

    Raises ``UserError`` for an unknown way of grouping.
    """
    known = RECIPE_GROUPINGS if multiplexed else GROUPINGS
    if grouping not in known:
        raise UserError(f"--grouping is {grouping!r}; choose from {', '.join(known)}.")
    seen = None if experts is None else Seen(experts, x_SD)
    group_of_expert = known[grouping](statistics, seen, groups)
    assert len(torch.unique(group_of_expert)) == groups
    return group_of_expert
