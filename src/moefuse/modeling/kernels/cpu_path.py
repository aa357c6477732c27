"""The fused experts on a CPU, without gradients: one token, and many.

The formula and the order of rows and pairs are the plain way's (``modeling_moefuse``). What takes
time beside the bases' products differs:

- One token waits for the bases' weights, which a product of a matrix and a vector reads fastest, and
  for the host. The factors of its K experts are gathered and multiplied at once.
- Many tokens: what lies between products is bound by the memory when it goes over all N rows of 2F
  numbers at once, the more so as memory that was never used before has to be mapped first. Here it
  goes over one expert's rows at a time, which stay in the cache, and all groups share their room.

Between the two the plain way is as fast, and is taken. Shape suffixes as in ``modeling_moefuse``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.modeling.kernels.weights import linears_of, obstacle_of_weights
from moefuse.modeling.modeling_moefuse import is_plain_linear, weight_of_experts

FEWEST_ROWS = 8
"""From how many rows for each expert the rows are computed expert by expert."""
MOST_TOKENS = 2048
"""How many tokens are computed at a time: an expert's rows have to stay in the cache."""


def obstacle(module: Any, x_TD: Tensor) -> str | None:
    """Say what of ``module`` or ``x_TD`` (T, D) cannot be computed here, or None."""
    if x_TD.device.type != "cpu":
        return f"the input is on {x_TD.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not hasattr(module, "bases"):
        return "the CPU's way computes students of bases, not of own neurons"
    if module.delta is not None and type(module.delta).__name__ != "LowRankDelta":
        return "the CPU's way knows low-rank deltas alone"
    found = obstacle_of_weights(module, x_TD)
    if found is None and not all(is_plain_linear(one, x_TD.dtype) for one in linears_of(module)):
        found = "a base is more than its weight (adapted, hooked or offloaded)"
    return found


