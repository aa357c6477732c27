"""How alike two experts are: by when they are chosen, by what they return, by their weights.

Shape suffixes: E experts, S sampled tokens, C of them at a time, D hidden width, F neurons.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights, match_all
from moefuse.mathematics.experts import Experts

TINY = 1e-12
STATE_TOKENS = 256
"""Calibration tokens that outputs are compared on token by token, at most."""
CHUNK = 32
"""Tokens whose outputs of every expert are held at once."""


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


def output_states(experts: Experts, x_SD: Tensor) -> Tensor:
    """Return the mean over tokens of the cosine of two experts' outputs, (E, E) fp64.

    ``x_SD`` fp32 are the tokens; more than ``STATE_TOKENS`` are not looked at.
    """
    count = len(experts.gate_up_EFD)

    def run(x_CD: Tensor) -> Tensor:
        return torch.stack([experts.run(expert, x_CD) for expert in range(count)])

    return mean_cosine(run, x_SD[:STATE_TOKENS])


def mean_cosine(run: Callable[[Tensor], Tensor], x_SD: Tensor) -> Tensor:
    """Return the mean over tokens of the cosine of every two outputs, fp64 on the CPU.

    ``run`` maps tokens (C, D) to all outputs for them, (E, C, D).
    """
    total_EE = 0.0
    for x_CD in x_SD.split(CHUNK):
        output_ECD = run(x_CD).double()
        unit_ECD = output_ECD / output_ECD.norm(dim=-1, keepdim=True).clamp_min(TINY)
        total_EE = total_EE + torch.einsum("ecd,fcd->ef", unit_ECD, unit_ECD)
    return torch.as_tensor(total_EE / len(x_SD)).cpu()


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
