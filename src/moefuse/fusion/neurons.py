"""Bases made of the group's most important neurons, fitted to real inputs by least squares.

Well-trained experts hardly resemble each other, so their mean computes nothing that any of them
does. Instead a group's base takes, out of all its members' neurons, the F that add most to the
output, exactly as they are; then everything that the output is linear in is solved for:

1. the gains ``s_e``: how much of each base neuron every member uses,
   ``argmin_s  E |sum_f s_f d_f z_f(x) - f_e(x)|^2`` over the tokens routed to e, where ``z_f`` is
   what a base neuron makes of the input and ``d_f`` its column of the down projection;
2. the down projections of all bases at once, against the layer's output.

The deltas give every expert some neurons of its own. Two ranks of gate and up and one of down
carry one neuron exactly: its gate row and its up row take the place of a base neuron that the
expert hardly uses (whose scale becomes zero), and the difference of the down columns corrects the
output. So the R/2 most important neurons of every expert stay as they are, and bases need not
provide them. What ranks of down remain go to reduced-rank regression (Izenman, 1975), one expert
after another against what is left: the truncated decomposition of the least-squares solution,
weighed by the second moment of the neurons.

Base neurons keep their biases too. A gain is a scale of the up row; where the gating multiplies by
``up + o`` and not by ``up`` (gpt-oss: o = 1), the bias does the rest, which every expert then has:
``s (up + b + o) = (s up + s (b + o) - o) + o``. Where such a gating clamps, that is only nearly so.

Shape suffixes: T tokens, K experts chosen per token, N rows of one expert, E experts, G groups,
F neurons of an expert, O neurons an expert keeps for itself, D hidden width, R rank, B = G * F
neurons of all bases.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.lowrank import low_rank

LARGEST_IN_FP64 = 4096
SOLVED_AT_ONCE = 1024
RIDGE = 1e-3
"""Share of the mean squared feature that is added to every squared feature, against overfitting."""


def rows_of_expert(call: ExpertsCall, expert: int) -> tuple[Tensor, Tensor]:
    """Return the tokens that chose ``expert``, (N,), and their routing weights, (N, 1)."""
    token_N, slot_N = (call.index_TK == expert).nonzero(as_tuple=True)
    return token_N, call.weight_TK[token_N, slot_N].unsqueeze(-1)


def neurons(
    experts: Experts, gate_up_FD: Tensor, x_ND: Tensor, bias_F: Tensor | None = None
) -> Tensor:
    """Return the values of neurons with these stacked gate and up rows and biases: (N, F)."""
    h_NF = x_ND @ gate_up_FD.T
    return experts.gating(*(h_NF if bias_F is None else h_NF + bias_F).chunk(2, dim=-1))


def importance(experts: Experts, call: ExpertsCall, metric_DD: Tensor | None = None) -> Tensor:
    """Return the energy that every neuron adds to the output, (E, F).

    ``sum over its tokens of (w z)^2``, times the squared norm of its down column d, or times
    ``d^T metric d`` where a ``metric_DD`` (D, D) says what counts.
    """
    energies = []
    for expert in range(len(experts.gate_up_EFD)):
        token_N, weight_N1 = rows_of_expert(call, expert)
        z_NF = experts.neurons(expert, call.x_TD[token_N]) * weight_N1
        down_DF = experts.down(expert)
        felt_DF = down_DF if metric_DD is None else metric_DD @ down_DF
        energies.append(z_NF.square().sum(0) * (down_DF * felt_DF).sum(0).clamp_min(0))
    return torch.stack(energies)


def select_neurons(importance_EF: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Choose a base's neurons among those of its ``members``: (F,) experts and (F,) neurons."""
    width = importance_EF.shape[1]
    chosen_F = importance_EF[members].flatten().sort(descending=True, stable=True).indices[:width]
    return members[chosen_F // width], chosen_F % width


def ridge_solve(gram_BB: Tensor, target_BO: Tensor, ridge: float = RIDGE) -> Tensor:
    """Solve ``(gram + ridge) s = target``, overwriting ``gram_BB``; all zeros give zeros.

    In fp64 while that is cheap: a Gram matrix squares the condition of its features.
    """
    dtype = torch.float64 if len(gram_BB) <= LARGEST_IN_FP64 else torch.float32
    # Where it is large already in its dtype, it is overwritten: there is no room for another.
    ridge_BB = gram_BB.to(dtype)
    ridge_BB.diagonal().add_(ridge * ridge_BB.diagonal().mean() + torch.finfo(torch.float32).tiny)
    flat_BO = target_BO.to(dtype).reshape(len(gram_BB), -1)
    # The library's own order of elements, which for a symmetric matrix is a matter of the view.
    root_BB = torch.linalg.cholesky(ridge_BB.mT, out=ridge_BB.mT)
    solved = []
    for part_BO in flat_BO.split(SOLVED_AT_ONCE, dim=1):
        half_BO = torch.linalg.solve_triangular(root_BB, part_BO, upper=False)
        solved.append(torch.linalg.solve_triangular(root_BB.mT, half_BO, upper=True))
    return torch.cat(solved, dim=1).reshape(target_BO.shape)


def ridge_fit(z_TB: Tensor, target_TD: Tensor) -> Tensor:
    """Return ``argmin_s |z s - target|^2 + ridge |s|^2``, (B, D).

    With fewer tokens than features the same solution comes from the smaller matrix ``z z^T``:
    ``(z^T z + r)^-1 z^T = z^T (z z^T + r)^-1``.
    """
    tokens, features = z_TB.shape
    if tokens >= features:
        return ridge_solve(z_TB.T @ z_TB, z_TB.T @ target_TD).to(z_TB.dtype)
    if not bool(z_TB.any()):
        return target_TD.new_zeros(features, target_TD.shape[1])
    # The ridge is a share of the mean over features; the trace of both matrices is the same.
    solution_TD = ridge_solve(z_TB @ z_TB.T, target_TD, ridge=RIDGE * tokens / features)
    return z_TB.T @ solution_TD.to(z_TB.dtype)


def fit_gains(z_NF: Tensor, target_ND: Tensor, down_DF: Tensor) -> Tensor:
    """Return how much of each base neuron an expert uses, (F,); see the module's step 1.

    ``z_NF`` is what the base's neurons make of the expert's tokens and ``target_ND`` what the
    expert returns, both times the routing weight.
    """
    gram_FF = (z_NF.T @ z_NF) * (down_DF.T @ down_DF)
    return ridge_solve(gram_FF, ((target_ND @ down_DF) * z_NF).sum(0)).to(down_DF.dtype)


def base_features(
    experts: Experts,
    call: ExpertsCall,
    state: dict[str, Tensor],
    groups: int,
    bias_GF: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield, group by group, what reaches each base's down projection: (T, F).

    ``bias_GF`` (G, 2F) are biases of the bases' gate and up rows.
    """
    half = state["scale"].shape[1] // 2
    gain_EF = state["scale"][:, half:]
    weight_TE = call.weight_TK.new_zeros(len(call.x_TD), len(gain_EF))
    weight_TE.scatter_add_(1, call.index_TK.long(), call.weight_TK)
    for group in range(groups):
        # A token's members share the base's neurons, so their gains add up before it.
        gain_TF = weight_TE @ (gain_EF * (state["group_of_expert"] == group).unsqueeze(-1))
        gate_up_FD = state[f"bases.{group}.gate_up_proj.weight"]
        bias_F = None if bias_GF is None else bias_GF[group]
        yield neurons(experts, gate_up_FD, call.x_TD, bias_F) * gain_TF


def fit_down(
    experts: Experts,
    call: ExpertsCall,
    target_TD: Tensor,
    state: dict[str, Tensor],
    groups: int,
    bias_GF: Tensor | None = None,
) -> Tensor:
    """Solve for all bases' down projections at once; puts them into ``state``.

    Returns what they leave of ``target_TD``, (T, D). ``bias_GF`` as for ``base_features``.
    """
    width = state["scale"].shape[1] // 2
    z_TB = target_TD.new_empty(len(target_TD), groups * width)
    for z_TF, part_TF in zip(
        z_TB.split(width, dim=1),
        base_features(experts, call, state, groups, bias_GF),
        strict=True,
    ):
        z_TF.copy_(part_TF)
    solution_BD = ridge_fit(z_TB, target_TD)
    left_TD = target_TD - z_TB @ solution_BD
    for group, down_FD in enumerate(solution_BD.chunk(groups)):
        name = f"bases.{group}.down_proj.weight"
        reached_F = z_TB[:, group * width : (group + 1) * width].any(0)
        # What no token reached keeps its own down projection: the solution would silence it.
        state[name] = torch.where(reached_F, down_FD.T, state[name]).contiguous()
    return left_TD


def fit_down_delta(z_NF: Tensor, left_ND: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``b`` (D, R) and ``a`` (R, F): the rank-R map from neurons to what is left.

    With the Gram matrix ``G = L L^T``, the least-squares solution ``S`` errs by ``|(M - S) L|^2``
    more when ``M`` takes its place: so the decomposition of ``S L`` is cut off, and ``L`` undone.
    """
    if not rank:
        return left_ND.new_zeros(left_ND.shape[1], 0), z_NF.new_zeros(0, z_NF.shape[1])
    gram_FF = (z_NF.T @ z_NF).double()
    gram_FF.diagonal().add_(RIDGE * gram_FF.diagonal().mean() + torch.finfo(torch.float32).tiny)
    root_FF = torch.linalg.cholesky(gram_FF)
    # S L = (L^-1 z^T left)^T, because S = (L^-T L^-1 z^T left)^T.
    seen_FD = torch.linalg.solve_triangular(root_FF, (z_NF.T @ left_ND).double(), upper=False)
    b_DR, a_RF = low_rank(seen_FD.T, rank)
    a_RF = torch.linalg.solve_triangular(root_FF, a_RF, upper=False, left=False)
    return b_DR.to(z_NF.dtype), a_RF.to(z_NF.dtype)


@dataclass(frozen=True)
class _Fit:
    """What one layer's fit works on; ``own_EO`` and ``slot_EO`` are the neurons that each expert
    keeps and the base neurons in whose place they stand, ``bias_GF`` the biases of the bases' gate
    and up rows."""

    experts: Experts
    call: ExpertsCall
    state: dict[str, Tensor]
    groups: list[int]
    own_EO: Tensor
    slot_EO: Tensor
    bias_GF: Tensor | None

    @property
    def width(self) -> int:
        return self.experts.down_EDF.shape[2]

    def base_down(self, expert: int) -> Tensor:
        """Return the down projection of an expert's base, (D, F)."""
        return self.state[f"bases.{self.groups[expert]}.down_proj.weight"]

    def base_neurons(self, expert: int, x_ND: Tensor) -> Tensor:
        """Return what the neurons of an expert's base make of inputs, (N, F)."""
        group = self.groups[expert]
        bias_F = None if self.bias_GF is None else self.bias_GF[group]
        gate_up_FD = self.state[f"bases.{group}.gate_up_proj.weight"]
        return neurons(self.experts, gate_up_FD, x_ND, bias_F)

    def _own(self, expert: int) -> Tensor:
        """Return the numbers of the gate and up rows of the neurons that an expert keeps, (2O,)."""
        return torch.cat([self.own_EO[expert], self.width + self.own_EO[expert]])

    def own_rows(self, expert: int) -> Tensor:
        """Return the gate and up rows of the neurons that an expert keeps, (2O, D)."""
        return self.experts.gate_up_EFD[expert][self._own(expert)].float()

    def own_biases(self, expert: int) -> Tensor | None:
        """Return the biases of these rows, (2O,), if there are any."""
        biases = self.experts.biases
        return None if biases is None else biases.gate_up_EF[expert][self._own(expert)].float()

    def own_neurons(self, expert: int, token_N: Tensor) -> Tensor:
        """Return what the neurons that an expert keeps make of its tokens, (N, O)."""
        x_ND = self.call.x_TD[token_N]
        return neurons(self.experts, self.own_rows(expert), x_ND, self.own_biases(expert))

    def own_down(self, expert: int) -> Tensor:
        """Return the down columns of the neurons that an expert keeps, (D, O)."""
        return self.experts.down_EDF[expert][:, self.own_EO[expert]].float()


def fit_neurons(
    experts: Experts, call: ExpertsCall, group_of_expert: Tensor, rank: int
) -> dict[str, Tensor]:
    """Return the state of a ``FusedExperts`` module with scales, fp32, for one layer.

    ``experts`` in any float dtype; ``call`` holds the tokens to fit to; ``group_of_expert`` is
    (E,); ``rank`` R of the deltas.
    """
    assert experts.biases is not None or not experts.gating.up_offset
    groups = int(group_of_expert.max()) + 1
    kept = min(rank // 2, experts.down_EDF.shape[2], experts.down_EDF.shape[1])
    importance_EF = importance(experts, call)
    own_EO = importance_EF.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    left_EF = importance_EF.scatter(1, own_EO, 0.0)
    state, bias_GF = _bases(experts, left_EF, group_of_expert, groups)
    slot_EO = torch.zeros_like(own_EO)
    fit = _Fit(experts, call, state, group_of_expert.tolist(), own_EO, slot_EO, bias_GF)
    _fit_all_gains(fit)
    left_TD = fit_down(experts, call, _without_own(fit), state, groups, bias_GF)
    if rank:
        _fit_deltas(fit, left_TD, rank)
    if experts.biases is not None and bias_GF is not None:
        state["bias"] = _gained_biases(fit, bias_GF)
        state["down_bias"] = experts.biases.down_ED.to(torch.float32, copy=True)
    return state


def _gained_biases(fit: _Fit, bias_GF: Tensor) -> Tensor:
    """Return the biases of every expert's gate and up, (E, 2F), which complete its gains."""
    offset = fit.experts.gating.up_offset
    gate_EF, up_EF = bias_GF[fit.state["group_of_expert"]].chunk(2, dim=1)
    gain_EF = fit.state["scale"][:, fit.width :]
    bias_EF = torch.cat([gate_EF, gain_EF * (up_EF + offset) - offset], dim=1)
    for expert in range(len(fit.groups)):
        own = fit.own_biases(expert)
        if own is not None:
            slot_O = fit.slot_EO[expert]
            bias_EF[expert, torch.cat([slot_O, fit.width + slot_O])] = own
    return bias_EF


def _bases(
    experts: Experts, importance_EF: Tensor, group_of_expert: Tensor, groups: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return a state with bases as they are in the teacher, and their biases, (G, 2F), if any."""
    width = importance_EF.shape[1]
    state = {
        "group_of_expert": group_of_expert,
        "scale": torch.ones(len(importance_EF), 2 * width, device=importance_EF.device),
    }
    biases = []
    for group in range(groups):
        members = (group_of_expert == group).nonzero().flatten()
        expert_F, neuron_F = select_neurons(importance_EF, members)
        gate_FD = experts.gate_up_EFD[expert_F, neuron_F].float()
        up_FD = experts.gate_up_EFD[expert_F, width + neuron_F].float()
        state[f"bases.{group}.gate_up_proj.weight"] = torch.cat([gate_FD, up_FD])
        down_FD = experts.down_EDF[expert_F, :, neuron_F].float()
        state[f"bases.{group}.down_proj.weight"] = down_FD.T
        if experts.biases is not None:
            bias_EF = experts.biases.gate_up_EF
            parts = bias_EF[expert_F, neuron_F], bias_EF[expert_F, width + neuron_F]
            biases.append(torch.cat(parts).float())
    return state, torch.stack(biases) if biases else None


def _without_own(fit: _Fit) -> Tensor:
    """Return the layer's output, (T, D), without what needs no base: the neurons that experts keep
    for themselves and the biases of their down projections."""
    added_TD = fit.experts.down_bias_added(fit.call.index_TK, fit.call.weight_TK)
    left_TD = fit.call.y_TD.clone() if added_TD is None else fit.call.y_TD - added_TD
    for expert in range(len(fit.groups)):
        token_N, weight_N1 = rows_of_expert(fit.call, expert)
        z_NO = fit.own_neurons(expert, token_N) * weight_N1
        left_TD[token_N] -= z_NO @ fit.own_down(expert).T
    return left_TD


def _fit_all_gains(fit: _Fit) -> None:
    """Fit every expert's gains and choose the base neurons that its own take the place of.

    An expert that was never routed takes the mean gains of its group.
    """
    gains: dict[int, Tensor] = {}
    kept = fit.own_EO.shape[1]
    for expert in range(len(fit.groups)):
        token_N, weight_N1 = rows_of_expert(fit.call, expert)
        if len(token_N):
            down_DF, x_ND = fit.base_down(expert), fit.call.x_TD[token_N]
            own_ND = fit.own_neurons(expert, token_N) @ fit.own_down(expert).T
            whole_ND = fit.experts.neurons(expert, x_ND) @ fit.experts.down(expert).T
            target_ND = (whole_ND - own_ND) * weight_N1
            z_NF = fit.base_neurons(expert, x_ND) * weight_N1
            gain_F = fit_gains(z_NF, target_ND, down_DF)
            used_F = gain_F.square() * z_NF.square().sum(0) * down_DF.square().sum(0)
            fit.slot_EO[expert] = used_F.sort(stable=True).indices[:kept]
            gains[expert] = gain_F
    scale_EF = fit.state["scale"]
    for expert, group in enumerate(fit.groups):
        alike = [gain_F for other, gain_F in gains.items() if fit.groups[other] == group]
        if alike:
            scale_EF[expert, fit.width :] = gains.get(expert, torch.stack(alike).mean(0))
        if expert not in gains:
            fit.slot_EO[expert] = torch.arange(kept, device=scale_EF.device)
        scale_EF[expert, fit.slot_EO[expert]] = 0.0
        scale_EF[expert, fit.width + fit.slot_EO[expert]] = 0.0


def _fit_deltas(fit: _Fit, left_TD: Tensor, rank: int) -> None:
    """Put the deltas into the state: neurons of their own, then regression on what is left."""
    count, hidden = fit.experts.down_EDF.shape[:2]
    width, kept = fit.width, fit.own_EO.shape[1]
    down_rank = min(rank, hidden, width)
    zeros = {"dtype": torch.float32, "device": left_TD.device}
    gate_up_a = torch.zeros(count, rank, hidden, **zeros)
    gate_up_b = torch.zeros(count, 2 * width, rank, **zeros)
    down_a = torch.zeros(count, down_rank, width, **zeros)
    down_b = torch.zeros(count, hidden, down_rank, **zeros)
    places = torch.arange(kept, device=left_TD.device)
    for expert in range(count):
        slot_O = fit.slot_EO[expert]
        gate_up_a[expert, : 2 * kept] = fit.own_rows(expert)
        gate_up_a[expert, 2 * kept :] = _directions(fit.experts, expert, rank - 2 * kept)
        gate_up_b[expert, slot_O, places] = 1.0
        gate_up_b[expert, width + slot_O, kept + places] = 1.0
        down_a[expert, places, slot_O] = 1.0
        down_b[expert, :, :kept] = fit.own_down(expert) - fit.base_down(expert)[:, slot_O]

        token_N, weight_N1 = rows_of_expert(fit.call, expert)
        z_NF = fit.base_neurons(expert, fit.call.x_TD[token_N])
        z_NF = z_NF * fit.state["scale"][expert, width:]
        z_NF[:, slot_O] = fit.own_neurons(expert, token_N)
        z_NF = z_NF * weight_N1
        b_DR, a_RF = fit_down_delta(z_NF, left_TD[token_N], down_rank - kept)
        left_TD[token_N] -= z_NF @ a_RF.T @ b_DR.T
        down_a[expert, kept:], down_b[expert, :, kept:] = a_RF, b_DR
    for name, tensor in (
        ("gate_up_a", gate_up_a),
        ("gate_up_b", gate_up_b),
        ("down_a", down_a),
        ("down_b", down_b),
    ):
        fit.state[f"delta.{name}"] = tensor


def _directions(experts: Experts, expert: int, rank: int) -> Tensor:
    """Return the R unit directions of the input that an expert's weights look along most."""
    _, a_RD = low_rank(experts.gate_up(expert), rank)
    return torch.nn.functional.normalize(a_RD, dim=-1)
