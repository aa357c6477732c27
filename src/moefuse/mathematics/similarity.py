"""How alike two experts are: by when they are chosen, by what they return, by their weights.

Shape suffixes: E experts, S sampled tokens, D hidden width, F neurons.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights, match_all

TINY = 1e-12


def coactivation_affinity(coactivation_EE: Tensor) -> Tensor:
    """Normalise co-activation counts: how often two experts serve one token, (E, E) in [0, 1].

    ``coactivation_EE`` counts tokens that chose both; its diagonal counts tokens that chose each.
    The count is divided by the geometric mean of the two experts' own.
    """
    own_E = coactivation_EE.diagonal().double().clamp_min(1.0)
    return coactivation_EE.double() / (own_E[:, None] * own_E[None, :]).sqrt()


def output_affinity(outputs_ESD: Tensor) -> Tensor:
    """Cosine similarity of what experts return for the same tokens, (E, E) in [-1, 1]."""
    flat = outputs_ESD.flatten(1).double()
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(TINY)
    return unit @ unit.T


def mean_output_affinity(mean_output_ED: Tensor) -> Tensor:
    """Negative Euclidean distance of experts' mean outputs, (E, E), as HC-SMoE clusters by."""
    return -torch.cdist(mean_output_ED.double(), mean_output_ED.double())


def weight_affinity(experts: Sequence[ExpertWeights]) -> Tensor:
    """Cosine similarity of aligned weights, (E, E): every pair's neurons are matched first.

    The similarity of matched neurons is the sum of their inner products, so nothing needs to be
    permuted. ``experts`` may make each expert's weights when it is asked for.
    """
    norms = [float(expert.norm().clamp_min(TINY)) for expert in experts]
    places = list(combinations(range(len(experts)), 2))
    affinity_EE = torch.eye(len(experts), dtype=torch.float64)
    for (one, other), (*_, inner) in zip(places, match_all(_pairs(experts)), strict=True):
        cosine = inner / (norms[one] * norms[other])
        affinity_EE[one, other] = affinity_EE[other, one] = cosine
    return affinity_EE


def _pairs(experts: Sequence[ExpertWeights]) -> Iterator[tuple[ExpertWeights, ExpertWeights]]:
    for number, one in enumerate(experts):
        yield from ((one, experts[other]) for other in range(number + 1, len(experts)))
