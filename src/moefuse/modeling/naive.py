"""The slow, plain twin of the fused experts: the formula, token by token, in fp32.

Every faster path is tested against this one, outputs and gradients. It knows nothing of sorting,
grouping or dtypes; it trades all speed for being readable beside the formula::

    h_te = s_e * (Wgu_g x_t) + Bgu_e Agu_e x_t + b_e
    z_te = w_te * gating(gate half of h_te, up half of h_te)
    y_t  = sum_g Wd_g (sum over chosen e in g of z_te)
           + sum over chosen e of (Bd_e Ad_e z_te + w_te * c_e)

and for neuron experts, one neuron after another::

    neuron_f(x) = gating(gate_f . x, up_f . x) * down_f       plus their biases, if there are any
    y_t = sum over chosen e of w_te (sum over own f of e of neuron_f(x_t)
                                     + sum over shared f of gain_ef neuron_f(x_t) + c_e)
"""

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import (
    CodedRows,
    FusedExperts,
    Gating,
    LowRankDelta,
    NeuronExperts,
)


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
            if module.down_bias is not None:
                y_D = y_D + w * module.down_bias[expert].float()
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
    return module.gating(gate_F, up_F)


def _factors(module: FusedExperts, part: str, expert: int) -> tuple[Tensor, Tensor]:
    delta = module.delta
    assert isinstance(delta, LowRankDelta)
    return (
        getattr(delta, f"{part}_b")[expert].float(),
        getattr(delta, f"{part}_a")[expert].float(),
    )


def naive_neurons(module: NeuronExperts, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    """Return the neuron experts' output, (T, D) fp32, for ``x_TD``, ``index_TK`` and ``w_TK``."""
    own = [own_neurons(module, expert) for expert in range(module.num_experts)]
    shared = [] if module.shared is None else _with_biases(module.shared, module.shared_bias)
    gain_ES = None if module.gain is None else all_rows(module.gain)[0]
    rows = []
    for x_D, index_K, w_K in zip(x_TD.float(), index_TK.tolist(), w_TK.float(), strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, w in zip(index_K, w_K, strict=True):
            for neuron in own[expert]:
                y_D = y_D + w * _neuron(neuron, x_D, module.gating)
            for number, neuron in enumerate(shared):
                assert gain_ES is not None
                gain = gain_ES[expert, number]
                y_D = y_D + w * gain * _neuron(neuron, x_D, module.gating)
            if module.down_bias is not None:
                y_D = y_D + w * module.down_bias[expert].float()
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.float()


Neuron = tuple[Tensor, Tensor]
"""A neuron's (3, D) rows of gate, up and down, and the biases (2,) of the first two."""


def own_neurons(module: NeuronExperts, expert: int) -> list[Neuron]:
    """Return an expert's own neurons, fewest bits first."""
    found: list[Neuron] = []
    for (name, rows), width_E in zip(module.own.items(), module.widths.tolist(), strict=True):
        start = sum(width_E[:expert])
        bias = None if module.own_bias is None else module.own_bias[name]
        found += _with_biases(rows, bias)[start : start + width_E[expert]]
    return found


def _with_biases(rows: torch.nn.Module, bias: torch.nn.Module | None) -> list[Neuron]:
    rows_PMD = all_rows(rows)
    bias_PM = rows_PMD.new_zeros(2, rows_PMD.shape[1])
    if bias is not None:
        bias_PM = all_rows(bias)[..., 0]
    return list(zip(rows_PMD.unbind(1), bias_PM.unbind(1), strict=True))


def all_rows(rows: torch.nn.Module) -> Tensor:
    """Return plain or coded rows as numbers, (parts, rows, width) fp32, code by code.

    A row's bytes are one number, the first byte lowest, in which the first code is lowest.
    """
    if not isinstance(rows, CodedRows):
        return rows.weight.float().view(rows.shape)  # type: ignore[union-attr, operator]
    parts, count, _ = rows.codes.shape
    decoded = torch.zeros(parts, count, rows.width)
    for part in range(parts):
        for row in range(count):
            number = int.from_bytes(rows.codes[part, row].tolist(), "little")
            mask = 2**rows.code_bits - 1
            codes = [(number >> place * rows.code_bits) & mask for place in range(rows.count)]
            values_I = rows.codebook[codes].float().flatten()[: rows.width]
            decoded[part, row] = values_I * rows.scale[part, row].float()
    return decoded


def _neuron(neuron: Neuron, x_D: Tensor, gating: Gating) -> Tensor:
    (gate_D, up_D, down_D), (gate_bias, up_bias) = neuron
    return gating(gate_D @ x_D + gate_bias, up_D @ x_D + up_bias) * down_D
