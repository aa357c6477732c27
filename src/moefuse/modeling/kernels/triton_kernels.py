"""Triton kernels of the fused experts: rows are ordered once, and every product is grouped.

A row is a (token, slot) pair, number i = t * K + k. Rows are ordered by their expert's *place*;
places number the experts so that a group's members are neighbours, hence one order serves the
products grouped by group (bases) and by expert (deltas). A tile of rows of one group multiplies
that group's base once, whatever experts its rows chose; members' ``B_e`` are then added by a
product with the inner rows laid out by member, nothing where a row chose another one. Nothing is
summed by atomic additions: the same input gives the same bytes.

Shape suffixes as in ``modeling_moefuse``, and besides: M rows of a tile, X columns of a tile, C a
chunk of what is summed over, Q the rank filled up to a power of two, L lanes, which are ranks of
neighbouring members side by side. Base weights are found by ``*_table``, the addresses of the G
matrices, so that they stay ordinary parameters.
"""

import triton
import triton.language as tl

from moefuse.modeling.kernels import gatings

SILU = tl.constexpr(gatings.SILU)
GELU = tl.constexpr(gatings.GELU)


@triton.jit
def order_rows(
    index,
    place_of_expert,
    order,
    start,
    rows,
    experts,
    x,
    a,
    inner,
    width,
    top_k,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK: tl.constexpr,
    FILLED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Order rows by place: ``order`` (N) row numbers, ``start`` (E + 1) where each place begins.

    A row's position is how many rows have a lower place, or the same one and a lower number. Every
    program counts for a block of rows, or for a block of places. With a ``RANK``, further programs,
    one a row, write the row's ``inner``, for which no order is needed.
    """
    block = tl.program_id(0)
    row_blocks = tl.cdiv(rows, ROWS)
    blocks = row_blocks + tl.cdiv(experts + 1, ROWS)
    if block < row_blocks:
        own = block * ROWS + tl.arange(0, ROWS)
        live = own < rows
        expert = tl.load(index + own, mask=live, other=0)
        place = tl.load(place_of_expert + expert, mask=live, other=0)
        before = _before(index, place_of_expert, place, own, rows, ROWS, CHUNK)
        tl.store(order + before, own, mask=live)
    elif block < blocks:
        place = (block - row_blocks) * ROWS + tl.arange(0, ROWS)
        first = tl.zeros([ROWS], tl.int32)
        before = _before(index, place_of_expert, place, first, rows, ROWS, CHUNK)
        tl.store(start + place, before, mask=place <= experts)
    elif RANK > 0:
        row = block - blocks
        _inner_of_row(x, row // top_k, a, index, row, inner, width, RANK, FILLED, WIDTH)


@triton.jit
def inner_by_row(
    z,
    a,
    order,
    index,
    inner,
    width,
    RANK: tl.constexpr,
    FILLED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Do what ``inner_rows`` does for ordered rows ``z``, a program a row."""
    position = tl.program_id(0)
    row = tl.load(order + position)
    _inner_of_row(z, position, a, index, row, inner, width, RANK, FILLED, WIDTH)


@triton.jit
def _inner_of_row(
    x,
    source,
    a,
    index,
    row,
    inner,
    width,
    RANK: tl.constexpr,
    FILLED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.load(index + row).to(tl.int64)
    rank = tl.arange(0, FILLED)
    in_rank = rank < RANK
    sums = tl.zeros([FILLED], tl.float32)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside = column < width
        x_C = tl.load(x + source.to(tl.int64) * width + column, mask=inside, other=0.0)
        a_QC = tl.load(
            a + (expert * RANK + rank)[:, None] * width + column[None, :],
            mask=in_rank[:, None] & inside[None, :],
            other=0.0,
        )
        sums += tl.sum(a_QC.to(tl.float32) * x_C.to(tl.float32)[None, :], 1)
    tl.store(inner + row * RANK + rank, sums.to(inner.dtype.element_ty), mask=in_rank)


@triton.jit
def _before(index, place_of_expert, place, number, rows, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Count the rows with a lower place, or with the same one and a lower number."""
    before = tl.zeros([ROWS], tl.int32)
    for first in range(0, rows, CHUNK):
        other = first + tl.arange(0, CHUNK)
        there = other < rows
        expert = tl.load(index + other, mask=there, other=0)
        other_place = tl.load(place_of_expert + expert, mask=there, other=0)
        lower = other_place[None, :] < place[:, None]
        tie = (other_place[None, :] == place[:, None]) & (other[None, :] < number[:, None])
        before += tl.sum(((lower | tie) & there[None, :]).to(tl.int32), 1)
    return before


@triton.jit
def tile_of_rows(start, first_place, parts, tile, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Find a tile's part (an expert's place, or a group), its first row and the part's end.

    Part p has the rows from ``start[first_place[p]]`` to ``start[first_place[p + 1]]``. Tiles past
    the last have part ``parts``.
    """
    part = tl.arange(0, PARTS)
    live = part < parts
    first = tl.load(first_place + part, mask=live, other=0)
    after = tl.load(first_place + part + 1, mask=live, other=0)
    begin = tl.load(start + first, mask=live, other=0)
    end = tl.load(start + after, mask=live, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    until = tl.cumsum(tiles, 0)
    own = tl.sum((live & (until <= tile)).to(tl.int32), 0)
    chosen = part == own
    number = tile - tl.sum(tl.where(chosen, until - tiles, 0), 0)
    return (
        own,
        tl.sum(tl.where(chosen, begin, 0), 0) + number * ROWS,
        tl.sum(tl.where(chosen, end, 0), 0),
    )


@triton.jit
def inner_rows(
    x,
    a,
    order,
    start,
    places,
    expert_of_place,
    inner,
    experts,
    width,
    shared_by,
    RANK: tl.constexpr,
    FILLED: tl.constexpr,
    NUMBERED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``A_e x`` of every row, as the rows are numbered: ``inner`` (N, R).

    ``a`` is (E, R, width). ``x`` has a row for every ``shared_by`` rows as they are ``NUMBERED``,
    else one for each in their order.
    """
    place, first, end = tile_of_rows(start, places, experts, tl.program_id(0), ROWS, PARTS)
    if place >= experts:
        return
    expert = tl.load(expert_of_place + place).to(tl.int64)
    position = first + tl.arange(0, ROWS)
    live = position < end
    row = tl.load(order + position, mask=live, other=0)
    source = row // shared_by if NUMBERED else position
    rank = tl.arange(0, FILLED)
    x_row = x + source.to(tl.int64)[:, None] * width
    a_row = a + expert * RANK * width + rank[None, :] * width
    sums = tl.zeros([ROWS, FILLED], tl.float32)
    for chunk in range(0, width, CHUNK):
        column = chunk + tl.arange(0, CHUNK)
        inside = column < width
        x_MC = tl.load(x_row + column[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        a_CQ = tl.load(
            a_row + column[:, None], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0
        )
        sums = tl.dot(x_MC, a_CQ, sums, input_precision=PRECISION)
    tl.store(
        inner + row[:, None] * RANK + rank[None, :],
        sums.to(inner.dtype.element_ty),
        mask=live[:, None] & (rank < RANK)[None, :],
    )


@triton.jit
def _inner_of_tile(inner, row, live, RANK: tl.constexpr, FILLED: tl.constexpr):
    """Load the inner rows of a tile, (M, Q)."""
    rank = tl.arange(0, FILLED)
    return tl.load(
        inner + row[:, None] * RANK + rank[None, :],
        mask=live[:, None] & (rank < RANK)[None, :],
        other=0.0,
    )


@triton.jit
def _factor(b, expert, column, inside, height, RANK: tl.constexpr, FILLED: tl.constexpr):
    """Load columns of an expert's ``B_e`` transposed, (Q, X); ``b`` is (E, height, R)."""
    rank = tl.arange(0, FILLED)
    return tl.load(
        b + (expert.to(tl.int64) * height + column)[None, :] * RANK + rank[:, None],
        mask=inside[None, :] & (rank < RANK)[:, None],
        other=0.0,
    )


@triton.jit
def _lanes(first, after, expert_of_place, RANK: tl.constexpr, LANES: tl.constexpr):
    """Tell what ``LANES`` lanes are, members' ranks side by side from number ``first`` on: their
    members' places, their ranks, which there are before the place ``after``, and their experts."""
    lane = first + tl.arange(0, LANES)
    member = lane // RANK
    there = member < after
    expert = tl.load(expert_of_place + member, mask=there, other=0)
    return member, lane % RANK, there, expert.to(tl.int64)


@triton.jit
def _inner_of_lanes(inner, row, place, live, member, rank, RANK: tl.constexpr):
    """Load the inner rows of a tile, each in its own member's lanes, (M, L)."""
    own = live[:, None] & (place[:, None] == member[None, :])
    return tl.load(inner + row[:, None] * RANK + rank[None, :], mask=own, other=0.0)


@triton.jit
def _factors(b, expert, rank, there, column, inside, height, RANK: tl.constexpr):
    """Load columns of the lanes' ``B_e`` transposed, (L, X); ``b`` is (E, height, R)."""
    at = (expert[:, None] * height + column[None, :]) * RANK + rank[:, None]
    return tl.load(b + at, mask=there[:, None] & inside[None, :], other=0.0)


@triton.jit
def gated(gate, up, alpha, limit, GATING: tl.constexpr):
    """Join gate and up to neurons' values."""
    if GATING == SILU:
        return gate * tl.sigmoid(gate) * up
    if GATING == GELU:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return (up + 1.0) * gate * tl.sigmoid(gate * alpha)


@triton.jit
def multiplied(
    sums,
    row,
    base_row,
    live,
    inside,
    width,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the product of a tile's rows, ``width`` wide, and columns of a base to ``sums`` (M, X).

    ``row`` (M, 1) and ``base_row`` (1, X) are where each begins.
    """
    for chunk in range(0, width, CHUNK):
        part = chunk + tl.arange(0, CHUNK)
        if EVEN:
            row_MC = tl.load(row + part[None, :], mask=live[:, None], other=0.0)
            base_CX = tl.load(base_row + part[:, None])
        else:
            fits = part < width
            row_MC = tl.load(row + part[None, :], mask=live[:, None] & fits[None, :], other=0.0)
            both = fits[:, None] & inside[None, :]
            base_CX = tl.load(base_row + part[:, None], mask=both, other=0.0)
        sums = tl.dot(row_MC, base_CX, sums, input_precision=PRECISION)
    return sums


@triton.jit
def gate_up(  # noqa: PLR0915
    x,
    table,
    order,
    start,
    groups_first,
    index,
    place_of_expert,
    expert_of_place,
    weight,
    scale,
    bias,
    inner,
    b,
    z,
    groups,
    hidden,
    intermediate,
    top_k,
    alpha,
    limit,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write every row's weighted neurons, in order: ``z`` (N, F).

    ``h = s_e * (W_g x) + B_e inner + b_e`` and ``z = w * gating(gate half, up half)``.
    """
    group, first, end = tile_of_rows(start, groups_first, groups, tl.program_id(1), ROWS, PARTS)
    if group >= groups:
        return
    position = first + tl.arange(0, ROWS)
    live = position < end
    row = tl.load(order + position, mask=live, other=0)
    expert = tl.load(index + row, mask=live, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < intermediate

    base = tl.load(table + group).to(tl.pointer_type(x.dtype.element_ty))
    base = tl.multiple_of(base, 16)
    x_row = x + (row // top_k).to(tl.int64)[:, None] * hidden
    gate_row = base + column.to(tl.int64)[None, :] * hidden
    up_row = gate_row + intermediate * hidden
    gate_MX = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_MX = tl.zeros([ROWS, COLUMNS], tl.float32)
    for chunk in range(0, hidden, CHUNK):
        part = chunk + tl.arange(0, CHUNK)
        if EVEN:
            x_MC = tl.load(x_row + part[None, :], mask=live[:, None], other=0.0)
            gate_CX = tl.load(gate_row + part[:, None])
            up_CX = tl.load(up_row + part[:, None])
        else:
            fits = part < hidden
            x_MC = tl.load(x_row + part[None, :], mask=live[:, None] & fits[None, :], other=0.0)
            both = fits[:, None] & inside[None, :]
            gate_CX = tl.load(gate_row + part[:, None], mask=both, other=0.0)
            up_CX = tl.load(up_row + part[:, None], mask=both, other=0.0)
        gate_MX = tl.dot(x_MC, gate_CX, gate_MX, input_precision=PRECISION)
        up_MX = tl.dot(x_MC, up_CX, up_MX, input_precision=PRECISION)

    at = expert.to(tl.int64)[:, None] * (2 * intermediate) + column[None, :]
    valid = live[:, None] & inside[None, :]
    if SCALE:
        gate_MX *= tl.load(scale + at, mask=valid, other=0.0).to(tl.float32)
        up_MX *= tl.load(scale + intermediate + at, mask=valid, other=0.0).to(tl.float32)
    if RANK > 0:
        place = tl.load(place_of_expert + expert, mask=live, other=0)
        lowest = tl.min(tl.where(live, place, 2147483647), 0)
        after = tl.max(tl.where(live, place + 1, 0), 0)
        for lane in range(lowest * RANK, after * RANK, LANES):  # type: ignore[reportArgumentType]
            member, rank, there, other = _lanes(lane, after, expert_of_place, RANK, LANES)
            own_ML = _inner_of_lanes(inner, row, place, live, member, rank, RANK)
            height = 2 * intermediate
            gate_LX = _factors(b, other, rank, there, column, inside, height, RANK)
            up_LX = _factors(b, other, rank, there, column + intermediate, inside, height, RANK)
            gate_MX = tl.dot(own_ML, gate_LX, gate_MX, input_precision=PRECISION)
            up_MX = tl.dot(own_ML, up_LX, up_MX, input_precision=PRECISION)
    if BIAS:
        gate_MX += tl.load(bias + at, mask=valid, other=0.0).to(tl.float32)
        up_MX += tl.load(bias + intermediate + at, mask=valid, other=0.0).to(tl.float32)
    weight_M = tl.load(weight + row, mask=live, other=0.0).to(tl.float32)
    z_MX = gated(gate_MX, up_MX, alpha, limit, GATING) * weight_M[:, None]
    tl.store(
        z + position.to(tl.int64)[:, None] * intermediate + column[None, :],
        z_MX.to(z.dtype.element_ty),
        mask=valid,
    )


@triton.jit
def down(
    z,
    table,
    order,
    start,
    groups_first,
    index,
    place_of_expert,
    expert_of_place,
    weight,
    bias,
    inner,
    b,
    y,
    groups,
    hidden,
    intermediate,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write every row's output, as the rows are numbered: ``y`` (N, D)."""
    group, first, end = tile_of_rows(start, groups_first, groups, tl.program_id(1), ROWS, PARTS)
    if group >= groups:
        return
    position = first + tl.arange(0, ROWS)
    live = position < end
    row = tl.load(order + position, mask=live, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden

    base = tl.load(table + group).to(tl.pointer_type(z.dtype.element_ty))
    base = tl.multiple_of(base, 16)
    z_row = z + position.to(tl.int64)[:, None] * intermediate
    base_row = base + column.to(tl.int64)[None, :] * intermediate
    y_MX = tl.zeros([ROWS, COLUMNS], tl.float32)
    y_MX = multiplied(y_MX, z_row, base_row, live, inside, intermediate, CHUNK, EVEN, PRECISION)

    valid = live[:, None] & inside[None, :]
    expert = tl.load(index + row, mask=live, other=0)
    if RANK > 0:
        place = tl.load(place_of_expert + expert, mask=live, other=0)
        lowest = tl.min(tl.where(live, place, 2147483647), 0)
        after = tl.max(tl.where(live, place + 1, 0), 0)
        for lane in range(lowest * RANK, after * RANK, LANES):  # type: ignore[reportArgumentType]
            member, rank, there, other = _lanes(lane, after, expert_of_place, RANK, LANES)
            own_ML = _inner_of_lanes(inner, row, place, live, member, rank, RANK)
            b_LX = _factors(b, other, rank, there, column, inside, hidden, RANK)
            y_MX = tl.dot(own_ML, b_LX, y_MX, input_precision=PRECISION)
    if BIAS:
        weight_M = tl.load(weight + row, mask=live, other=0.0).to(tl.float32)
        at = expert.to(tl.int64)[:, None] * hidden + column[None, :]
        y_MX += weight_M[:, None] * tl.load(bias + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(
        y + row.to(tl.int64)[:, None] * hidden + column[None, :],
        y_MX.to(y.dtype.element_ty),
        mask=valid,
    )


@triton.jit
def sum_slots(y, out, hidden, top_k, COLUMNS: tl.constexpr):
    """Sum the K rows of every token: ``y`` (T * K, D) to ``out`` (T, D)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in range(0, top_k):
        at = y + (token * top_k + slot) * hidden + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
