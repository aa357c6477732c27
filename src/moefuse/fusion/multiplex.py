"""Bases and adapters of one layer by the recipe of the checkpoints published in 2025.

What is made is the release's own (see ``moefuse.multiplexing``) and not what this library holds for
good: it is for whoever wants its words, and for comparison. Its adapters start at a tenth of what
their bases return and are distilled like any others.
"""

import torch
from torch import Tensor

from moefuse.config import FactorConfig, GroupConfig, merge_of
from moefuse.fusion.choose import Factored, fit_and_judge, judged
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.multiplexing.halving import PAIR_MERGES, halve
from moefuse.multiplexing.recipe import (
    MERGES,
    RESCALE_TOKENS,
    Adapters,
    Making,
    Merge,
    build,
    with_adapters,
)
from moefuse.multiplexing.soup import greedy_members
from moefuse.multiplexing.stored import stored_state
from moefuse.multiplexing.student import MultiplexedExperts
from moefuse.sizes import LayerPlan

ADAPTERS: dict[str, Adapters] = {"multiplexed_mixture": "mixture", "multiplexed_lora": "lora"}
"""The recipe's adapters by the kind of delta that a plan names."""


def multiplex(
    experts: Experts,
    statistics: LayerStatistics,
    call: ExpertsCall,
    group_of_expert: Tensor,
    plan: LayerPlan,
    options: FactorConfig,
    grouping: GroupConfig,
    seed: int,
) -> Factored:
    """Make one layer's multiplexed experts.

    ``experts`` in any float dtype and ``call`` in fp32 on one device; of the call's tokens the
    first ``options.fit_tokens`` are made use of and the others judge (the same, where there are no
    others); ``group_of_expert`` (E,) integers on that device, of no account to halving. What starts
    as random numbers follows from ``seed``.
    """
    fit, judge = fit_and_judge(call, options.fit_tokens)
    merge = merge_of(grouping, options)
    making = Making(MERGES[merge], ADAPTERS[plan.delta], plan.rank)

    def kept(members_M: Tensor) -> Tensor:
        return greedy_members(experts, members_M, statistics.count_E, fit)

    if grouping.progressive:
        student = _halved(experts, fit, making, plan.groups, PAIR_MERGES[merge], seed)
    else:
        student = build(experts, group_of_expert, making, seed, kept if merge == "greedy" else None)
    student.rescale(fit.rows(slice(0, RESCALE_TOKENS)))
    return judged(stored_state(student), merge, experts, plan, judge)


def _halved(
    experts: Experts,
    fit: ExpertsCall,
    making: Making,
    groups: int,
    merge: Merge,
    seed: int,
) -> MultiplexedExperts:
    """Halve, and give what is left adapters for what members are beside their trained bases."""
    bare = halve(experts, fit, groups, seed, merge=merge)
    generator = torch.Generator().manual_seed(seed)
    adapted = [with_adapters(group, experts, making, generator) for group in bare.listed()]
    return MultiplexedExperts(adapted)
