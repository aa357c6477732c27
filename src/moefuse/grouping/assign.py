"""Group: which experts of a layer share a base.

Each way of grouping is an affinity and a clustering (see ``mathematics``):

- ``output``: experts that return alike, by agglomerative clustering;
- ``hierarchical``: the same on mean outputs alone, as HC-SMoE does;
- ``coactivation``: experts chosen for the same tokens;
- ``weight``: experts whose weights are alike once their neurons are matched;
- ``dominant``: the experts of greatest mass are centres, the others join the most alike output.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics import clustering, similarity
from moefuse.mathematics.alignment import Members
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.statistics import LayerStatistics

Grouping = Callable[[LayerStatistics, Any, int], Tensor]


def _coactivation(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.coactivation_affinity(statistics.coactivation_EE)
    return clustering.agglomerate(affinity_EE, groups)


def _output(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.output_affinity(statistics.mean_output_ED)
    return clustering.agglomerate(affinity_EE, groups)


def _hierarchical(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.mean_output_affinity(statistics.mean_output_ED)
    return clustering.agglomerate(affinity_EE, groups)


def _weight(_: LayerStatistics, experts: Experts, groups: int) -> Tensor:
    count = len(experts.gate_up_EFD)
    balanced = Members(count, lambda expert: experts.weights(expert).balanced())
    affinity_EE = similarity.weight_affinity(balanced)
    return clustering.agglomerate(affinity_EE, groups)


def _dominant(statistics: LayerStatistics, _: Any, groups: int) -> Tensor:
    affinity_EE = similarity.output_affinity(statistics.mean_output_ED)
    return clustering.join_centres(affinity_EE, clustering.strongest(statistics.mass_E, groups))


GROUPINGS: dict[str, Grouping] = {
    "coactivation": _coactivation,
    "output": _output,
    "weight": _weight,
    "hierarchical": _hierarchical,
    "dominant": _dominant,
}
BY_WEIGHTS = frozenset({"weight"})
"""Ways that look at the experts' weights."""


def group_layer(
    statistics: LayerStatistics, experts: Experts | None, groups: int, grouping: str
) -> Tensor:
    """Return ``group_of_expert`` (E,) int64, every number below ``groups`` used at least once.

    ``experts`` may be None for a way that is not in ``BY_WEIGHTS``.

    Raises ``UserError`` for an unknown way of grouping.
    """
    if grouping not in GROUPINGS:
        raise UserError(f"--grouping is {grouping!r}; choose from {', '.join(GROUPINGS)}.")
    group_of_expert = GROUPINGS[grouping](statistics, experts, groups)
    assert len(torch.unique(group_of_expert)) == groups
    return group_of_expert
