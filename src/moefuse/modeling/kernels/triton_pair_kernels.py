"""Kernels for many rows: a base multiplies every (token, group) pair once, not every member's row.

Names of shapes are those of ``triton_kernels``; P pairs lie sorted by group, then by token.
"""

import triton
import triton.language as tl

from moefuse.modeling.kernels.triton_kernels import (
    _factor,
    _factors,
    _inner_of_tile,
    _lanes,
    gated,
    multiplied,
    tile_of_rows,
)

ONE = tl.constexpr(1)


@triton.jit
def product_of_pairs(
    source,
    place_of_pair,
    table,
    start,
    groups_first,
    every,
    expert_of_place,
    inner,
    b,
    out,
    groups,
    width,
    columns,
    most,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write every pair's product with its base: ``out`` (P, columns).

    ``source`` has rows ``width`` wide, ``place_of_pair`` says which is whose; a base is (columns,
    width). With ``RANK`` the deltas of all members are added, ``inner`` (P, most * R) holding what
    their first factors made, nought for members that were not chosen.
    """
    group, first, end = tile_of_rows(start, every, groups, tl.program_id(1), ROWS, PARTS)
    if group >= groups:
        return
    position = first + tl.arange(0, ROWS)
    live = position < end
    place = tl.load(place_of_pair + position, mask=live, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns

    base = tl.load(table + group).to(tl.pointer_type(source.dtype.element_ty))
    base = tl.multiple_of(base, 16)
    row = source + place.to(tl.int64)[:, None] * width
    base_row = base + column.to(tl.int64)[None, :] * width
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = multiplied(sums, row, base_row, live, inside, width, CHUNK, EVEN, PRECISION)
    if RANK > 0:
        begin = tl.load(groups_first + group)
        after = tl.load(groups_first + group + 1)
        beside = inner + position.to(tl.int64)[:, None] * (most * RANK)
        for lane in range(begin * RANK, after * RANK, LANES):  # type: ignore[reportArgumentType]
            member, rank, there, expert = _lanes(lane, after, expert_of_place, RANK, LANES)
            own = (member - begin) * RANK + rank
            mask = live[:, None] & there[None, :]
            own_ML = tl.load(beside + own[None, :], mask=mask, other=0.0)
            b_LX = _factors(b, expert, rank, there, column, inside, columns, RANK)
            sums = tl.dot(own_ML, b_LX, sums, input_precision=PRECISION)
    tl.store(
        out + position.to(tl.int64)[:, None] * columns + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=live[:, None] & inside[None, :],
    )


@triton.jit
def neurons_of_rows(
    base,
    pair_of_group,
    order,
    start,
    places,
    expert_of_place,
    group_of_expert,
    weight,
    scale,
    bias,
    inner,
    b,
    z,
    experts,
    tokens,
    intermediate,
    top_k,
    alpha,
    limit,
    RANK: tl.constexpr,
    FILLED: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write every row's weighted neurons, as the rows are numbered: ``z`` (N, F).

    ``base`` (P, 2F) is what the bases made of pairs, ``pair_of_group`` (G, T) the numbers of pairs.
    A tile has the rows of one expert.
    """
    place, first, end = tile_of_rows(start, places, experts, tl.program_id(1), ROWS, PARTS)
    if place >= experts:
        return
    expert = tl.load(expert_of_place + place).to(tl.int64)
    group = tl.load(group_of_expert + expert)
    position = first + tl.arange(0, ROWS)
    live = position < end
    row = tl.load(order + position, mask=live, other=0)
    pair = tl.load(pair_of_group + group * tokens + row // top_k, mask=live, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < intermediate
    valid = live[:, None] & inside[None, :]

    at = base + pair.to(tl.int64)[:, None] * (2 * intermediate) + column[None, :]
    gate_MX = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    up_MX = tl.load(at + intermediate, mask=valid, other=0.0).to(tl.float32)
    own = expert * 2 * intermediate + column
    if SCALE:
        gate_MX *= tl.load(scale + own, mask=inside, other=0.0).to(tl.float32)[None, :]
        up_MX *= tl.load(scale + intermediate + own, mask=inside, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        inner_MQ = _inner_of_tile(inner, row, live, RANK, FILLED)
        gate_QX = _factor(b, expert, column, inside, 2 * intermediate, RANK, FILLED)
        up_QX = _factor(b, expert, column + intermediate, inside, 2 * intermediate, RANK, FILLED)
        gate_MX = tl.dot(inner_MQ, gate_QX, gate_MX, input_precision=PRECISION)
        up_MX = tl.dot(inner_MQ, up_QX, up_MX, input_precision=PRECISION)
    if BIAS:
        gate_MX += tl.load(bias + own, mask=inside, other=0.0).to(tl.float32)[None, :]
        up_MX += tl.load(bias + intermediate + own, mask=inside, other=0.0).to(tl.float32)[None, :]
    weight_M = tl.load(weight + row, mask=live, other=0.0).to(tl.float32)
    z_MX = gated(gate_MX, up_MX, alpha, limit, GATING) * weight_M[:, None]
    z_MX = z_MX.to(z.dtype.element_ty)
    tl.store(z + row.to(tl.int64)[:, None] * intermediate + column[None, :], z_MX, mask=valid)


@triton.jit
def sum_members(
    z,
    inner,
    token_of_pair,
    start,
    every,
    index,
    place_of_expert,
    group_of_expert,
    groups_first,
    row_of_pair,
    inner_pair,
    groups,
    intermediate,
    top_k,
    most,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add the rows of every pair's members to its first one in ``z`` (N, F): ``row_of_pair`` (P).

    With ``RANK`` what the first factors made of them is laid side by side: ``inner_pair``
    (P, most * R). A token's slots are looked at all at once, as most pairs have a single member.
    """
    group, pair, _ = tile_of_rows(start, every, groups, tl.program_id(0), ONE, PARTS)
    if group >= groups:
        return
    slot = tl.arange(0, SLOTS)
    row = tl.load(token_of_pair + pair) * top_k + slot
    expert = tl.load(index + row, mask=slot < top_k, other=0)
    own = (slot < top_k) & (tl.load(group_of_expert + expert) == group)
    first = tl.min(tl.where(own, row, 2147483647), 0)
    members = tl.sum(own.to(tl.int32), 0)
    tl.store(row_of_pair + pair, first)
    if RANK > 0:
        wide = tl.arange(0, WIDE)
        member = tl.load(place_of_expert + expert) - tl.load(groups_first + group)
        theirs = own[:, None] & (member[:, None] == (wide // RANK)[None, :])
        at = row.to(tl.int64)[:, None] * RANK + (wide % RANK)[None, :]
        laid = tl.sum(tl.load(inner + at, mask=theirs, other=0.0).to(tl.float32), 0)
        beside = inner_pair + pair.to(tl.int64) * (most * RANK) + wide
        tl.store(beside, laid.to(inner_pair.dtype.element_ty), mask=wide < most * RANK)
    if members > 1:  # type: ignore[reportOperatorIssue]
        for begins in range(0, intermediate, COLUMNS):
            column = begins + tl.arange(0, COLUMNS)
            both = own[:, None] & (column < intermediate)[None, :]
            numbers = z + row.to(tl.int64)[:, None] * intermediate + column[None, :]
            total = tl.sum(tl.load(numbers, mask=both, other=0.0).to(tl.float32), 0)
            into = z + first.to(tl.int64) * intermediate + column  # type: ignore[reportAttributeAccessIssue]
            tl.store(into, total.to(z.dtype.element_ty), mask=column < intermediate)


@triton.jit
def sum_groups(
    y,
    pair_of_group,
    hit,
    index,
    weight,
    bias,
    out,
    groups,
    tokens,
    hidden,
    top_k,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum every token's pairs: ``y`` (P, D) to ``out`` (T, D); add its experts' biases."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.zeros([COLUMNS], tl.float32)
    for group in range(0, groups):
        if tl.load(hit + group * tokens + token) != 0:
            pair = tl.load(pair_of_group + group * tokens + token).to(tl.int64)
            total += tl.load(y + pair * hidden + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        for slot in range(0, top_k):
            row = token * top_k + slot
            expert = tl.load(index + row).to(tl.int64)
            own = tl.load(bias + expert * hidden + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(weight + row).to(tl.float32) * own
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
