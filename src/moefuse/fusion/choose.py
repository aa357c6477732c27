"""The better of two ways to make bases, judged on real inputs.

Averaging aligned members is exact when nothing is lost: at full rank, with a group for every
expert, for members that are copies of each other. Where members differ, bases of important neurons
err far less. Which of the two serves a layer better is measured, not guessed.

Shape suffixes: E experts, D hidden width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.fusion.factor import factor_layer
from moefuse.fusion.neurons import fit_neurons
from moefuse.mathematics.alignment import TINY, ExpertWeights, match_all
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.sizes import LayerPlan, load_experts

JUDGED_AT_ONCE = 4096
RESEMBLANCE = 0.5
"""Cosine similarity of aligned members from which on their mean is worth trying."""


@dataclass(frozen=True)
class Factored:
    """One layer's bases and deltas: the ``state`` of a fused module, how its bases were made, and
    its relative ``error`` on tokens that it was not fitted to."""

    state: dict[str, Tensor]
    base: str
    error: float


def factor(
    experts: Experts,
    statistics: LayerStatistics,
    call: ExpertsCall,
    group_of_expert: Tensor,
    plan: LayerPlan,
    options: FactorConfig,
) -> Factored:
    """Make one layer's bases and deltas in the way that errs least.

    ``experts`` in any float dtype and ``call`` in fp32 on one device; of the call's tokens the
    first ``options.fit_tokens`` are fitted to and the others judge (the same, where there are no
    others); ``group_of_expert`` (E,) integers on that device.
    """
    fit, judge = fit_and_judge(call, options.fit_tokens)
    tried: list[Factored] = []
    for base in _worth_trying(experts, statistics, group_of_expert, plan, options):
        if base == "mean":
            state = _mean(experts, statistics, group_of_expert, plan, options)
        else:
            state = fit_neurons(experts, fit, group_of_expert, plan.rank)
        if options.bias:
            zeros = {"dtype": torch.float32, "device": experts.gate_up_EFD.device}
            state.setdefault("bias", torch.zeros(experts.gate_up_EFD.shape[:2], **zeros))
        tried.append(judged(state, base, experts, plan, judge))
    return min(tried, key=lambda factored: factored.error)


def fit_and_judge(call: ExpertsCall, fit_tokens: int) -> tuple[ExpertsCall, ExpertsCall]:
    """Return the tokens that a layer is fitted to and those that judge it: the first and the
    others, the same where there are no others."""
    fit = call.rows(slice(0, fit_tokens))
    return fit, call.rows(slice(fit_tokens, None)) if len(call.x_TD) > fit_tokens else fit


def _worth_trying(
    experts: Experts,
    statistics: LayerStatistics,
    group_of_expert: Tensor,
    plan: LayerPlan,
    options: FactorConfig,
) -> list[str]:
    """List the ways of making bases that may serve the layer.

    The mean needs a singular value decomposition of every expert, hours for a large model, and
    pays only where deltas of that rank can carry most of a matrix or where members are alike.
    """
    if options.base != "auto":
        return [options.base]
    if not options.scale:
        return ["mean"]
    _, double_intermediate, hidden = experts.gate_up_EFD.shape
    near_full = 2 * plan.rank >= min(hidden, double_intermediate)
    if near_full or plan.groups == len(experts.gate_up_EFD):
        return ["mean", "neurons"]
    alike = resemblance(experts, statistics.mass_E, group_of_expert) >= RESEMBLANCE
    return ["mean", "neurons"] if alike else ["neurons"]


def resemblance(experts: Experts, mass_E: Tensor, group_of_expert: Tensor) -> float:
    """Return the mean cosine similarity of the weights of each group's two heaviest members.

    Their neurons are aligned first; groups of one do not count, and without any larger group the
    similarity is 1.
    """
    heaviest: list[list[int]] = []
    for group in group_of_expert.unique().tolist():
        members = (group_of_expert == group).nonzero().flatten().cpu()
        order = mass_E.cpu()[members].sort(descending=True, stable=True).indices
        heaviest.append(members[order[:2]].tolist())
    norms: list[float] = []

    def pairs() -> Iterator[tuple[ExpertWeights, ExpertWeights]]:
        for members in heaviest:
            if len(members) == 2:
                one, other = (experts.weights(e).balanced() for e in members)
                norms.append(float(one.norm() * other.norm()))
                yield one, other

    alike = [inner for *_, inner in match_all(pairs())]
    cosines = [inner / max(norm, TINY) for inner, norm in zip(alike, norms, strict=True)]
    return sum(cosines) / len(cosines) if cosines else 1.0


def _mean(
    experts: Experts,
    statistics: LayerStatistics,
    group_of_expert: Tensor,
    plan: LayerPlan,
    options: FactorConfig,
) -> dict[str, Tensor]:
    device = experts.gate_up_EFD.device
    return factor_layer(
        experts,
        group_of_expert,
        statistics.mass_E.to(device),
        plan.rank,
        options,
        (statistics.moment_DD / max(statistics.tokens, 1)).to(device),
    )


def judged(
    state: dict[str, Tensor], base: str, experts: Experts, plan: LayerPlan, judge: ExpertsCall
) -> Factored:
    """Return what was made of a layer with its relative error on the tokens of ``judge``."""
    student = load_experts(state, experts, plan)
    return Factored(state, base, measure(student, judge, power_of(judge), JUDGED_AT_ONCE))
