"""What lies between the grouped products of fused experts, with gradients: no wait for the host.

Each of ``collect``, ``spread`` and ``join`` has two ways: Triton's kernels on a GPU (or where they
are interpreted), and PyTorch's own operations elsewhere. Neither adds in an order that may differ
between two runs on one device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moefuse.modeling.kernels.installed import INSTALLED, INTERPRETED

if INSTALLED or TYPE_CHECKING:
    import triton

    from moefuse.modeling.kernels import joining_kernels as kernels

COLUMNS = 512
"""Columns of one program, 8 a thread."""
GAIN_ROWS, GAIN_COLUMNS = 32, 64
"""The tile in which gradients of scales and biases are summed."""


@dataclass(frozen=True)
class Rows:
    """One call's rows by expert, and its (token, group) pairs by group; all on its device.

    ``index_TK`` (T, K) int32 is what was called for. ``row_TK`` and ``pair_TK`` (T, K) int32 tell
    where each slot's row and pair lie; ``once_TK`` is ``pair_TK`` with -1 where an earlier slot of
    the token has the same pair. ``order_N``, the number t * K + k of the slot, ``expert_N``,
    ``token_N`` and ``pair_N`` (N) int64 are each row's, and ``token_P`` (P) int64 each pair's, 0
    from where there are no more. ``last_E`` and ``last_G``
    int32 tell where each expert's rows and each group's pairs end; ``count`` (1) is how many pairs
    there are, ``all_rows`` (1) how many rows.
    """

    index_TK: Tensor
    row_TK: Tensor
    pair_TK: Tensor
    once_TK: Tensor
    order_N: Tensor
    expert_N: Tensor
    token_N: Tensor
    pair_N: Tensor
    token_P: Tensor
    last_E: Tensor
    last_G: Tensor
    count: Tensor
    all_rows: Tensor


def rows_of(index_TK: Tensor, group_of_expert: Tensor, groups: int) -> Rows:
    """Order a call's rows and pairs. P is the most pairs there can be, T * min(K, G)."""
    tokens, top_k = index_TK.shape
    device, number = index_TK.device, tokens * top_k
    experts = len(group_of_expert)
    small = torch.uint8 if experts <= 256 else torch.int32
    expert_N, order_N = index_TK.reshape(-1).to(small).sort(stable=True)
    every_E = torch.arange(experts, device=device, dtype=torch.int32)
    last_E = torch.searchsorted(expert_N.int(), every_E, right=True, out_int32=True)
    row_TK = torch.empty(number, dtype=torch.int32, device=device)
    row_TK.scatter_(0, order_N, torch.arange(number, device=device, dtype=torch.int32))

    group_TK = group_of_expert[index_TK]
    hit_GT = torch.zeros(groups, tokens, dtype=torch.bool, device=device)
    hit_GT.scatter_(0, group_TK.T, True)
    stop_GT = hit_GT.reshape(-1).cumsum(0, dtype=torch.int32).view(groups, tokens)
    last_G = stop_GT[:, -1].contiguous()
    pair_KT = stop_GT.gather(0, group_TK.T) - 1
    same_KKT = pair_KT.unsqueeze(0) == pair_KT.unsqueeze(1)
    earlier_KK1 = torch.ones(top_k, top_k, dtype=torch.bool, device=device).tril(-1).unsqueeze(-1)
    once_KT = pair_KT.masked_fill((same_KKT & earlier_KK1).any(1), -1)
    most = tokens * min(top_k, groups)
    place_GT = torch.where(hit_GT, stop_GT - 1, most).long()
    token_GT = torch.arange(tokens, device=device).expand(groups, tokens)
    token_P = torch.zeros(most + 1, dtype=torch.int64, device=device)
    token_P.scatter_(0, place_GT.reshape(-1), token_GT.reshape(-1))
    pair_TK = pair_KT.T.contiguous()
    return Rows(
        index_TK.int().contiguous(),
        row_TK.view(tokens, top_k),
        pair_TK,
        once_KT.T.contiguous(),
        order_N,
        expert_N.long(),
        order_N // top_k,
        pair_TK.reshape(-1).long().index_select(0, order_N),
        token_P[:most],
        last_E,
        last_G,
        last_G[-1:],
        last_E[-1:],
    )


