"""The slow, plain twin of the fused experts: the formula, token by token, in fp32.

Every faster path is tested against this one, outputs and gradients. It knows nothing of sorting,
grouping or dtypes; it trades all speed for being readable beside the formula::

    h_te = s_e * (Wgu_g x_t) + Bgu_e Agu_e x_t + b_e
    z_te = w_te * act(gate half of h_te) * (up half of h_te)
    y_t  = sum_g Wd_g (sum over chosen e in g of z_te) + sum over chosen e of Bd_e Ad_e z_te
"""

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import FusedExperts, LowRankDelta


def naive_forward(module: FusedExperts, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    """Return the fused experts' output, (T, D) fp32, for ``x_TD``, ``index_TK`` and ``w_TK``."""
    rows = [
        _token(module, x_D, index_K.tolist(), w_K)
        for x_D, index_K, w_K in zip(x_TD.float(), index_TK, w_TK.float(), strict=True)
    ]
    return torch.stack(rows) if rows else x_TD.float()


def _token(module: FusedExperts, x_D: Tensor, experts: list[int], w_K: Tensor) -> Tensor:
    y_D = torch.zeros_like(x_D)
    for group, base in enumerate(module.bases):
        summed_F = torch.zeros_like(base.down_proj.weight[0].float())  # type: ignore[union-attr]
        for expert, w in zip(experts, w_K, strict=True):
            if int(module.group_of_expert[expert]) != group:
                continue
            h_F = base.gate_up_proj.weight.float() @ x_D  # type: ignore[union-attr]
            z_F = w * _neurons(module, expert, h_F, x_D)
            summed_F = summed_F + z_F
            if module.delta is not None:
                b, a = _factors(module, "down", expert)
                y_D = y_D + b @ (a @ z_F)
        y_D = y_D + base.down_proj.weight.float() @ summed_F  # type: ignore[union-attr]
    return y_D


def _neurons(module: FusedExperts, expert: int, h_F: Tensor, x_D: Tensor) -> Tensor:
    if module.scale is not None:
        h_F = h_F * module.scale[expert].float()
    if module.delta is not None:
        b, a = _factors(module, "gate_up", expert)
        h_F = h_F + b @ (a @ x_D)
    if module.bias is not None:
        h_F = h_F + module.bias[expert].float()
    gate_F, up_F = h_F.chunk(2)
    return module.act_fn(gate_F) * up_F


def _factors(module: FusedExperts, part: str, expert: int) -> tuple[Tensor, Tensor]:
    delta = module.delta
    assert isinstance(delta, LowRankDelta)
    return (
        getattr(delta, f"{part}_b")[expert].float(),
        getattr(delta, f"{part}_a")[expert].float(),
    )
