"""From an affinity between experts to groups of experts.

Every function takes an affinity (E, E), symmetric, higher meaning more alike, and returns
``group_of_expert`` (E,) int64 with every number below ``groups`` used at least once. Groups may be
of unequal size. Group 0 is the one that holds the lowest-numbered expert, and so on, so that the
same partition always has the same numbers.
"""

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor


def canonical(group_of_expert: Tensor) -> Tensor:
    """Renumber groups in the order in which experts first meet them."""
    numbers: dict[int, int] = {}
    renumbered = [numbers.setdefault(int(group), len(numbers)) for group in group_of_expert]
    return torch.tensor(renumbered, dtype=torch.int64)


def agglomerate(affinity_EE: Tensor, groups: int, *, method: str = "average") -> Tensor:
    """Merge the two most alike clusters until ``groups`` are left (scipy's linkage)."""
    experts = affinity_EE.shape[0]
    if groups == experts:
        return torch.arange(experts)
    affinity = affinity_EE.double().cpu().numpy()
    distance = affinity.max() - (affinity + affinity.T) / 2
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method=method)
    return canonical(torch.as_tensor(cut_tree(tree, n_clusters=groups)[:, 0]))


def join_centres(affinity_EE: Tensor, centres: Tensor) -> Tensor:
    """Let every expert join the centre it is most alike to; ``centres`` (G,) expert numbers."""
    group_of_expert = affinity_EE[:, centres].argmax(dim=1)
    group_of_expert[centres] = torch.arange(len(centres), device=group_of_expert.device)
    return canonical(group_of_expert)


def strongest(mass_E: Tensor, groups: int) -> Tensor:
    """Return the ``groups`` experts of greatest routed mass, ties to the lower number."""
    return mass_E.sort(descending=True, stable=True).indices[:groups]


def equal_groups(affinity_EE: Tensor, groups: int) -> Tensor:
    """Divide experts into groups of equal size, or of sizes one apart, the most alike first.

    A group starts at an expert of the most alike pair that is left and takes the expert most alike
    to its members, summed, until it is full. Returns ``group_of_expert`` (E,) int64.
    """
    experts = len(affinity_EE)
    alike_EE = affinity_EE.double().clone().fill_diagonal_(-torch.inf)
    left_E = torch.ones(experts, dtype=torch.bool)
    group_of_expert = torch.empty(experts, dtype=torch.int64)
    for group in range(groups):
        members: list[int] = []
        for _ in range(experts // groups + (group < experts % groups)):
            members.append(_next_member(alike_EE, left_E, members))
            left_E[members[-1]] = False
        group_of_expert[members] = group
    return canonical(group_of_expert)


def _next_member(alike_EE: Tensor, left_E: Tensor, members: list[int]) -> int:
    if members:
        score_E = alike_EE[members].sum(0)
    else:
        score_E = alike_EE.masked_fill(~left_E, -torch.inf).max(1).values
    candidates = left_E.nonzero().flatten()
    return int(candidates[score_E[candidates].argmax()])
