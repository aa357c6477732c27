"""Triton kernels of what lies between grouped products: gathers, gatings, sums, and gradients.

A row is a (token, slot) pair in the order of its expert, a pair a (token, group) pair in the order
of its group. Tables tell for every slot of a token its row and its pair. A program sums what it
writes by itself, never by atomic additions: the same input gives the same bytes. Sums are fp32.

Arguments named ``*_of_slot`` and ``index`` and ``weight`` are (T, K), ``token_of_pair`` (P);
``pairs`` points to how many pairs there really are, since tensors have room for the most there can
be. ``base`` is (P, 2F), ``delta`` (N, 2F), ``scale`` and ``bias`` (E, 2F), all gate first.
"""

import triton
import triton.language as tl

from moefuse.modeling.kernels.triton_kernels import GELU, SILU


@triton.jit
def collect(source, place_of_slot, out, width, top_k, COLUMNS: tl.constexpr):
    """Sum rows of ``source`` for every token: those its slots name, -1 naming none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in range(0, top_k):
        place = tl.load(place_of_slot + token * top_k + slot).to(tl.int64)
        if place >= 0:
            row = tl.load(source + place * width + column, mask=inside, other=0.0)
            total += row.to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def spread(source, token_of_place, places, out, width, COLUMNS: tl.constexpr):
    """Give every place its token's row of ``source``, as far as there are ``places``."""
    place = tl.program_id(0).to(tl.int64)
    if place < tl.load(places):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        token = tl.load(token_of_place + place).to(tl.int64)
        row = tl.load(source + token * width + column, mask=inside, other=0.0)
        tl.store(out + place * width + column, row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _parts(gate, up, alpha, limit, GATING: tl.constexpr):
    """Return the factors of a neuron's value, of gate and of up, and the slope of each."""
    of_up = up
    up_slope = tl.full(up.shape, 1.0, tl.float32)
    if GATING == SILU:
        gain = tl.sigmoid(gate)
        of_gate = gate * gain
        gate_slope = gain * (1.0 + gate * (1.0 - gain))
    elif GATING == GELU:
        gain = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        of_gate = gate * gain
        gate_slope = gain + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        held = tl.minimum(gate, limit)
        gain = tl.sigmoid(held * alpha)
        of_gate = held * gain
        gate_slope = tl.where(gate <= limit, gain + of_gate * alpha * (1.0 - gain), 0.0)
        of_up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        up_slope = tl.where((up >= -limit) & (up <= limit), 1.0, 0.0)
    return of_gate, of_up, gate_slope, up_slope


@triton.jit
def _neuron_inputs(
    base_gate,
    base_up,
    delta,
    scale,
    bias,
    row,
    expert,
    column,
    inside,
    width,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Return gate and up of one row, and the scales of both, 1 where there are none."""
    gate, up, gate_scale, up_scale = base_gate, base_up, 1.0, 1.0
    if SCALE:
        at = scale + expert * 2 * width + column
        gate_scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up_scale = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        gate *= gate_scale
        up *= up_scale
    if DELTA:
        at = delta + row * 2 * width + column
        gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        at = bias + expert * 2 * width + column
        gate += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    return gate, up, gate_scale, up_scale


@triton.jit
def join(
    base,
    delta,
    scale,
    bias,
    weight,
    index,
    pair_of_slot,
    row_of_slot,
    token_of_pair,
    pairs,
    z,
    summed,
    width,
    top_k,
    alpha,
    limit,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write every row's neurons times its routing weight to ``z`` (N, F), with a ``DELTA`` only,
    and their sum over the rows of a pair to ``summed`` (P, F)."""
    pair = tl.program_id(0).to(tl.int64)
    if pair < tl.load(pairs):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        at = base + pair * 2 * width + column
        base_gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        base_up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(token_of_pair + pair).to(tl.int64) * top_k
        total = tl.zeros([COLUMNS], tl.float32)
        for slot in range(first, first + top_k):
            if tl.load(pair_of_slot + slot) == pair:
                row = tl.load(row_of_slot + slot).to(tl.int64)
                gate, up, _, _ = _neuron_inputs(
                    base_gate, base_up, delta, scale, bias, row,
                    tl.load(index + slot).to(tl.int64), column, inside, width, DELTA, SCALE, BIAS,
                )  # fmt: skip
                of_gate, of_up, _, _ = _parts(gate, up, alpha, limit, GATING)
                value = of_gate * of_up * tl.load(weight + slot).to(tl.float32)
                total += value
                if DELTA:
                    value = value.to(z.dtype.element_ty)
                    tl.store(z + row * width + column, value, mask=inside)
        tl.store(summed + pair * width + column, total.to(summed.dtype.element_ty), mask=inside)


@triton.jit
def join_backward(
    base,
    towards_z,
    towards_summed,
    delta,
    scale,
    bias,
    weight,
    index,
    pair_of_slot,
    row_of_slot,
    token_of_pair,
    pairs,
    towards_base,
    towards_h,
    towards_weight,
    rows,
    width,
    top_k,
    alpha,
    limit,
    DELTA: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    TOWARDS: tl.constexpr,
    BY_ROW: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradients of ``join``: of bases (P, 2F); ``BY_ROW``, of gate and up (N, 2F); with
    ``WEIGHTS``, of the routing weights, a part (``rows``) for each block of columns."""
    pair = tl.program_id(0).to(tl.int64)
    if pair < tl.load(pairs):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        at = base + pair * 2 * width + column
        base_gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        base_up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        at = towards_summed + pair * width + column
        towards_sum = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(token_of_pair + pair).to(tl.int64) * top_k
        total_gate = tl.zeros([COLUMNS], tl.float32)
        total_up = tl.zeros([COLUMNS], tl.float32)
        for slot in range(first, first + top_k):
            if tl.load(pair_of_slot + slot) == pair:
                row = tl.load(row_of_slot + slot).to(tl.int64)
                gate, up, gate_scale, up_scale = _neuron_inputs(
                    base_gate, base_up, delta, scale, bias, row,
                    tl.load(index + slot).to(tl.int64), column, inside, width, DELTA, SCALE, BIAS,
                )  # fmt: skip
                towards = towards_sum
                if TOWARDS:
                    at = towards_z + row * width + column
                    towards += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                of_gate, of_up, gate_slope, up_slope = _parts(gate, up, alpha, limit, GATING)
                if WEIGHTS:
                    part = tl.sum(tl.where(inside, towards * of_gate * of_up, 0.0), 0)
                    tl.store(towards_weight + tl.program_id(1).to(tl.int64) * rows + slot, part)
                towards *= tl.load(weight + slot).to(tl.float32)
                towards_gate = towards * of_up * gate_slope
                towards_up = towards * of_gate * up_slope
                total_gate += towards_gate * gate_scale
                total_up += towards_up * up_scale
                if BY_ROW:
                    at = towards_h + row * 2 * width + column
                    kind = towards_h.dtype.element_ty
                    tl.store(at, towards_gate.to(kind), mask=inside)
                    tl.store(at + width, towards_up.to(kind), mask=inside)
        at = towards_base + pair * 2 * width + column
        kind = towards_base.dtype.element_ty
        tl.store(at, total_gate.to(kind), mask=inside)
        tl.store(at + width, total_up.to(kind), mask=inside)


@triton.jit
def sum_by_expert(
    towards_h,
    base,
    pair_of_row,
    last_of_expert,
    towards_scale,
    towards_bias,
    width,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum what an expert's rows say of its scale and of its bias: (E, ``width``) each."""
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = tl.load(last_of_expert + expert - 1, mask=expert > 0, other=0)
    last = tl.load(last_of_expert + expert)
    of_scale = tl.zeros([COLUMNS], tl.float32)
    of_bias = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        there = live[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        towards = tl.load(towards_h + at, mask=there, other=0.0).to(tl.float32)
        if BIAS:
            of_bias += tl.sum(towards, 0)
        if SCALE:
            pair = tl.load(pair_of_row + row, mask=live, other=0).to(tl.int64)
            at = pair[:, None] * width + column[None, :]
            given = tl.load(base + at, mask=there, other=0.0).to(tl.float32)
            of_scale += tl.sum(towards * given, 0)
    if SCALE:
        tl.store(towards_scale + expert * width + column, of_scale, mask=inside)
    if BIAS:
        tl.store(towards_bias + expert * width + column, of_bias, mask=inside)
