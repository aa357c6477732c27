"""The fused experts on a CPU, without gradients: one token, and many.

The formula and the order of rows and pairs are the plain way's (``modeling_moefuse``). What takes
time beside the bases' products differs:

- One token waits for the bases' weights, which a product of a matrix and a vector reads fastest,
  and for the host, which has the fewest things to do.
- Many tokens: what lies between products is bound by the memory when it goes over all N rows of 2F
  numbers at once, the more so as memory that was not used before has to be mapped first. Here it
  goes over one expert's rows at a time, and all groups and experts share their room.

Between the two the plain way is as fast, and is taken. Shape suffixes as in ``modeling_moefuse``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.modeling.kernels.weights import linears_of, obstacle_of_weights
from moefuse.modeling.modeling_moefuse import (
    FEW_ROWS,
    is_plain_linear,
    of_few_rows,
    weight_of_experts,
)

FEWEST_ROWS = 14
"""From how many rows for each expert fp32 is computed expert by expert. With 9, 12 and 18 of them
DeepSeek-Coder-V2-Lite's shapes took 64, 69 and 88 ms so, and 59, 67 and 105 plainly."""
FEWEST_HALF_ROWS = 40
"""The same for bf16 and fp16, whose products take longer: 212 and 204 ms with 12 rows in bf16."""


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
    if not hasattr(module, "pairs"):
        return "the checkpoint's own file is of an older moefuse"
    found = obstacle_of_weights(module, x_TD)
    if found is None and not all(is_plain_linear(one, x_TD.dtype) for one in linears_of(module)):
        found = "a base is more than its weight (adapted, hooked or offloaded)"
    return found


