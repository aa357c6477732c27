"""The fused experts by PyTorch's grouped products, with gradients: what trains them on a GPU.

As the plain way does, a base multiplies each (token, group) pair once, and members are summed
before the down projection. Nothing waits for the host: tensors have room for as many pairs as there
can be, and offsets on the device say where a group's pairs end. What lies between products is in
``joining``.

A delta's outer factors, the A of gate and up and the B of down, multiply every token by the factors
of all experts at once where these are few: that moves less memory than a copy of a token's numbers
for each of its experts does.

Shape suffixes as in ``modeling_moefuse``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moefuse.modeling.kernels.gatings import number_of
from moefuse.modeling.kernels.installed import INSTALLED
from moefuse.modeling.kernels.joining import Rows, collect, join, rows_of, spread
from moefuse.modeling.kernels.weights import obstacle_of_weights
from moefuse.modeling.modeling_moefuse import weight_of_experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNED = 16
"""Bytes that a row of every operand must be a multiple of."""
FILLED_RANK = 8
DENSE_RANKS = 256
"""How many ranks of all experts together, for each expert that a token chooses, are few."""


def computed_dtype(x_TD: Tensor) -> torch.dtype:
    """Return what the products are computed in: autocast's dtype where it is on."""
    kind = x_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype


def obstacle(module: Any, x_TD: Tensor) -> str | None:
    """Say what of ``module`` or ``x_TD`` (T, D) grouped products cannot compute, or None."""
    dtype = computed_dtype(x_TD)
    found = None
    if not hasattr(nn.functional, "grouped_mm"):
        found = f"PyTorch {torch.__version__} has no grouped_mm; 2.10 has"
    elif dtype not in DTYPES:
        found = f"grouped products are in float32, bfloat16 and float16, not {dtype}"
    elif not hasattr(module, "bases"):
        found = "grouped products compute students of bases, not of own neurons"
    elif module.delta is not None and type(module.delta).__name__ != "LowRankDelta":
        found = "grouped products know low-rank deltas alone"
    elif (strange := _strange_weights(module, x_TD)) is not None:
        found = strange
    elif x_TD.device.type not in ("cpu", "cuda"):
        found = f"the input is on {x_TD.device.type}"
    elif any(width * dtype.itemsize % ALIGNED for width in module.bases[0].down_proj.weight.shape):
        found = f"rows of grouped products must be multiples of {ALIGNED} bytes"
    elif x_TD.is_cuda and not INSTALLED:
        found = "grouped products need Triton on a GPU"
    elif x_TD.is_cuda and number_of(module.gating) is None:
        found = "beside grouped products on a GPU are kernels for silu, gelu and gpt-oss's gating"
    return found


def _strange_weights(module: Any, x_TD: Tensor) -> str | None:
    return obstacle_of_weights(module, x_TD, casts=torch.is_autocast_enabled(x_TD.device.type))


def pays(x_TD: Tensor) -> bool:
    """Tell whether grouped products are one kernel: for bfloat16 from Hopper on."""
    if not x_TD.is_cuda or computed_dtype(x_TD) != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x_TD.device) >= (9, 0)


