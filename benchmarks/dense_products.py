"""Experts of tiny models by a few large products: every expert multiplies every token.

A GPU is done with one of the bundled teacher's experts before it has been told of the next, and
waits whenever it is asked how many tokens an expert has. Here all experts' weights stand side by
side in one matrix and the experts that a token did not choose weigh nothing: several times the
arithmetic, in a few products. The sums are the same but for their order.

Shape suffixes: T tokens, K chosen experts, E experts, D hidden width, F intermediate width,
M neurons of all experts, N numbers of a vector.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import PlainGating
from moefuse.modeling.training import TrainedNeuronExperts, TrainedRows


def multiply_densely(model: nn.Module) -> nn.Module:
    """Let all experts below ``model`` that are known here multiply densely; returns ``model``."""
    for module in model.modules():
        if isinstance(module, FusedExperts):
            _replace(module, partial(_fused, module))
        elif isinstance(module, TrainedNeuronExperts):
            experts = torch.arange(module.num_experts, device=module.widths.device)
            expert_M = experts.expand_as(module.widths).flatten()
            expert_M = expert_M.repeat_interleave(module.widths.flatten())
            _replace(module, partial(_neurons, module, expert_M))
        elif isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            _replace(module, partial(_native, module))
    return model


def _replace(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def dense_experts(
    x_TD: Tensor,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    bias_EH: Tensor | None,
    gating: Callable[[Tensor, Tensor], Tensor],
    weight_TE: Tensor,
) -> Tensor:
    """Return what all experts make of all tokens, (T, D); H is 2F, ``weight_TE`` mostly zeros."""
    experts, double, width = gate_up_EHD.shape
    h_TM = x_TD @ gate_up_EHD.reshape(experts * double, width).T
    if bias_EH is not None:
        h_TM = h_TM + bias_EH.flatten()
    gate_TEF, up_TEF = h_TM.view(len(x_TD), experts, double).chunk(2, -1)
    z_TEF = gating(gate_TEF, up_TEF) * weight_TE.to(h_TM.dtype).unsqueeze(-1)
    return (z_TEF.flatten(1) @ down_EDF.mT.flatten(0, 1)).to(x_TD.dtype)


def weights_of_all(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Return every expert's weight for every token, (T, E), fp32."""
    zeros_TE = torch.zeros(len(index_TK), experts, device=weight_TK.device)
    return zeros_TE.scatter_add(1, index_TK.long(), weight_TK.float())


def _native(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    weight_TE = weights_of_all(index_TK, weight_TK, len(module.gate_up_proj))
    gating = PlainGating(module.act_fn)
    return dense_experts(x_TD, module.gate_up_proj, module.down_proj, None, gating, weight_TE)


def _fused(module: FusedExperts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    bases: Any = module.bases
    gate_up_EHD, down_EDF = (
        torch.stack([getattr(base, name).weight for base in bases])[module.group_of_expert]
        for name in ("gate_up_proj", "down_proj")
    )
    if module.scale is not None:
        gate_up_EHD = gate_up_EHD * module.scale.unsqueeze(-1)
    if module.delta is not None:
        gate_up_EHD = gate_up_EHD + module.delta.gate_up_b @ module.delta.gate_up_a
        down_EDF = down_EDF + module.delta.down_b @ module.delta.down_a
    weight_TE = weights_of_all(index_TK, weight_TK, module.num_experts)
    return dense_experts(x_TD, gate_up_EHD, down_EDF, module.bias, module.gating, weight_TE)


def _neurons(
    module: TrainedNeuronExperts, expert_M: Tensor, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor
) -> Tensor:
    for rows in module.modules():
        if isinstance(rows, TrainedRows):
            rows.refresh()
    y_TD = torch.zeros_like(x_TD)
    if len(module.own):
        own: Any = module.own.values()
        gate_MD, up_MD, down_MD = torch.cat([rows.read(0, None) for rows in own], 1).unbind(0)
        z_TM = module.gating(x_TD @ gate_MD.T, x_TD @ up_MD.T)
        weight_TE = weights_of_all(index_TK, w_TK, module.num_experts).to(z_TM.dtype)
        y_TD = ((z_TM * weight_TE.index_select(1, expert_M)) @ down_MD).to(x_TD.dtype)
    if module.shared is not None:
        weight_TE = weights_of_all(index_TK, w_TK, module.num_experts).to(x_TD.dtype)
        y_TD = y_TD + module._shared(x_TD, weight_TE)
    return y_TD
