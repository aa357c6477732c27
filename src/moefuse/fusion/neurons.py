"""Bases made of the group's most important neurons, fitted to real inputs by least squares.

Well-trained experts hardly resemble each other, so their mean computes nothing that any of them
does. Instead a group's base takes, out of all its members' neurons, the F that add most to the
output, exactly as they are; then everything that the output is linear in is solved for:

1. the gains ``s_e``: how much of each base neuron every member uses,
   ``argmin_s  E |sum_f s_f d_f z_f(x) - f_e(x)|^2`` over the tokens routed to e, where ``z_f`` is
   what a base neuron makes of the input and ``d_f`` its column of the down projection;
2. the down projections of all bases at once, against the layer's output;
3. the down deltas, one expert after another against what is left: reduced-rank regression, the
   truncated decomposition of the least-squares solution weighed by the inputs' second moment
   (Izenman, 1975).

The deltas of gate and up start as LoRA's do, with B zero; their A looks where the expert's own
important neurons look.

Shape suffixes: T tokens, K experts chosen per token, N rows of one expert, E experts, G groups,
F neurons of an expert, D hidden width, R rank, B = G * F neurons of all bases.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.lowrank import low_rank, whitened_low_rank

RIDGE = 1e-3
"""Share of the mean squared feature that is added to every squared feature, against overfitting."""


def rows_of_expert(call: ExpertsCall, expert: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that chose ``expert``, (N,), and their routing weights, (N, 1)."""
    token_N, slot_N = (call.index_TK == expert).nonzero(as_tuple=True)
    return token_N, call.weight_TK[token_N, slot_N].unsqueeze(-1)


def neurons(experts: Experts, gate_up_FD: Tensor, x_ND: Tensor) -> Tensor:
    """Return ``act(gate) * up`` of stacked gate and up rows: (N, F)."""
    gate_NF, up_NF = (x_ND @ gate_up_FD.T).chunk(2, dim=-1)
    return experts.activation(gate_NF) * up_NF


def importance(experts: Experts, call: ExpertsCall) -> Tensor:
    """Return the energy that every neuron adds to the output, (E, F).

    ``sum over its tokens of (w z)^2``, times the squared norm of its down column.
    """
    energies = []
    for expert, gate_up_FD in enumerate(experts.gate_up_EFD):
        token_N, weight_N1 = rows_of_expert(call, expert)
        z_NF = neurons(experts, gate_up_FD, call.x_TD[token_N]) * weight_N1
        energies.append(z_NF.square().sum(0) * experts.down_EDF[expert].square().sum(0))
    return torch.stack(energies)