@torch.compiler.disable
def forward(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output of ``module``, (T, D), for which there is no ``obstacle``."""
    if not index_TK.numel():
        return module.plain_compute(x_TD, index_TK, weight_TK)
    dtype, delta, bases = computed_dtype(x_TD), module.delta, module.bases
    rows = rows_of(index_TK, module.group_of_expert, len(bases))
    source_TD = x_TD.to(dtype)
    x_PD = spread(source_TD, rows.token_P, rows.count, rows.once_TK)
    gate_up_GFD = stacked(dtype, [base.gate_up_proj.weight for base in bases])
    base_PF = product(x_PD, gate_up_GFD, rows.last_G)
    delta_NF = None
    if delta is not None:
        a_ERD, b_EFR = filled(delta.gate_up_a.to(dtype), delta.gate_up_b.to(dtype))
        delta_NF = product(inner_of_tokens(source_TD, a_ERD, rows), b_EFR, rows.last_E)
    own = (module.scale, module.bias, weight_TK)
    z_PF, z_NF = join(base_PF, delta_NF, *own, rows, module.gating, number_of(module.gating))
    down_GDF = stacked(dtype, [base.down_proj.weight for base in bases])
    y_PD = product(z_PF, down_GDF, rows.last_G)
    y_TD = collect(y_PD, rows.once_TK, rows.token_P, rows.count, torch.float32)
    if delta is not None and z_NF is not None:
        a_ERF, b_EDR = filled(delta.down_a.to(dtype), delta.down_b.to(dtype))
        y_TD = y_TD + outer_by_token(product(z_NF, a_ERF, rows.last_E), b_EDR, rows)
    if module.down_bias is not None:
        weight_TE = weight_of_experts(index_TK, weight_TK, module.num_experts)
        y_TD = y_TD + weight_TE @ module.down_bias.float()
    return y_TD.to(x_TD.dtype)


def product(x_NI: Tensor, weight_EOI: Tensor, last_E: Tensor) -> Tensor:
    """Apply each expert's or group's matrix to its rows, (N, O); undefined after the last."""
    return nn.functional.grouped_mm(x_NI, weight_EOI.mT, offs=last_E)


def filled(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the ranks of both factors up with zeros to a multiple of ``FILLED_RANK``."""
    more = -a_ERI.shape[1] % FILLED_RANK
    if not more:
        return a_ERI, b_EOR
    return nn.functional.pad(a_ERI, (0, 0, 0, more)), nn.functional.pad(b_EOR, (0, more))


def _few(ranks: int, rows: Rows) -> bool:
    return ranks <= DENSE_RANKS * rows.index_TK.shape[1]


def _token_and_expert(rows: Rows, experts: int) -> Tensor:
    return rows.token_N * experts + rows.expert_N


def inner_of_tokens(x_TD: Tensor, a_ERD: Tensor, rows: Rows) -> Tensor:
    """Return ``A_e x`` for every row, (N, R)."""
    experts, rank, _ = a_ERD.shape
    if _few(experts * rank, rows):
        inner_SR = (x_TD @ a_ERD.flatten(0, 1).T).view(-1, rank)
        return inner_SR.index_select(0, _token_and_expert(rows, experts))
    x_ND = spread(x_TD, rows.token_N, rows.all_rows, rows.row_TK)
    return product(x_ND, a_ERD, rows.last_E)


def outer_by_token(inner_NR: Tensor, b_EDR: Tensor, rows: Rows) -> Tensor:
    """Return the sum of ``B_e`` times the inner values of each token's rows, (T, D)."""
    experts, _, rank = b_EDR.shape
    if _few(experts * rank, rows):
        tokens = len(rows.index_TK)
        inner_SR = inner_NR.new_zeros(tokens * experts, rank)
        inner_SR = inner_SR.index_add(0, _token_and_expert(rows, experts), inner_NR)
        return inner_SR.view(tokens, -1) @ b_EDR.mT.flatten(0, 1)
    y_ND = product(inner_NR, b_EDR, rows.last_E)
    return collect(y_ND, rows.row_TK, rows.token_N, rows.all_rows, torch.float32)


def stacked(dtype: torch.dtype, weights: list[Tensor]) -> Tensor:
    """Return matrices of one shape as one tensor of ``dtype``, (G, O, I)."""
    return _Stacked.apply(dtype, *weights)  # type: ignore[return-value]


class _Stacked(torch.autograd.Function):
    """``torch.stack`` that casts as it copies, which moves half as much memory."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = weights[0].dtype
        out_GOI = weights[0].new_empty(len(weights), *weights[0].shape, dtype=dtype)
        torch._foreach_copy_(list(out_GOI.unbind(0)), list(weights))  # type: ignore[reportPrivateImportUsage]
        return out_GOI

    @staticmethod
    def backward(ctx: Any, towards_GOI: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, *towards_GOI.to(ctx.dtype).unbind(0)
