"""REAM: merge what REAP would prune into the experts that it would keep.

Jha et al., "REAM: Merging Improves Pruning of Experts in LLMs" (2026, arXiv 2604.04356), as its
authors' published code does it:

1. an expert's saliency is its REAP score (see ``reap``); one that no token chose gets the least
   score of the others; the most salient experts are the centres;
2. two experts' similarity is the mean of two numbers in [0, 1]: (1 + cosine) / 2 of their mean
   gated outputs over calibration tokens, every expert run on every token and weighed by the
   router's weight for it, chosen or not; and 1 - d / max d, where d is the Euclidean distance of
   their router logits over those tokens, scaled to unit length;
3. "pseudo-pruning": the centres, most salient first, each take the most similar experts that are
   left, up to ``GROUP`` experts in a group, so that a few groups are large, dominated by their
   centre, and most centres stay alone;
4. a member's neurons are put in the order of the centre's by linear assignment on the sum of two
   Euclidean distances: of the neurons' activations over calibration tokens and of their weights
   (gate row, up row and down column), both scaled to unit length;
5. a group becomes the mean of its members' weights, weighed by saliency.

Not as in the paper: the router stays, and what it chooses is looked up, where the paper drops its
rows of all experts but the centres; layers do not see the merging of the layers below; weights are
compared in full, where the authors' code first projects them to 64 dimensions. Groups grow beyond
``GROUP`` where the experts would not fit otherwise (the authors' code refuses).

Shape suffixes: S sampled tokens, E experts, D hidden width, F neurons.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from moefuse.baselines import Layer
from moefuse.baselines._merging import merge_into_centres
from moefuse.baselines._routing import all_gates, router_logits, spread
from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.clustering import strongest
from moefuse.mathematics.similarity import output_affinity

GROUP = 16
"""Experts in a group, at most: the paper's C."""
TOKENS = 2048
"""Calibration tokens that experts and neurons are compared on, at most."""
TINY = 1e-12


@torch.no_grad()
def compress(layer: Layer, numbers: int) -> nn.Module:
    """Merge the layer's experts into as many as ``numbers`` hold.

    Raises ``TooSmallError`` where they hold none.
    """
    experts = layer.experts_within(numbers)
    saliency_E = saliency(layer.statistics.mean_weighted_norm_E)
    x_SD = spread(layer.call, TOKENS).x_TD
    centre_E = pseudo_prune(similarity(layer, x_SD), strongest(saliency_E, experts))

    def aligned(centre: int, member: int) -> ExpertWeights:
        weights = layer.experts.weights(member)
        return weights.permuted(match_neurons(layer, x_SD, centre, member))

    return merge_into_centres(layer, centre_E, saliency_E, aligned)


def saliency(score_E: Tensor) -> Tensor:
    """Return REAP's scores (E,) fp64, those of experts never routed raised to the least other."""
    positive = score_E[score_E > 0]
    return score_E.clamp_min(float(positive.min()) if len(positive) else 1.0)


def similarity(layer: Layer, x_SD: Tensor) -> Tensor:
    """Return how alike experts' gated outputs and router logits are, (E, E) fp64 in [0, 1]."""
    logits_SE = router_logits(layer, x_SD)
    gates_SE = all_gates(layer, logits_SE)
    gated = [_mean_output(layer, e, x_SD, gate_S) for e, gate_S in enumerate(gates_SE.T)]
    outputs_EE = (1 + output_affinity(torch.stack(gated))) / 2
    unit_ES = _unit(logits_SE.T.double())
    distance_EE = torch.cdist(unit_ES, unit_ES)
    logits_EE = 1 - distance_EE / distance_EE.max().clamp_min(TINY)
    return ((outputs_EE + logits_EE) / 2).cpu()


def pseudo_prune(similarity_EE: Tensor, centres: Tensor) -> Tensor:
    """Give every expert a centre: the first of ``centres`` takes first, up to ``GROUP`` in all.

    Returns (E,) int64, a centre's own number for itself. Ties go to the lower number.
    """
    experts = len(similarity_EE)
    room = max(GROUP, math.ceil(experts / len(centres))) - 1
    centre_E = torch.full((experts,), -1)
    centre_E[centres] = centres
    for centre in centres:
        left = (centre_E < 0).nonzero().flatten()
        nearest = similarity_EE[centre, left].sort(descending=True, stable=True).indices
        centre_E[left[nearest[:room]]] = centre
    return centre_E


def match_neurons(layer: Layer, x_SD: Tensor, centre: int, member: int) -> Tensor:
    """Return the order (F,) int64 that puts ``member``'s neurons next to those of ``centre``."""
    cost_FF = torch.zeros(())
    for described in (_activations, _neurons):
        first, second = (_unit(described(layer, expert, x_SD)) for expert in (centre, member))
        cost_FF = torch.cdist(first, second).cpu() + cost_FF
    _, columns = linear_sum_assignment(cost_FF.numpy())
    return torch.as_tensor(columns, device=x_SD.device)


def _mean_output(layer: Layer, expert: int, x_SD: Tensor, gate_S: Tensor) -> Tensor:
    # The down projection is linear, so that the mean may be taken before it.
    mean_F = _activations(layer, expert, x_SD) @ gate_S / len(gate_S)
    mean_D = layer.experts.down_EDF[expert] @ mean_F
    biases = layer.experts.biases
    return mean_D if biases is None else mean_D + biases.down_ED[expert] * gate_S.mean()


def _activations(layer: Layer, expert: int, x_SD: Tensor) -> Tensor:
    """Return what one expert's neurons give its down projection, (F, S)."""
    return layer.experts.neurons(expert, x_SD).T


def _neurons(layer: Layer, expert: int, x_SD: Tensor) -> Tensor:  # noqa: ARG001
    """Return all weights of each neuron of one expert, (F, 3D), two biases more if it has any."""
    weights = layer.experts.weights(expert)
    return torch.cat([weights.gate_FD, weights.up_FD, weights.down_DF.T], dim=1)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)