@torch.compiler.disable
def forward(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output of ``module``, (T, D), for which there is no ``obstacle``."""
    if len(index_TK) == 1:
        return one_token(module, x_TD, index_TK, weight_TK)
    fewest = FEWEST_ROWS if x_TD.dtype == torch.float32 else FEWEST_HALF_ROWS
    if index_TK.numel() < fewest * module.num_experts:
        return module.plain_compute(x_TD, index_TK, weight_TK)
    return many_tokens(module, x_TD, index_TK, weight_TK).to(x_TD.dtype)


def one_token(module: Any, x_1D: Tensor, index_1K: Tensor, weight_1K: Tensor) -> Tensor:
    """Return the output for one token, (1, D)."""
    x_D, weight_K1, experts = x_1D[0], weight_1K.T, index_1K[0].tolist()
    group_of_expert, delta = module.group_of_expert.tolist(), module.delta
    groups = [group_of_expert[expert] for expert in experts]
    base_F = {g: torch.mv(module.bases[g].gate_up_proj.weight, x_D) for g in dict.fromkeys(groups)}
    h_KF = torch.stack([base_F[group] for group in groups])
    for h_F, expert in zip(h_KF, experts, strict=True):
        if module.scale is not None:
            h_F.mul_(module.scale[expert])
        if delta is not None:
            h_F.addmv_(delta.gate_up_b[expert], torch.mv(delta.gate_up_a[expert], x_D))
        if module.bias is not None:
            h_F.add_(module.bias[expert])
    z_KF = (module.gating(*h_KF.chunk(2, -1)) * weight_K1).to(h_KF.dtype)

    y_D = torch.zeros_like(x_D, dtype=torch.float32)
    summed_F: dict[int, Tensor] = {}
    for z_F, weight_1, expert, group in zip(z_KF, weight_K1, experts, groups, strict=True):
        summed_F[group] = summed_F[group] + z_F if group in summed_F else z_F
        if delta is not None:
            y_D += torch.mv(delta.down_b[expert], torch.mv(delta.down_a[expert], z_F))
        if module.down_bias is not None:
            y_D += weight_1 * module.down_bias[expert]
    for group, z_F in summed_F.items():
        y_D += torch.mv(module.bases[group].down_proj.weight, z_F)
    return y_D.to(x_D.dtype).unsqueeze(0)


@dataclass(frozen=True)
class Room:
    """What one group after another, and in it one expert after another, is computed in.

    ``token_PD`` holds a group's inputs, then its outputs; ``base_PF`` what gate and up made of
    them; ``z_PF`` the sums of members' neurons; ``h_NF`` an expert's rows.
    """

    token_PD: Tensor
    base_PF: Tensor
    z_PF: Tensor
    h_NF: Tensor

    def of(self, pairs: int) -> "Room":
        """Return the room that a group of so many pairs needs."""
        return Room(self.token_PD[:pairs], self.base_PF[:pairs], self.z_PF[:pairs], self.h_NF)


@dataclass(frozen=True)
class OfExpert:
    """An expert's rows: their tokens, their places among its group's pairs, routing weights."""

    expert: int
    token_N: Tensor
    pair_N: Tensor
    weight_N: Tensor


def many_tokens(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output, (T, D) fp32, computed group by group and in it expert by expert."""
    expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
    token_N = order_N // index_TK.shape[1]
    weight_N = weight_TK.reshape(-1).index_select(0, order_N)
    rows_per_expert = torch.bincount(expert_N, minlength=module.num_experts).tolist()
    group_N = module.group_of_expert[expert_N]
    pair_N, token_P, pairs_per_group = module.pairs(group_N, token_N, len(x_TD))
    first_G = torch.tensor([0, *pairs_per_group[:-1]]).cumsum(0)
    parts = [t.split(rows_per_expert) for t in (token_N, pair_N - first_G[group_N], weight_N)]
    experts = [OfExpert(number, *part) for number, part in enumerate(zip(*parts, strict=True))]

    most_pairs, intermediate = max(pairs_per_group), module.bases[0].down_proj.in_features
    room = Room(
        x_TD.new_empty(most_pairs, x_TD.shape[1]),
        x_TD.new_empty(most_pairs, 2 * intermediate),
        x_TD.new_empty(most_pairs, intermediate),
        x_TD.new_empty(max(rows_per_expert), 2 * intermediate),
    )
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    group_of_expert = module.group_of_expert.tolist()
    for group, own_token_P in enumerate(token_P.split(pairs_per_group)):
        chosen = [
            one for one in experts if len(one.token_N) and group_of_expert[one.expert] == group
        ]
        if chosen:
            _add_group(module, group, chosen, x_TD, own_token_P, y_TD, room.of(len(own_token_P)))
    if module.down_bias is not None:
        weight_TE = weight_of_experts(index_TK, weight_TK, module.num_experts)
        y_TD += weight_TE @ module.down_bias.float()
    return y_TD


def _add_group(
    module: Any,
    group: int,
    chosen: list[OfExpert],
    x_TD: Tensor,
    token_P: Tensor,
    y_TD: Tensor,
    room: Room,
) -> None:
    """Add what a group's base and its members' deltas make of its pairs to ``y_TD``."""
    base = module.bases[group]
    torch.index_select(x_TD, 0, token_P, out=room.token_PD)
    _multiply(base.gate_up_proj, room.token_PD, room.base_PF)
    room.z_PF.zero_()
    for rows in chosen:
        _add_expert(module, rows, x_TD, y_TD, room)
    _multiply(base.down_proj, room.z_PF, room.token_PD)
    y_TD.index_add_(0, token_P, room.token_PD.to(y_TD.dtype))


def _multiply(linear: Any, x_PI: Tensor, out_PO: Tensor) -> None:
    """Write a base's product into ``out_PO``."""
    if len(x_PI) in FEW_ROWS:
        out_PO.copy_(of_few_rows(linear, x_PI))
    else:
        torch.mm(x_PI, linear.weight.T, out=out_PO)


def _add_expert(module: Any, rows: OfExpert, x_TD: Tensor, y_TD: Tensor, room: Room) -> None:
    """Add an expert's neurons to ``room.z_PF``, what its down delta makes of them to ``y_TD``."""
    expert, delta, h_NF = rows.expert, module.delta, room.h_NF[: len(rows.token_N)]
    torch.index_select(room.base_PF, 0, rows.pair_N, out=h_NF)
    if module.scale is not None:
        h_NF.mul_(module.scale[expert])
    if delta is not None:
        # MKL is faster at a product of few columns the other way round.
        inner_RN = delta.gate_up_a[expert] @ x_TD.index_select(0, rows.token_N).T
        h_NF.addmm_(inner_RN.T, delta.gate_up_b[expert].T)
    if module.bias is not None:
        h_NF.add_(module.bias[expert])
    z_NF = module.gating(*h_NF.chunk(2, -1)) * rows.weight_N.unsqueeze(-1)
    z_NF = z_NF.to(h_NF.dtype)
    room.z_PF.index_add_(0, rows.pair_N, z_NF)
    if delta is not None:
        inner_RN = delta.down_a[expert] @ z_NF.T
        y_ND = inner_RN.T @ delta.down_b[expert].T
        y_TD.index_add_(0, rows.token_N, y_ND.to(y_TD.dtype))