def select_neurons(importance_EF: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a base's neurons among those of its ``members``: (F,) experts and (F,) neurons."""
    width = importance_EF.shape[1]
    chosen_F = importance_EF[members].flatten().sort(descending=True, stable=True).indices[:width]
    return members[chosen_F // width], chosen_F % width


def ridge_solve(gram_BB: Tensor, target_BO: Tensor) -> Tensor:
    """Solve ``(gram + ridge) s = target`` in fp64; an all-zero Gram matrix gives zeros."""
    gram_BB = gram_BB.double()
    ridge = RIDGE * gram_BB.diagonal().mean() + torch.finfo(torch.float32).tiny
    identity_BB = torch.eye(len(gram_BB), dtype=gram_BB.dtype, device=gram_BB.device)
    return torch.linalg.solve(gram_BB + ridge * identity_BB, target_BO.double())


def fit_gains(
    experts: Experts, expert: int, call: ExpertsCall, gate_up_FD: Tensor, down_DF: Tensor
) -> Tensor:
    """Return how much of each base neuron ``expert`` uses, (F,); see the module's step 1."""
    token_N, weight_N1 = rows_of_expert(call, expert)
    x_ND = call.x_TD[token_N]
    z_NF = neurons(experts, gate_up_FD, x_ND) * weight_N1
    target_ND = experts.run(expert, x_ND) * weight_N1
    gram_FF = (z_NF.T @ z_NF) * (down_DF.T @ down_DF)
    return ridge_solve(gram_FF, ((target_ND @ down_DF) * z_NF).sum(0)).to(down_DF.dtype)


def base_features(
    experts: Experts, call: ExpertsCall, state: dict[str, Tensor], groups: int
) -> Iterator[Tensor]:
    """Yield, group by group, what reaches each base's down projection: (T, F)."""
    half = state["scale"].shape[1] // 2
    gain_EF = state["scale"][:, half:]
    group_TK = state["group_of_expert"][call.index_TK.long()]
    for group in range(groups):
        weight_TK = call.weight_TK * (group_TK == group)
        # A token's members share the base's neurons, so their gains add up before it.
        gain_TF = torch.einsum("tk,tkf->tf", weight_TK, gain_EF[call.index_TK.long()])
        gate_up_FD = state[f"bases.{group}.gate_up_proj.weight"]
        yield neurons(experts, gate_up_FD, call.x_TD) * gain_TF


def fit_down(experts: Experts, call: ExpertsCall, state: dict[str, Tensor], groups: int) -> Tensor:
    """Solve for all bases' down projections at once; puts them into ``state``.

    Returns what they leave of the layer's output, (T, D).
    """
    z_TB = torch.cat(list(base_features(experts, call, state, groups)), dim=1)
    solution_BD = ridge_solve(z_TB.T @ z_TB, z_TB.T @ call.y_TD).to(z_TB.dtype)
    # What no token reached keeps its own down projection: the solution would silence it.
    own_BD = torch.cat([state[f"bases.{group}.down_proj.weight"].T for group in range(groups)])
    solution_BD = torch.where(z_TB.any(0).unsqueeze(-1), solution_BD, own_BD)
    for group, down_FD in enumerate(solution_BD.chunk(groups)):
        state[f"bases.{group}.down_proj.weight"] = down_FD.T.contiguous()
    return call.y_TD - z_TB @ solution_BD


def fit_down_delta(z_NF: Tensor, left_ND: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``b`` (D, R) and ``a`` (R, F): the rank-R map from neurons to what is left."""
    gram_FF = z_NF.T @ z_NF
    ridge = RIDGE * gram_FF.diagonal().mean() + torch.finfo(torch.float32).tiny
    gram_FF = gram_FF + ridge * torch.eye(len(gram_FF), device=gram_FF.device)
    solution_FD = torch.linalg.solve(gram_FF.double(), (z_NF.T @ left_ND).double())
    b_DR, a_RF = whitened_low_rank(solution_FD.T, rank, gram_FF.double())
    return b_DR.to(z_NF.dtype), a_RF.to(z_NF.dtype)


def fit_neurons(
    experts: Experts, call: ExpertsCall, group_of_expert: Tensor, rank: int, rounds: int
) -> dict[str, Tensor]:
    """Return the state of a ``FusedExperts`` module with scales, fp32, for one layer.

    ``experts`` in fp32; ``call`` holds the tokens to fit to; ``group_of_expert`` is (E,);
    ``rounds`` is how often gains and down projections are solved for in turn.
    """
    groups = int(group_of_expert.max()) + 1
    importance_EF = importance(experts, call)
    state = _bases(experts, importance_EF, group_of_expert, groups)
    left_TD = call.y_TD
    for _ in range(rounds):
        _fit_all_gains(experts, call, state)
        left_TD = fit_down(experts, call, state, groups)
    if rank:
        _fit_deltas(experts, call, state, importance_EF, left_TD.clone(), rank)
    return state


def _bases(
    experts: Experts, importance_EF: Tensor, group_of_expert: Tensor, groups: int
) -> dict[str, Tensor]:
    width = importance_EF.shape[1]
    state = {
        "group_of_expert": group_of_expert,
        "scale": torch.ones(len(importance_EF), 2 * width, device=importance_EF.device),
    }
    for group in range(groups):
        members = (group_of_expert == group).nonzero().flatten()
        expert_F, neuron_F = select_neurons(importance_EF, members)
        gate_FD = experts.gate_up_EFD[expert_F, neuron_F]
        up_FD = experts.gate_up_EFD[expert_F, width + neuron_F]
        state[f"bases.{group}.gate_up_proj.weight"] = torch.cat([gate_FD, up_FD])
        state[f"bases.{group}.down_proj.weight"] = experts.down_EDF[expert_F, :, neuron_F].T
    return state


def _fit_all_gains(experts: Experts, call: ExpertsCall, state: dict[str, Tensor]) -> None:
    """Fit every expert's gains; one that was never routed takes the mean of its group's."""
    gains: dict[int, Tensor] = {}
    group_of_expert = state["group_of_expert"].tolist()
    for expert, group in enumerate(group_of_expert):
        if bool((call.index_TK == expert).any()):
            base = f"bases.{group}."
            gate_up_FD = state[base + "gate_up_proj.weight"]
            down_DF = state[base + "down_proj.weight"]
            gains[expert] = fit_gains(experts, expert, call, gate_up_FD, down_DF)
    half = state["scale"].shape[1] // 2
    for expert, group in enumerate(group_of_expert):
        alike = [gain_F for other, gain_F in gains.items() if group_of_expert[other] == group]
        if alike:
            state["scale"][expert, half:] = gains.get(expert, torch.stack(alike).mean(0))


def _fit_deltas(
    experts: Experts,
    call: ExpertsCall,
    state: dict[str, Tensor],
    importance_EF: Tensor,
    left_TD: Tensor,
    rank: int,
) -> None:
    count, hidden = len(importance_EF), call.x_TD.shape[1]
    width = importance_EF.shape[1]
    down_rank = min(rank, hidden, width)
    zeros = {"dtype": torch.float32, "device": left_TD.device}
    state["delta.gate_up_a"] = torch.zeros(count, rank, hidden, **zeros)
    state["delta.gate_up_b"] = torch.zeros(count, 2 * width, rank, **zeros)
    state["delta.down_a"] = torch.zeros(count, down_rank, width, **zeros)
    state["delta.down_b"] = torch.zeros(count, hidden, down_rank, **zeros)
    for expert, group in enumerate(state["group_of_expert"].tolist()):
        state["delta.gate_up_a"][expert] = _directions(experts, importance_EF, expert, rank)
        token_N, weight_N1 = rows_of_expert(call, expert)
        gate_up_FD = state[f"bases.{group}.gate_up_proj.weight"]
        gain_F = state["scale"][expert, width:]
        z_NF = neurons(experts, gate_up_FD, call.x_TD[token_N]) * weight_N1 * gain_F
        b_DR, a_RF = fit_down_delta(z_NF, left_TD[token_N], down_rank)
        left_TD[token_N] -= z_NF @ a_RF.T @ b_DR.T
        state["delta.down_b"][expert], state["delta.down_a"][expert] = b_DR, a_RF


def _directions(experts: Experts, importance_EF: Tensor, expert: int, rank: int) -> Tensor:
    """Return the R unit directions of the input that an expert's important neurons look along."""
    weight_F = importance_EF[expert].clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    weighted = experts.gate_up_EFD[expert] * torch.cat([weight_F, weight_F]).unsqueeze(-1)
    _, a_RD = low_rank(weighted, rank)
    return torch.nn.functional.normalize(a_RD, dim=-1)
