"""What can be measured of one layer's experts without training a student.

Shape suffixes: T tokens, N rows of one expert, M members of a group, E experts, F neurons, D hidden
width, O outputs and I inputs of a matrix.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from moefuse.fusion.factor import align_group, weighted_mean
from moefuse.fusion.neurons import rows_of_expert
from moefuse.mathematics.alignment import ExpertWeights, match_neurons
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import student_output
from moefuse.mathematics.lowrank import symmetric_root

AT_ONCE = 4096
TINY = 1e-30


def ranks_up_to(full: int) -> list[int]:
    """Return 0, the powers of two below ``full``, and ``full``."""
    return [0, *(2**power for power in range(full.bit_length()) if 2**power < full), full]


def energy_left(
    delta_MOI: Tensor, whole_MOI: Tensor, ranks: Sequence[int], root_II: Tensor | None = None
) -> list[float]:
    """Return the share of a matrix's energy that its delta's best approximation of every rank
    leaves: the squared singular values beyond the rank over ``|W|^2``, a mean over members.

    ``root_II`` (I, I) or (M, I, I), the root of the inputs' second moment, makes it the energy of
    outputs. Members without any energy do not count.
    """
    if root_II is not None:
        delta_MOI, whole_MOI = delta_MOI @ root_II, whole_MOI @ root_II
    energy_M = whole_MOI.square().sum((-2, -1))
    counted_M = energy_M > TINY
    value_MR = torch.linalg.svdvals(delta_MOI[counted_M]).square()
    left = [value_MR[:, rank:].sum(-1) / energy_M[counted_M] for rank in ranks]
    return [float(share_M.mean()) for share_M in left]


def members_and_mean(
    experts: Sequence[ExpertWeights], group_of_expert: Tensor, mass_E: Tensor, *, aligned: bool
) -> tuple[list[ExpertWeights], list[ExpertWeights]]:
    """Return every expert, its neurons in its group's order if ``aligned``, and the mean of its
    group by routed mass; each neuron's up row and down column have equal norms."""
    balanced = [expert.balanced() for expert in experts]
    means = list(balanced)
    for group in group_of_expert.unique().tolist():
        members = (group_of_expert == group).nonzero().flatten().tolist()
        weight_M = mass_E[members].float().clamp_min(1e-3 * float(mass_E.mean()) or 1.0)
        weight_M = weight_M / weight_M.sum()
        found = [balanced[expert] for expert in members]
        if aligned and len(found) > 1:
            found = align_group(found, weight_M)
        mean = weighted_mean(found, weight_M)
        for expert, weights in zip(members, found, strict=True):
            balanced[expert], means[expert] = weights, mean
    return balanced, means


def down_roots(weights: Sequence[ExpertWeights], layer: Experts, call: ExpertsCall) -> Tensor:
    """Return the root of the second moment of what reaches every expert's down projection, times
    its routing weight: (E, F, F)."""
    roots = []
    for expert, one in enumerate(weights):
        token_N, weight_N1 = rows_of_expert(call, expert)
        x_ND = call.x_TD[token_N]
        z_NF = layer.gating(x_ND @ one.gate_FD.T, x_ND @ one.up_FD.T) * weight_N1
        moment_FF = z_NF.T @ z_NF / max(len(token_N), 1)
        roots.append(symmetric_root(moment_FF.double())[0].float())
    return torch.stack(roots)


def cosines(first: ExpertWeights, second: ExpertWeights) -> Tensor:
    """Return the cosine similarity of each neuron of one expert with the same of another, (F,),
    under the better of the two signs (see ``mathematics.alignment``)."""
    signed_F = (first.up_FD * second.up_FD).sum(1) + (first.down_DF * second.down_DF).sum(0)
    inner_F = (first.gate_FD * second.gate_FD).sum(1) + signed_F.abs()
    return inner_F / (_norms(first) * _norms(second)).clamp_min(TINY)


def _norms(expert: ExpertWeights) -> Tensor:
    parts = (expert.gate_FD, expert.up_FD, expert.down_DF.T)
    return torch.cat(parts, dim=1).norm(dim=1)


def shuffled(expert: ExpertWeights, generator: torch.Generator) -> ExpertWeights:
    """Return neurons that nothing was learnt by: every coordinate keeps its values, but each in
    another order of the neurons."""

    def columns(matrix_FD: Tensor) -> Tensor:
        order_FD = torch.rand(matrix_FD.shape, generator=generator).argsort(0)
        return matrix_FD.gather(0, order_FD.to(matrix_FD.device))

    return ExpertWeights(
        columns(expert.gate_FD), columns(expert.up_FD), columns(expert.down_DF.T).T
    )


def similarities(
    experts: Sequence[ExpertWeights], pairs: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return cosine similarities of neurons of at most ``pairs`` random pairs of experts: of best
    matched neurons, of neurons in random order, and of best matched neurons after ``shuffled``,
    which is what matching finds where there is nothing to find."""
    every = list(combinations(range(len(experts)), 2))
    chosen = torch.randperm(len(every), generator=generator)[:pairs].tolist()
    found: dict[str, list[Tensor]] = {"matched": [], "random order": [], "matched, shuffled": []}
    for first, second in (every[number] for number in chosen):
        one, other = experts[first].balanced(), experts[second].balanced()
        order_F = torch.randperm(len(other.gate_FD), generator=generator)
        found["random order"].append(cosines(one, other.permuted(order_F.to(one.gate_FD.device))))
        for name, compared in (
            ("matched", other),
            ("matched, shuffled", shuffled(other, generator)),
        ):
            order_F, _ = match_neurons(one, compared)
            found[name].append(cosines(one, compared.permuted(order_F)))
    return {name: torch.cat(parts).cpu() for name, parts in found.items()}


def shares(energy_N: Tensor, tops: Sequence[float]) -> list[float]:
    """Return the share of all energy that the ``tops`` shares of greatest neurons hold."""
    sorted_N = energy_N.double().flatten().sort(descending=True).values
    total = max(float(sorted_N.sum()), TINY)
    return [float(sorted_N[: max(1, round(top * len(sorted_N)))].sum()) / total for top in tops]


@torch.no_grad()
def errors(student: nn.Module, call: ExpertsCall, root_DD: Tensor) -> tuple[float, float]:
    """Return a student's relative squared error over all tokens of ``call``: plain, and seen
    through ``root_DD`` (D, D), the root of what the logits feel. 1 is no better than zeros."""
    sums_4 = torch.zeros(4, dtype=torch.float64, device=call.x_TD.device)
    for rows in torch.arange(len(call.x_TD), device=call.x_TD.device).split(AT_ONCE):
        part = call.rows(rows)
        error_TD, y_TD = student_output(student, part) - part.y_TD, part.y_TD
        seen = (error_TD, y_TD, error_TD @ root_DD, y_TD @ root_DD)
        sums_4 += torch.stack([tensor.double().square().sum() for tensor in seen])
    wrong, power, felt_wrong, felt_power = sums_4.tolist()
    return wrong / max(power, TINY), felt_wrong / max(felt_power, TINY)
