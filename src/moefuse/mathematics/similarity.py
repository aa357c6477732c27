"""How alike two experts are: by when they are chosen, by what they return, by their weights.

Shape suffixes: E experts, S sampled tokens, D hidden width, F neurons.
"""

import torch
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights, match_neurons

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


def weight_affinity(experts: list[ExpertWeights]) -> Tensor:
    """Cosine similarity of aligned weights, (E, E): every pair's neurons are matched first."""
    count = len(experts)
    norms = [expert.flat().norm().clamp_min(TINY) for expert in experts]
    affinity_EE = torch.eye(count, dtype=torch.float64)
    for first in range(count):
        for second in range(first + 1, count):
            matched = experts[second].permuted(*match_neurons(experts[first], experts[second]))
            inner = experts[first].flat() @ matched.flat()
            cosine = (inner / (norms[first] * norms[second])).double()
            affinity_EE[first, second] = affinity_EE[second, first] = cosine
    return affinity_EE