def collect(
    source_SD: Tensor, place_TK: Tensor, token_S: Tensor, places: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sum for every token the rows of ``source_SD`` that it names, -1 naming none: (T, D).

    ``token_S`` and ``places`` say whose the rows are and how many there are, for the gradient.
    """
    return _Collect.apply(source_SD, place_TK, token_S, places, dtype)  # type: ignore[return-value]


def spread(x_TD: Tensor, token_S: Tensor, places: Tensor, place_TK: Tensor) -> Tensor:
    """Give each place its token's row, (S, D), undefined from ``places`` on; see ``collect``."""
    return _Spread.apply(x_TD, token_S, places, place_TK)  # type: ignore[return-value]


def by_triton(tensor: Tensor) -> bool:
    """Tell whether Triton's kernels take ``tensor``."""
    return INSTALLED and (tensor.is_cuda or INTERPRETED)


def _collected(source_SD: Tensor, place_TK: Tensor, dtype: torch.dtype) -> Tensor:
    tokens, top_k = place_TK.shape
    width = source_SD.shape[1]
    if by_triton(source_SD):
        out_TD = source_SD.new_empty(tokens, width, dtype=dtype)
        grid = (tokens, triton.cdiv(width, COLUMNS))
        source_SD = source_SD.contiguous()
        _launch(kernels.collect, grid, source_SD, place_TK, out_TD, width, top_k)
        return out_TD
    picked_ND = source_SD.index_select(0, place_TK.reshape(-1).clamp_min(0))
    picked_TKD = picked_ND.float().view(tokens, top_k, width)
    return picked_TKD.masked_fill((place_TK < 0).unsqueeze(-1), 0.0).sum(1).to(dtype)


def _spread(source_TD: Tensor, token_S: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    if not by_triton(source_TD):
        return source_TD.index_select(0, token_S).to(dtype)
    width = source_TD.shape[1]
    out_SD = source_TD.new_empty(len(token_S), width, dtype=dtype)
    grid = (len(token_S), triton.cdiv(width, COLUMNS))
    _launch(kernels.spread, grid, source_TD.contiguous(), token_S, places, out_SD, width)
    return out_SD


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **{"COLUMNS": COLUMNS, "num_warps": 2, **constants})


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        source_SD: Tensor,
        place_TK: Tensor,
        token_S: Tensor,
        places: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(token_S, places)
        ctx.dtype = source_SD.dtype
        return _collected(source_SD, place_TK, dtype)

    @staticmethod
    def backward(ctx: Any, towards_TD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        token_S, places = ctx.saved_tensors
        return _spread(towards_TD, token_S, places, ctx.dtype), None, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: Tensor, token_S: Tensor, places: Tensor, place_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(place_TK)
        return _spread(x_TD, token_S, places, x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, towards_SD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (place_TK,) = ctx.saved_tensors
        return _collected(towards_SD, place_TK, towards_SD.dtype), None, None, None


def join(
    base_PF: Tensor,
    delta_NF: Tensor | None,
    scale_EF: Tensor | None,
    bias_EF: Tensor | None,
    weight_TK: Tensor,
    rows: Rows,
    gating: Any,
    number: tuple[int, float, float] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the weighted values of neurons, summed by pair (P, F) and, with deltas, by row (N, F).

    ``base_PF`` (P, 2F) is what bases make of each pair and ``delta_NF`` (N, 2F) what deltas add to
    each row; ``scale_EF`` and ``bias_EF`` (E, 2F) may be absent. ``number`` is the kernels' number,
    alpha and limit of ``gating``; None where they do not know it.
    """
    if number is not None and by_triton(base_PF):
        given = (base_PF, delta_NF, scale_EF, bias_EF, weight_TK.contiguous())
        summed_PF, z_NF = _Join.apply(*given, rows, number)  # type: ignore[misc]
        return summed_PF, z_NF
    h_NF = base_PF.index_select(0, rows.pair_N)
    if scale_EF is not None:
        h_NF = h_NF * scale_EF.index_select(0, rows.expert_N)
    if delta_NF is not None:
        h_NF = h_NF + delta_NF
    if bias_EF is not None:
        h_NF = h_NF + bias_EF.index_select(0, rows.expert_N)
    weight_N = weight_TK.reshape(-1).index_select(0, rows.order_N)
    gate_NF, up_NF = h_NF.chunk(2, dim=-1)
    z_NF = (gating(gate_NF, up_NF) * weight_N.unsqueeze(-1)).to(base_PF.dtype)
    summed_PF = z_NF.new_zeros(len(base_PF), z_NF.shape[1]).index_add(0, rows.pair_N, z_NF)
    return summed_PF, None if delta_NF is None else z_NF


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        base_PF: Tensor,
        delta_NF: Tensor | None,
        scale_EF: Tensor | None,
        bias_EF: Tensor | None,
        weight_TK: Tensor,
        rows: Rows,
        gating: tuple[int, float, float],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(base_PF, delta_NF, scale_EF, bias_EF, weight_TK)
        ctx.rows, ctx.gating = rows, gating
        ctx.set_materialize_grads(False)
        pairs, width = len(base_PF), base_PF.shape[1] // 2
        summed_PF = base_PF.new_empty(pairs, width)
        z_NF = None if delta_NF is None else base_PF.new_empty(len(delta_NF), width)
        _launch(
            kernels.join, (pairs, triton.cdiv(width, COLUMNS)),
            base_PF, delta_NF, scale_EF, bias_EF, weight_TK, *_tables(rows), z_NF, summed_PF,
            width, weight_TK.shape[1], *gating[1:],
            DELTA=delta_NF is not None, SCALE=scale_EF is not None, BIAS=bias_EF is not None,
            GATING=gating[0],
        )  # fmt: skip
        return summed_PF, z_NF

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, towards_PF: Tensor, towards_NF: Tensor | None
    ) -> tuple[Any, ...]:
        base_PF, delta_NF, scale_EF, bias_EF, weight_TK = ctx.saved_tensors
        rows, (kind, alpha, limit) = ctx.rows, ctx.gating
        blocks = triton.cdiv(base_PF.shape[1] // 2, COLUMNS)
        by_row = any(ctx.needs_input_grad[1:4])
        number = weight_TK.numel()
        base_grad = torch.empty_like(base_PF)
        h_grad = base_PF.new_empty(number, base_PF.shape[1]) if by_row else None
        parts = weight_TK.new_empty(blocks, number, dtype=torch.float32)
        _launch(
            kernels.join_backward, (len(base_PF), blocks),
            base_PF, None if towards_NF is None else towards_NF.contiguous(),
            towards_PF.contiguous(), delta_NF, scale_EF, bias_EF, weight_TK, *_tables(rows),
            base_grad, h_grad, parts, number, base_PF.shape[1] // 2, weight_TK.shape[1],
            alpha, limit,
            DELTA=delta_NF is not None, TOWARDS=towards_NF is not None,
            SCALE=scale_EF is not None, BIAS=bias_EF is not None, GATING=kind, BY_ROW=by_row,
            WEIGHTS=ctx.needs_input_grad[4],
        )  # fmt: skip
        weight_grad = None
        if ctx.needs_input_grad[4]:
            weight_grad = parts.sum(0).view_as(weight_TK).to(weight_TK.dtype)
        gains = (None, None)
        if h_grad is not None and any(ctx.needs_input_grad[2:4]):
            gains = _gains(h_grad, base_PF, scale_EF, bias_EF, rows)
        delta_grad = h_grad if ctx.needs_input_grad[1] else None
        return base_grad, delta_grad, *gains, weight_grad, None, None


def _tables(rows: Rows) -> tuple[Tensor, ...]:
    return rows.index_TK, rows.pair_TK, rows.row_TK, rows.token_P, rows.count


def _gains(
    h_grad: Tensor, base_PF: Tensor, scale_EF: Tensor | None, bias_EF: Tensor | None, rows: Rows
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of scales and biases, (E, 2F) each where there are any."""
    width, experts = base_PF.shape[1], len(rows.last_E)
    shape = (experts, width)
    found = [
        None if given is None else torch.empty(shape, device=h_grad.device)
        for given in (scale_EF, bias_EF)
    ]
    _launch(
        kernels.sum_by_expert, (experts, triton.cdiv(width, GAIN_COLUMNS)),
        h_grad, base_PF, rows.pair_N, rows.last_E, *found, width,
        SCALE=scale_EF is not None, BIAS=bias_EF is not None, ROWS=GAIN_ROWS,
        COLUMNS=GAIN_COLUMNS, num_warps=4,
    )  # fmt: skip
    given = (scale_EF, bias_EF)
    scale_grad, bias_grad = (
        None if sums is None or parameter is None else sums.to(parameter.dtype)
        for sums, parameter in zip(found, given, strict=True)
    )
    return scale_grad, bias_grad