@torch.compiler.disable
def forward(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output of ``module``, (T, D), for which there is no ``obstacle``."""
    if len(index_TK) == 1:
        return one_token(module, x_TD, index_TK, weight_TK)
    if index_TK.numel() < FEWEST_ROWS * module.num_experts:
        return module.plain_compute(x_TD, index_TK, weight_TK)
    y_TD = torch.empty_like(x_TD)
    parts = (tensor.split(MOST_TOKENS) for tensor in (y_TD, x_TD, index_TK, weight_TK))
    for y_PD, *call in zip(*parts, strict=True):
        y_PD.copy_(many_tokens(module, *call))
    return y_TD


def one_token(module: Any, x_1D: Tensor, index_1K: Tensor, weight_1K: Tensor) -> Tensor:
    """Return the output for one token, (1, D)."""
    x_D, expert_K, weight_K = x_1D[0], index_1K[0], weight_1K[0]
    group_K = module.group_of_expert[expert_K].tolist()
    groups = sorted(set(group_K))
    place_K = [groups.index(group) for group in group_K]
    base = [torch.mv(module.bases[group].gate_up_proj.weight, x_D) for group in groups]
    h_KF = torch.stack([base[place] for place in place_K])
    if module.scale is not None:
        h_KF.mul_(module.scale.index_select(0, expert_K))
    delta = module.delta
    if delta is not None:
        inner_KR = delta.gate_up_a.index_select(0, expert_K) @ x_D
        h_KF.add_(_each(delta.gate_up_b.index_select(0, expert_K), inner_KR))
    if module.bias is not None:
        h_KF.add_(module.bias.index_select(0, expert_K))
    z_KF = (module.gating(*h_KF.chunk(2, -1)) * weight_K.unsqueeze(-1)).to(h_KF.dtype)

    z_GF = z_KF.new_zeros(len(groups), z_KF.shape[1])
    z_GF.index_add_(0, torch.tensor(place_K), z_KF)
    y_D = torch.zeros_like(x_D, dtype=torch.float32)
    for group, z_F in zip(groups, z_GF, strict=True):
        y_D += torch.mv(module.bases[group].down_proj.weight, z_F)
    if delta is not None:
        inner_KR = _each(delta.down_a.index_select(0, expert_K), z_KF)
        y_D += _each(delta.down_b.index_select(0, expert_K), inner_KR).float().sum(0)
    if module.down_bias is not None:
        y_D += weight_K.float() @ module.down_bias.index_select(0, expert_K).float()
    return y_D.to(x_D.dtype).unsqueeze(0)


def _each(matrix_KOI: Tensor, x_KI: Tensor) -> Tensor:
    """Apply each matrix to its own row, (K, O)."""
    return torch.bmm(matrix_KOI, x_KI.unsqueeze(-1)).squeeze(-1)


@dataclass
class Room:
    """What one group after another, and one expert after another, is computed in.

    ``token_PD`` holds a group's inputs, then its outputs; ``base_PF`` what gate and up made of
    them; ``z_PF`` the sums of members' neurons; ``h_NF`` an expert's rows.
    """

    token_PD: Tensor
    base_PF: Tensor
    z_PF: Tensor
    h_NF: Tensor


@dataclass
class OfExpert:
    """An expert's rows: their tokens, pairs (counted within the group) and routing weights."""

    expert: int
    token_N: Tensor
    pair_N: Tensor
    weight_N: Tensor


def many_tokens(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output, (T, D) fp32, computed group by group and in it expert by expert."""
    tokens, top_k = index_TK.shape
    expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
    token_N = order_N // top_k
    weight_N = weight_TK.reshape(-1).index_select(0, order_N)
    rows_per_expert = torch.bincount(expert_N, minlength=module.num_experts).tolist()
    pair_N, token_P, pairs_per_group = module.pairs(
        module.group_of_expert[expert_N], token_N, tokens
    )
    pairs, wide = max(pairs_per_group), 2 * module.bases[0].down_proj.in_features
    room = Room(
        x_TD.new_empty(pairs, x_TD.shape[1]),
        x_TD.new_empty(pairs, wide),
        x_TD.new_empty(pairs, wide // 2),
        x_TD.new_empty(max(rows_per_expert), wide),
    )
    parts = (tensor.split(rows_per_expert) for tensor in (token_N, pair_N, weight_N))
    experts = [OfExpert(number, *part) for number, part in enumerate(zip(*parts, strict=True))]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    group_of_expert, first = module.group_of_expert.tolist(), 0
    for group, token_P in enumerate(token_P.split(pairs_per_group)):
        members = [one for one in experts if group_of_expert[one.expert] == group]
        for one in members:
            one.pair_N = one.pair_N - first
        if len(token_P):
            _add_group(module, group, members, x_TD, token_P, y_TD, room)
        first += len(token_P)
    if module.down_bias is not None:
        weight_TE = weight_of_experts(index_TK, weight_TK, module.num_experts)
        y_TD += weight_TE @ module.down_bias.float()
    return y_TD


def _add_group(
    module: Any,
    group: int,
    members: list[OfExpert],
    x_TD: Tensor,
    token_P: Tensor,
    y_TD: Tensor,
    room: Room,
) -> None:
    """Add what a group's base and its members' deltas make of its pairs to ``y_TD``."""
    base, pairs = module.bases[group], len(token_P)
    token_PD, base_PF, z_PF = room.token_PD[:pairs], room.base_PF[:pairs], room.z_PF[:pairs]
    torch.index_select(x_TD, 0, token_P, out=token_PD)
    torch.mm(token_PD, base.gate_up_proj.weight.T, out=base_PF)
    z_PF.zero_()
    for one in members:
        if len(one.pair_N):
            _add_expert(module, one, x_TD, base_PF, z_PF, y_TD, room.h_NF[: len(one.pair_N)])
    torch.mm(z_PF, base.down_proj.weight.T, out=token_PD)
    y_TD.index_add_(0, token_P, token_PD.to(y_TD.dtype))


def _add_expert(
    module: Any,
    rows: OfExpert,
    x_TD: Tensor,
    base_PF: Tensor,
    z_PF: Tensor,
    y_TD: Tensor,
    h_NF: Tensor,
) -> None:
    """Add an expert's neurons to ``z_PF`` and what its down delta makes of them to ``y_TD``."""
    expert, delta = rows.expert, module.delta
    torch.index_select(base_PF, 0, rows.pair_N, out=h_NF)
    if module.scale is not None:
        h_NF.mul_(module.scale[expert])
    if delta is not None:
        inner_RN = delta.gate_up_a[expert] @ x_TD.index_select(0, rows.token_N).T
        h_NF.addmm_(inner_RN.T, delta.gate_up_b[expert].T)
    if module.bias is not None:
        h_NF.add_(module.bias[expert])
    z_NF = module.gating(*h_NF.chunk(2, -1)) * rows.weight_N.unsqueeze(-1)
    z_NF = z_NF.to(h_NF.dtype)
    z_PF.index_add_(0, rows.pair_N, z_NF)
    if delta is not None:
        inner_RN = delta.down_a[expert] @ z_NF.T
        y_ND = inner_RN.T @ delta.down_b[expert].T
        y_TD.index_add_(0, rows.token_N, y_ND.to(y_TD.dtype))
