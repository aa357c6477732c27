"""Bases and deltas of one layer in closed form, before any training.

Within a group the members' neurons are aligned, then base and deltas are found by alternating: the
base is the mean of what the deltas leave, weighted by routed mass, and the deltas are the best
low-rank approximation of what the base leaves. Each half step lowers

    sum over members e of  p_e |(W_e - W_base - B_e A_e) S^(1/2)|^2

with ``S`` the (damped) second moment of the inputs; the identity by default, because raw second
moments are dominated by a few directions (design, section 4).

One group's members are in fp32 at a time, aligned one by one, whatever the layer's own dtype.

Shape suffixes: E experts, M members of a group, O outputs, I inputs, D hidden width, F neurons,
R rank.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.mathematics.alignment import ExpertWeights, Members, match_all
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.lowrank import damped, low_rank, symmetric_root

MATRICES = ("gate_FD", "up_FD", "down_DF")
MASS_FLOOR = 1e-3
"""Share of the mean mass that an expert counts for at least, so that none is forgotten."""


def align_group(members: Sequence[ExpertWeights], weight_M: Tensor) -> Members:
    """Match all members' neurons: first to the heaviest member's, then to the group's mean."""
    balanced = Members(len(members), lambda member: members[member].balanced())
    aligned = _matched(balanced[int(weight_M.argmax())], balanced)
    return _matched(weighted_mean(aligned, weight_M), aligned)


def _matched(reference: ExpertWeights, members: Members) -> Members:
    found = [match[:2] for match in match_all((reference, member) for member in members)]
    return Members(len(members), lambda member: members[member].permuted(*found[member]))


def weighted_mean(members: Sequence[ExpertWeights], weight_M: Tensor) -> ExpertWeights:
    """Return the mean of experts' weights; ``weight_M`` (M,) sums to one."""
    parts = {name: torch.zeros_like(getattr(members[0], name)) for name in MATRICES}
    for member, weight in zip(members, weight_M, strict=True):
        for name, mean in parts.items():
            mean.addcmul_(weight.to(mean.dtype), getattr(member, name))
    return replace(members[0], **parts)


def factor_matrices(
    matrix_MOI: Tensor,
    weight_M: Tensor,
    rank: int,
    options: FactorConfig,
    moment_II: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split matrices into a common base and a low-rank delta each.

    ``weight_M`` (M,) sums to one; ``moment_II`` (I, I) is the second moment of the inputs, used
    when ``options.damping`` is below 1. Returns ``base_OI``, ``b_MOR`` and ``a_MRI``.
    """
    inverse_II, dtype = None, matrix_MOI.dtype
    if moment_II is not None and options.damping < 1:
        # In fp64: the inverse root magnifies rounding where inputs have next to no energy.
        root_II, inverse_II = symmetric_root(damped(moment_II.double(), options.damping))
        matrix_MOI, weight_M = matrix_MOI.double() @ root_II, weight_M.double()
    mean_OI = base_OI = torch.tensordot(weight_M, matrix_MOI, dims=1)
    b_MOR, a_MRI = _deltas(matrix_MOI, base_OI, rank)
    for _ in range(options.alternations if rank and len(matrix_MOI) > 1 else 0):
        base_OI = mean_OI.clone()
        for weight, b_OR, a_RI in zip(weight_M, b_MOR, a_MRI, strict=True):
            base_OI -= weight * b_OR @ a_RI
        b_MOR, a_MRI = _deltas(matrix_MOI, base_OI, rank)
    if inverse_II is not None:
        base_OI, a_MRI = base_OI @ inverse_II, a_MRI @ inverse_II
    return base_OI.to(dtype), b_MOR.to(dtype), a_MRI.to(dtype)


def _deltas(matrix_MOI: Tensor, base_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Approach what the base leaves of every matrix, one after the other."""
    pairs = [low_rank(matrix_OI - base_OI, rank) for matrix_OI in matrix_MOI]
    return torch.stack([b_OR for b_OR, _ in pairs]), torch.stack([a_RI for _, a_RI in pairs])


def factor_layer(
    layer: Experts,
    group_of_expert: Tensor,
    mass_E: Tensor,
    rank: int,
    options: FactorConfig,
    moment_DD: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the state of a ``FusedExperts`` module, fp32, for one layer.

    ``layer`` has the experts; ``group_of_expert`` is (E,) integers; ``mass_E`` (E,) routed mass;
    ``rank`` R of every delta; ``moment_DD`` (D, D) second moment of the layer's input. Biases that
    the experts have stay as they are.
    """
    experts, double_intermediate, hidden = layer.gate_up_EFD.shape
    zeros = {"dtype": torch.float32, "device": layer.gate_up_EFD.device}
    down_rank = min(rank, hidden, double_intermediate // 2)
    state = {
        "delta.gate_up_a": torch.zeros(experts, rank, hidden, **zeros),
        "delta.gate_up_b": torch.zeros(experts, double_intermediate, rank, **zeros),
        "delta.down_a": torch.zeros(experts, down_rank, double_intermediate // 2, **zeros),
        "delta.down_b": torch.zeros(experts, hidden, down_rank, **zeros),
    }
    if options.scale:
        state["scale"] = torch.ones(experts, double_intermediate, **zeros)
    if options.bias or layer.biases is not None:
        state["bias"] = torch.zeros(experts, double_intermediate, **zeros)
    if layer.biases is not None:
        state["down_bias"] = layer.biases.down_ED.to(torch.float32, copy=True)
    if not options.routed_mass:
        mass_E = torch.ones_like(mass_E)
    floor = MASS_FLOOR * float(mass_E.mean()) or 1.0
    for group in range(int(group_of_expert.max()) + 1):
        members = (group_of_expert == group).nonzero().flatten()
        weight_M = mass_E[members].clamp_min(floor).to(**zeros)
        weight_M = weight_M / weight_M.sum()
        experts_M = _members(layer, members.tolist())
        if options.align and len(experts_M) > 1:
            experts_M = align_group(experts_M, weight_M)
        moment = None if moment_DD is None else moment_DD.to(zeros["device"])
        gate_up_MFD = experts_M.stacked(ExpertWeights.gate_up)
        if layer.biases is not None:
            state["bias"][members] = gate_up_MFD[..., hidden]
            gate_up_MFD = gate_up_MFD[..., :hidden]
        base, b, a = factor_matrices(gate_up_MFD, weight_M, rank, options, moment)
        del gate_up_MFD
        state[f"bases.{group}.gate_up_proj.weight"] = base
        state["delta.gate_up_b"][members], state["delta.gate_up_a"][members] = b, a
        down_MDF = experts_M.stacked(lambda expert: expert.down_DF)
        base, b, a = factor_matrices(down_MDF, weight_M, down_rank, options)
        state[f"bases.{group}.down_proj.weight"] = base
        state["delta.down_b"][members], state["delta.down_a"][members] = b, a
    state["group_of_expert"] = group_of_expert.to(zeros["device"], torch.int64)
    if not rank:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("delta.")}
    return state


def _members(layer: Experts, members: list[int]) -> Members:
    return Members(len(members), lambda number: layer.weights(members[number]))
