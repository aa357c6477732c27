"""The better of two ways to make bases, judged on real inputs.

Averaging aligned members is exact when nothing is lost: at full rank, with a group for every
expert, for members that are copies of each other. Where members differ, bases of important neurons
err far less. Which of the two serves a layer better is measured, not guessed.

Shape suffixes: E experts, D hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.errors import UserError
from moefuse.fusion.factor import factor_layer
from moefuse.fusion.neurons import fit_neurons
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.sizes import LayerPlan, load_experts

FIT_ROUNDS = 1
"""More rounds of gains and down projections were measured to change the third digit only."""
JUDGED_AT_ONCE = 4096


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

    ``experts`` and ``call`` in fp32 on one device; of the call's tokens the first
    ``options.fit_tokens`` are fitted to and the others judge (the same, where there are no others);
    ``group_of_expert`` (E,) integers on that device. Raises ``UserError`` for neurons without
    scales.
    """
    if options.base == "neurons" and not options.scale:
        raise UserError("--base neurons needs scales; leave out --no-scale or choose --base mean.")
    tokens = len(call.x_TD)
    fit = call.rows(slice(0, options.fit_tokens))
    judge = call.rows(slice(options.fit_tokens, None)) if tokens > options.fit_tokens else fit
    tried: list[Factored] = []
    for base in ("mean", "neurons"):
        if options.base in ("auto", base) and (options.scale or base == "mean"):
            state = (
                _mean(experts, statistics, group_of_expert, plan, options)
                if base == "mean"
                else fit_neurons(experts, fit, group_of_expert, plan.rank, FIT_ROUNDS)
            )
            if options.bias:
                state.setdefault("bias", torch.zeros_like(experts.gate_up_EFD[..., 0]))
            tried.append(_judged(state, base, experts, plan, judge))
    return min(tried, key=lambda factored: factored.error)


def _mean(
    experts: Experts,
    statistics: LayerStatistics,
    group_of_expert: Tensor,
    plan: LayerPlan,
    options: FactorConfig,
) -> dict[str, Tensor]:
    device = experts.gate_up_EFD.device
    return factor_layer(
        experts.gate_up_EFD,
        experts.down_EDF,
        group_of_expert,
        statistics.mass_E.to(device),
        plan.rank,
        options,
        (statistics.moment_DD / max(statistics.tokens, 1)).to(device),
    )


def _judged(
    state: dict[str, Tensor], base: str, experts: Experts, plan: LayerPlan, judge: ExpertsCall
) -> Factored:
    student = load_experts(state, experts, plan)
    return Factored(state, base, measure(student, judge, power_of(judge), JUDGED_AT_ONCE))
