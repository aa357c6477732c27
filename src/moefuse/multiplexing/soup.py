"""Greedy merge: a base is the mean of those members only that make it better.

A greedy soup (Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time", 2022, recipe 1), one for each group: members
are averaged in one at a time, in the order of how often they were chosen, and each is kept only
where that lowers the error of the group's output on calibration tokens. Neurons are not aligned.

Shape suffixes: T tokens, P tokens that chose any of a group, E experts, M members of the group,
D hidden width.
"""

import torch
from torch import Tensor

from moefuse.mathematics.experts import ExpertBiases, Experts, ExpertsCall
from moefuse.mathematics.merging import mean_merge
from moefuse.modeling.modeling_moefuse import weight_of_experts
from moefuse.multiplexing.recipe import members_of


@torch.no_grad()
def greedy_members(
    experts: Experts, members_M: Tensor, count_E: Tensor, call: ExpertsCall
) -> Tensor:
    """Return the members, in the order in which they were taken, whose mean is the group's base.

    ``members_M`` are experts' numbers, ``count_E`` how many tokens chose each expert; ``call`` in
    fp32. The most chosen member is always among them, and of a group that no token of ``call``
    chose it is the only one.
    """
    weight_TM = weight_of_experts(call.index_TK, call.weight_TK, len(experts.gate_up_EFD))
    weight_TM = weight_TM[:, members_M]
    token_P = weight_TM.sum(1).nonzero().flatten()
    x_PD, weight_PM = call.x_TD.float()[token_P], weight_TM[token_P]
    target_PD = _output(experts, members_M, x_PD, weight_PM)
    weight_P1 = weight_PM.sum(1, keepdim=True)
    order_M = count_E.to(members_M.device)[members_M].sort(descending=True, stable=True).indices
    kept, least = members_M[:0], float("inf")
    for member in members_M[order_M]:
        tried = torch.cat([kept, member[None]])
        mean = _mean_expert(experts, tried)
        error = float((weight_P1 * mean.run(0, x_PD) - target_PD).square().sum())
        if error < least:
            kept, least = tried, error
    return kept


def _output(experts: Experts, members_M: Tensor, x_PD: Tensor, weight_PM: Tensor) -> Tensor:
    """Return what the members add to the layer's output, (P, D)."""
    y_PD = torch.zeros_like(x_PD)
    for place, expert in enumerate(members_M.tolist()):
        row = weight_PM[:, place].nonzero().flatten()
        own = weight_PM[row, place, None] * experts.run(expert, x_PD[row])
        y_PD = y_PD.index_add(0, row, own)
    return y_PD


def _mean_expert(experts: Experts, members: Tensor) -> Experts:
    """Return the plain mean of some experts, as the only one of a layer."""
    found = members_of(experts, members)
    biases = found.biases
    if biases is not None:
        gate_up_EF, down_ED = (mean_merge(b)[None] for b in (biases.gate_up_EF, biases.down_ED))
        biases = ExpertBiases(gate_up_EF, down_ED)
    gate_up_EFD, down_EDF = (mean_merge(w)[None] for w in (found.gate_up_EFD, found.down_EDF))
    return Experts(gate_up_EFD, down_EDF, experts.gating, biases)
