"""NAEE: prune the experts without which the layer's output changes least.

Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts
Large Language Models" (2024), section 3.2: of all ways C to keep k of a layer's experts, take the
one that minimises || F'(x, C) - F(x) ||_F over calibration tokens x, where F is the layer's output
and F' its output with the router restricted to C, so that tokens choose again among the experts
that are left and their weights are normalised over those.

The paper tries every C, which 8 experts allow and 64 do not. Where there are more than
``ENUMERATED`` ways, experts are instead left out one at a time, each time the one that leaves the
least error (not the paper's).

Shape suffixes: T tokens, E experts, D hidden width, k experts kept, K experts chosen per token, J
slots of a difference of two routings, at most 2K.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefuse.baselines import Layer
from moefuse.baselines._native import kept_experts
from moefuse.baselines._routing import choose_among, routable_within, router_logits, spread
from moefuse.mathematics.experts import Experts

ENUMERATED = 2000
"""All ways to keep k experts are tried where there are at most so many."""
TOKENS = 1024
"""Calibration tokens that the error is measured on, at most."""
CHUNK = 64
"""Tokens whose outputs of every expert are held at once."""

Loss = Callable[[list[int]], float]


@torch.no_grad()
def compress(layer: Layer, numbers: int) -> nn.Module:
    """Keep as many experts as ``numbers`` hold, those that reconstruct the layer's output best.

    Raises ``TooSmallError`` where they hold none, or fewer than the router can choose among.
    """
    experts = routable_within(layer, numbers)
    total = len(layer.experts.gate_up_EFD)
    if experts == total:
        return kept_experts(layer, torch.arange(total))
    loss = partial(reconstruction_loss, sample_outputs(layer))
    few = math.comb(total, experts) <= ENUMERATED
    kept = (best_subset if few else greedy_subset)(loss, total, experts)
    return kept_experts(layer, torch.tensor(kept))


def best_subset(loss: Loss, total: int, experts: int) -> list[int]:
    """Return the ``experts`` of ``total`` experts of least loss, every way tried, ascending."""
    ways = (list(way) for way in itertools.combinations(range(total), experts))
    return min(ways, key=loss)


def greedy_subset(loss: Loss, total: int, experts: int) -> list[int]:
    """Leave out one expert after the other, each time the one without which the loss is least."""
    kept = list(range(total))
    while len(kept) > experts:
        ways = ([other for other in kept if other != expert] for expert in kept)
        kept = min(ways, key=loss)
    return kept


@dataclass(frozen=True)
class SampledOutputs:
    """What the loss of any subset of a layer's experts follows from.

    ``gram_TEE`` (T, E, E) fp32 holds the inner products of the outputs of every two experts for one
    token, ``logits_TE`` (T, E) fp32 the router's, ``index_TK`` int64 and ``weight_TK`` fp32 (T, K)
    the teacher's routing.
    """

    layer: Layer
    gram_TEE: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def sample_outputs(layer: Layer) -> SampledOutputs:
    """Run every expert of a layer once on its recorded tokens, chosen or not."""
    call = spread(layer.call, TOKENS)
    return SampledOutputs(
        layer,
        torch.cat([_gram(layer.experts, x_TD) for x_TD in call.x_TD.split(CHUNK)]),
        router_logits(layer, call.x_TD),
        call.index_TK.long(),
        call.weight_TK,
    )


def reconstruction_loss(sampled: SampledOutputs, kept: list[int]) -> float:
    """Return ||F'(x) - F(x)||^2 over the sampled tokens when only the experts ``kept`` are left.

    The difference of two routed outputs is a sum over experts of output times difference of
    weights, d, so its squared norm is d^T G d with G the outputs' inner products: what a trial
    costs does not depend on the widths D and F.
    """
    among = torch.tensor(kept, device=sampled.logits_TE.device)
    index_TK, weight_TK = choose_among(sampled.layer, sampled.logits_TE, among)
    index_TJ = torch.cat([index_TK, sampled.index_TK], dim=1)
    d_TJ = torch.cat([weight_TK, -sampled.weight_TK], dim=1)
    tokens, experts, _ = sampled.gram_TEE.shape
    first_row_T = torch.arange(0, tokens * experts, experts, device=index_TJ.device)
    # A bag of rows of G for each token is the fastest way to G d when d is mostly zeros.
    product_TE = F.embedding_bag(
        first_row_T[:, None] + index_TJ,
        sampled.gram_TEE.flatten(0, 1),
        per_sample_weights=d_TJ,
        mode="sum",
    )
    return float((product_TE.gather(1, index_TJ) * d_TJ).sum())


def _gram(experts: Experts, x_TD: Tensor) -> Tensor:
    count = len(experts.gate_up_EFD)
    output_TED = torch.stack([experts.run(expert, x_TD) for expert in range(count)], dim=1)
    return output_TED @ output_TED.transpose(1, 2)
