"""Triton kernels of experts whose neurons are coded: codes become numbers in registers alone.

Rows are (token, slot) pairs ordered by expert, as in ``triton_kernels``; where there are shared
neurons, every token has one row more, number N + t, whose *part* is number E, as if all tokens had
chosen one expert more. A part's neurons lie in *kinds*, one for each number of bits; the table
``spans`` (parts, kinds, 3) says where a part's neurons of a kind begin, how many they are, and the
number of their first block among the part's blocks of NEURONS neurons. ``kinds`` (kinds + 1, 5)
holds int64: the addresses of a kind's codes (or numbers), codebook, scales and biases, and how many
neurons the layer has of it; its last row is of the gains. Of each kind ``KINDS`` tells, when a
kernel is compiled, how many numbers V a code stands for, V filled up to a power of two, the bits
of a code (0: plain numbers) and the bytes of a row.

A scale belongs to a whole row, so it multiplies the product instead of the numbers. Codes name
entries of a table of at most 4 KB, which stays in the cache. Nothing is summed by atomic additions.

Shape suffixes: M rows of a tile, X neurons of a block, C codes, I numbers (C * V filled up).
"""

# Type checkers take what Triton knows when it compiles for what it is when Python runs.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from moefuse.modeling.kernels.triton_kernels import gated, tile_of_rows

ADDRESSES = tl.constexpr(5)
"""Numbers that ``kinds`` holds of a kind."""
ENTRIES, WIDEST = tl.constexpr(256), tl.constexpr(8)
"""Entries of the largest codebook, and numbers of its longest entry."""


@triton.jit
def fill_codebooks(kinds, tables, KINDS: tl.constexpr):
    """Copy codebooks whose entries are not of 1, 2, 4 or 8 numbers: ``tables`` (kinds, 256, 8)."""
    for kind in tl.static_range(len(KINDS)):
        if KINDS[kind][0] != KINDS[kind][1]:  # noqa: SIM102 (known when it is compiled)
            if tl.program_id(0) == kind:
                entry = tl.arange(0, ENTRIES)[:, None]
                place = tl.arange(0, WIDEST)[None, :]
                book = tl.load(kinds + kind * ADDRESSES + 1)
                book = book.to(tl.pointer_type(tables.dtype.element_ty))
                inside = place < KINDS[kind][0]
                values = tl.load(book + entry * KINDS[kind][0] + place, mask=inside, other=0.0)
                tl.store(tables + (kind * ENTRIES + entry) * WIDEST + place, values)


@triton.jit
def _book(kinds, tables, kind, VECTOR: tl.constexpr, FILLED: tl.constexpr):
    """Return where the entries of a kind's codebook lie, FILLED numbers each."""
    if VECTOR != FILLED:
        return tables + kind * ENTRIES * WIDEST
    book = tl.load(kinds + kind * ADDRESSES + 1).to(tl.pointer_type(tables.dtype.element_ty))
    return tl.multiple_of(book, 16)


@triton.jit
def _words(codes, row_X, first, COUNT: tl.constexpr, KIND: tl.constexpr, CODES: tl.constexpr):
    """Return the codes of some rows from number ``first`` on, four in a word of 32 bits, the first
    lowest: (X, CODES / 4). Past a row's end they are 0."""
    size: tl.constexpr = KIND[2] // 2
    even: tl.constexpr = COUNT % CODES == 0
    number = first // 4 + tl.arange(0, CODES // 4)
    if size == 4 and KIND[3] % 4 == 0:
        start_X = codes.to(tl.pointer_type(tl.int32)) + row_X * (KIND[3] // 4)
        place = start_X[:, None] + number[None, :]
        if even:
            word = tl.load(place, eviction_policy="evict_first")
        else:
            word = tl.load(place, mask=(number < KIND[3] // 4)[None, :], other=0)
    elif size == 3 and KIND[3] % 4 == 0 and even and CODES % 16 == 0:
        # Sixteen codes are three words of memory.
        start_X = codes.to(tl.pointer_type(tl.int32)) + row_X * (KIND[3] // 4)
        place = start_X[:, None] + (first // 16 * 3 + 3 * tl.arange(0, CODES // 16))[None, :]
        low = tl.load(place, eviction_policy="evict_first")
        middle = tl.load(place + 1, eviction_policy="evict_first")
        high = tl.load(place + 2, eviction_policy="evict_first")
        one = ((low >> 24) & 0xFF) | (middle << 8)
        two = ((middle >> 16) & 0xFFFF) | (high << 16)
        word = tl.reshape(_row(low, one, two, high >> 8), [row_X.shape[0], CODES // 4])
    else:
        start_X1 = (codes + row_X * KIND[3])[:, None]
        byte = number * size
        word = _byte(start_X1, byte, KIND[3], even)
        word |= _byte(start_X1, byte + 1, KIND[3], even) << 8
        word |= _byte(start_X1, byte + 2, KIND[3], even) << 16
        if size == 4:
            word |= _byte(start_X1, byte + 3, KIND[3], even) << 24
    return word


@triton.jit
def _byte(start_X1, byte, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """Return some bytes of rows of COUNT bytes as int32; 0 past the end, ``EVEN`` if none is."""
    place = start_X1 + byte[None, :]
    if EVEN:
        found = tl.load(place, eviction_policy="evict_first")
    else:
        found = tl.load(place, mask=(byte < COUNT)[None, :], other=0)
    return found.to(tl.int32)


@triton.jit
def _row(zero, one, two, three):
    """Lay four tensors of one shape side by side, their elements taking turns, as (..., 2, 2)."""
    return tl.join(tl.join(zero, two), tl.join(one, three))


@triton.jit
def _two(word, like):
    """Return the lower and the upper number of 16 bits in a word of 32."""
    low = word.to(tl.int16).to(like.dtype.element_ty, bitcast=True)
    return low, (word >> 16).to(tl.int16).to(like.dtype.element_ty, bitcast=True)


@triton.jit
def _numbers_of_two(book, zero, one, two, three):
    place = book.to(tl.pointer_type(tl.int32))
    a0, b0 = _two(tl.load(place + zero), book)
    a1, b1 = _two(tl.load(place + one), book)
    a2, b2 = _two(tl.load(place + two), book)
    a3, b3 = _two(tl.load(place + three), book)
    return tl.join(_row(a0, a1, a2, a3), _row(b0, b1, b2, b3))


@triton.jit
def _numbers_of_four(place, zero, one, two, three, like):
    """Return four numbers of each of four codes from where ``place`` (int64) points to."""
    low_0, low_1 = tl.load(place + zero), tl.load(place + one)
    low_2, low_3 = tl.load(place + two), tl.load(place + three)
    a0, b0 = _two(low_0.to(tl.int32), like)
    a1, b1 = _two(low_1.to(tl.int32), like)
    a2, b2 = _two(low_2.to(tl.int32), like)
    a3, b3 = _two(low_3.to(tl.int32), like)
    c0, d0 = _two((low_0 >> 32).to(tl.int32), like)
    c1, d1 = _two((low_1 >> 32).to(tl.int32), like)
    c2, d2 = _two((low_2 >> 32).to(tl.int32), like)
    c3, d3 = _two((low_3 >> 32).to(tl.int32), like)
    return _row(
        _row(a0, a1, a2, a3), _row(b0, b1, b2, b3), _row(c0, c1, c2, c3), _row(d0, d1, d2, d3)
    )


@triton.jit
def _looked_up(table, code, ROWS: tl.constexpr):
    """Look codes of any shape up in a table by way of shared memory: (ROWS, the others)."""
    count: tl.constexpr = code.numel
    return tl.reshape(tl.gather(table, tl.reshape(code, [count]), 0), [ROWS, count // ROWS])


@triton.jit
def _gathered(book, code_XC, KIND: tl.constexpr):
    """Return what codes stand for, (X, C * V filled up), numbers of 16 bits read two at a time."""
    if KIND[1] == 1:
        table = tl.load(book.to(tl.pointer_type(tl.int16)) + tl.arange(0, 1 << KIND[2]))
        word = _looked_up(table, code_XC, code_XC.shape[0])
        found = word.to(book.dtype.element_ty, bitcast=True)
    else:
        words: tl.constexpr = KIND[1] // 2
        table = tl.load(book.to(tl.pointer_type(tl.int32)) + tl.arange(0, words << KIND[2]))
        place = code_XC * words
        if words == 2:
            place = tl.join(place, place + 1)
        elif words == 4:
            place = _row(place, place + 1, place + 2, place + 3)
        low, high = _two(_looked_up(table, place, code_XC.shape[0]), book)
        found = tl.join(low, high)
    return found


@triton.jit
def _entries(book, word, KIND: tl.constexpr, WORDS: tl.constexpr):
    """Return what the codes in words stand for, (X, 4 * words * V filled up).

    By ``WORDS`` an entry of numbers of 16 bits is read as integers.
    """
    filled: tl.constexpr = KIND[1]
    mask: tl.constexpr = (1 << KIND[2]) - 1
    zero, one = word & mask, (word >> KIND[2]) & mask
    two, three = (word >> (2 * KIND[2])) & mask, (word >> (3 * KIND[2])) & mask
    if WORDS == 2:
        codes = tl.reshape(_row(zero, one, two, three), [word.shape[0], word.shape[1] * 4])
        found = _gathered(book, codes, KIND)
    elif filled == 1:
        found = _row(
            tl.load(book + zero), tl.load(book + one), tl.load(book + two), tl.load(book + three)
        )
    elif WORDS == 0:
        codes = tl.reshape(_row(zero, one, two, three), [word.shape[0], word.shape[1] * 4])
        place = codes[:, :, None] * filled + tl.arange(0, filled)[None, None, :]
        found = tl.load(book + place)
    elif filled == 2:
        found = _numbers_of_two(book, zero, one, two, three)
    elif filled == 4:
        place = book.to(tl.pointer_type(tl.int64))
        found = _numbers_of_four(place, zero, one, two, three, book)
    else:
        place = book.to(tl.pointer_type(tl.int64))
        low = _numbers_of_four(place, 2 * zero, 2 * one, 2 * two, 2 * three, book)
        high = _numbers_of_four(place + 1, 2 * zero, 2 * one, 2 * two, 2 * three, book)
        # (X, words, code, code, number, number, half): the half varies third fastest.
        found = tl.permute(tl.join(low, high), 0, 1, 2, 3, 6, 4, 5)
    return tl.reshape(found, [word.shape[0], word.shape[1] * 4 * filled])


@triton.jit
def _plain(base, book, row_X, first, WIDTH: tl.constexpr, NUMBERS: tl.constexpr):
    """Return numbers of plain rows from column ``first`` on, (X, NUMBERS); 0 past the end."""
    column = first + tl.arange(0, NUMBERS)
    place = tl.multiple_of(base.to(book.dtype), 16) + row_X[:, None] * WIDTH + column[None, :]
    if WIDTH % NUMBERS == 0:
        found = tl.load(place, eviction_policy="evict_first")
    else:
        found = tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    return found


@triton.jit
def _columns(first, VECTOR: tl.constexpr, FILLED: tl.constexpr, CODES: tl.constexpr, WIDTH):
    """Return the columns of ``CODES`` codes from ``first`` on, and which of them there are."""
    number = tl.arange(0, CODES * FILLED)
    if VECTOR == FILLED:
        column = first * VECTOR + number
        return column, column < WIDTH
    place = number % FILLED
    column = (first + number // FILLED) * VECTOR + place
    return column, (place < VECTOR) & (column < WIDTH)


@triton.jit
def _scaled(value_XM, scale, bias, row_X, CODED: tl.constexpr, BIAS: tl.constexpr):
    """Multiply products by the scales of their rows, if they have any; add the biases."""
    if CODED:
        value_XM *= tl.load(scale + row_X).to(tl.float32)[:, None]
    if BIAS:
        value_XM += tl.load(bias + row_X).to(tl.float32)[:, None]
    return value_XM


@triton.jit
def _gains(
    kinds, book_like, kind, expert_M, neuron_X, neurons,
    GAIN: tl.constexpr,
):  # fmt: skip
    """Return the gains of one expert of every row for some shared neurons, (X, M) fp32."""
    base = tl.load(kinds + kind * ADDRESSES)
    expert_M = expert_M.to(tl.int64)
    if GAIN[2] == 0:
        place = base.to(book_like.dtype) + expert_M[None, :] * neurons + neuron_X[:, None]
        found = tl.load(place).to(tl.float32)
    else:
        bit = neuron_X // GAIN[0] * GAIN[2]
        byte = (bit // 8)[:, None]
        codes = base.to(tl.pointer_type(tl.uint8)) + expert_M[None, :] * GAIN[3]
        word = tl.load(codes + byte).to(tl.int32)
        if GAIN[2] != 8:
            # The last code of a row may end with the row.
            more = byte + 1 < GAIN[3]
            word |= tl.load(codes + byte + 1, mask=more, other=0).to(tl.int32) << 8
            word = (word >> (bit % 8)[:, None]) & ((1 << GAIN[2]) - 1)
        book = tl.load(kinds + kind * ADDRESSES + 1).to(book_like.dtype)
        scale = tl.load(kinds + kind * ADDRESSES + 2).to(book_like.dtype)
        found = tl.load(book + word * GAIN[0] + (neuron_X % GAIN[0])[:, None]).to(tl.float32)
        found *= tl.load(scale + expert_M).to(tl.float32)[None, :]
    return found


@triton.jit
def _part_of_tile(
    start, every, experts, rows, tokens, own_tiles, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """Find the part of a tile of rows, its first row and the part's end; part -1 if there is none.

    Tiles from ``own_tiles`` on are of the shared neurons.
    """
    tile = tl.program_id(1)
    part, first, end = tile_of_rows(start, every, experts, tile, ROWS, PARTS)
    shared = tile >= own_tiles
    first = tl.where(shared, rows + (tile - own_tiles) * ROWS, first)
    end = tl.where(shared, rows + tokens, end)
    part = tl.where(shared, experts, tl.where(part >= experts, -1, part))
    return part, first, end


@triton.jit
def neurons(
    x,
    order,
    start,
    every,
    index,
    weight,
    spans,
    kinds,
    tables,
    z,
    experts,
    rows,
    tokens,
    top_k,
    own_tiles,
    z_width,
    alpha,
    limit,
    KINDS: tl.constexpr,
    GAIN: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the weighted values of every row's neurons, in order, block by block: ``z``.

    They are multiplied by the scales of their down rows already. The last kind is that of the
    shared neurons if there is a ``GAIN``. What fills up a block is 0.
    """
    part, first, end = _part_of_tile(start, every, experts, rows, tokens, own_tiles, ROWS, PARTS)
    if part < 0:
        return
    block = tl.program_id(0)
    position = first + tl.arange(0, ROWS)
    live = position < end
    if part < experts:
        row = tl.load(order + position, mask=live, other=0)
        token = row // top_k
    else:
        row = position
        token = tl.where(live, position - rows, 0)
    for kind in tl.static_range(len(KINDS)):
        span = spans + (part * len(KINDS) + kind) * 3
        count = tl.load(span + 1)
        begin = (block - tl.load(span + 2)) * NEURONS
        if (begin >= 0) & (begin < count):
            number = begin + tl.arange(0, NEURONS)
            there = number < count
            # Past the end the last neuron is computed again, so that no load needs a mask.
            neuron = tl.load(span) + tl.minimum(number, count - 1)
            z_XM = _values(
                x, token, live, kinds, tables, kind, neuron, alpha, limit,
                KINDS, WIDTH, BIAS, GATING, CHUNK, WORDS, PRECISION,
            )  # fmt: skip
            if (GAIN is not None) and (kind == len(KINDS) - 1):
                shared = tl.load(kinds + kind * ADDRESSES + 4).to(tl.int32)
                factor = tl.zeros([NEURONS, ROWS], tl.float32)
                for slot in range(0, top_k):
                    at = token * top_k + slot
                    expert = tl.load(index + at, mask=live, other=0)
                    share = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
                    gain = _gains(kinds, tables, len(KINDS), expert, neuron, shared, GAIN)
                    factor += gain * share[None, :]
                z_XM *= factor
            else:
                share = tl.load(weight + row, mask=live, other=0.0).to(tl.float32)
                z_XM *= share[None, :]
            z_XM = tl.where(there[:, None], z_XM, 0.0)
            column = block * NEURONS + tl.arange(0, NEURONS)
            tl.store(
                z + position.to(tl.int64)[None, :] * z_width + column[:, None],
                z_XM.to(z.dtype.element_ty),
                mask=live[None, :],
            )


@triton.jit
def _values(
    x,
    token,
    live,
    kinds,
    tables,
    kind: tl.constexpr,
    neuron,
    alpha,
    limit,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    GATING: tl.constexpr,
    CHUNK: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the values of some neurons of one kind, (X, M), times their down rows' scales."""
    KIND: tl.constexpr = KINDS[kind]
    codes: tl.constexpr = CHUNK // KIND[1]
    count: tl.constexpr = (WIDTH + KIND[0] - 1) // KIND[0]
    of_kind = kinds + kind * ADDRESSES
    base, total = tl.load(of_kind), tl.load(of_kind + 4)
    book = _book(kinds, tables, kind, KIND[0], KIND[1])
    gate_row = neuron.to(tl.int64)
    up_row = gate_row + total
    x_row = x + token.to(tl.int64)[None, :] * WIDTH
    gate_XM = tl.zeros([neuron.shape[0], token.shape[0]], tl.float32)
    up_XM = tl.zeros([neuron.shape[0], token.shape[0]], tl.float32)
    packed = tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), 16)
    if KIND[2] != 0:
        gate_word = _words(packed, gate_row, 0, count, KIND, codes)
        up_word = _words(packed, up_row, 0, count, KIND, codes)
    else:
        gate_word = gate_row
        up_word = up_row
    for first in range(0, count, codes):
        column, inside = _columns(first, KIND[0], KIND[1], codes, WIDTH)
        if (KIND[0] == KIND[1]) and (WIDTH % CHUNK == 0):
            x_IM = tl.load(x_row + column[:, None], mask=live[None, :], other=0.0)
        else:
            both = inside[:, None] & live[None, :]
            x_IM = tl.load(x_row + column[:, None], mask=both, other=0.0)
        if KIND[2] == 0:
            gate_XI = _plain(base, book, gate_row, first, WIDTH, codes)
            up_XI = _plain(base, book, up_row, first, WIDTH, codes)
        else:
            # The next codes are on their way while these become numbers.
            after = tl.where(first + codes < count, first + codes, first)
            gate_after = _words(packed, gate_row, after, count, KIND, codes)
            up_after = _words(packed, up_row, after, count, KIND, codes)
            gate_XI = _entries(book, gate_word, KIND, WORDS)
            up_XI = _entries(book, up_word, KIND, WORDS)
            gate_word, up_word = gate_after, up_after
        gate_XM = tl.dot(gate_XI, x_IM, gate_XM, input_precision=PRECISION)
        up_XM = tl.dot(up_XI, x_IM, up_XM, input_precision=PRECISION)
    coded: tl.constexpr = KIND[2] != 0
    scale = tl.load(of_kind + 2).to(tables.dtype)
    bias = tl.load(of_kind + 3).to(tables.dtype)
    gate_XM = _scaled(gate_XM, scale, bias, gate_row, coded, BIAS)
    up_XM = _scaled(up_XM, scale, bias, up_row, coded, BIAS)
    z_XM = gated(gate_XM, up_XM, alpha, limit, GATING)
    return _scaled(z_XM, scale, bias, up_row + total, coded, False)


@triton.jit
def down(
    z,
    order,
    start,
    every,
    spans,
    kinds,
    tables,
    y,
    experts,
    rows,
    tokens,
    all_rows,
    own_tiles,
    z_width,
    KINDS: tl.constexpr,
    STEPS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write what every row's neurons make of it, in pieces: ``y`` (pieces, rows, D).

    A piece is a share of the part's blocks, of the kinds whose codes have their columns in common:
    ``STEPS`` lists, for each such set, how many columns a code has and what that is filled up to;
    1 and 1 for all kinds that need no filling up. Pieces are numbered by set and share.
    """
    part, first, end = _part_of_tile(start, every, experts, rows, tokens, own_tiles, ROWS, PARTS)
    if part < 0:
        return
    # Neighbouring tiles, which run together, read neighbouring bytes of the same rows.
    tiles = tl.num_programs(0) // (len(STEPS) * SPLITS)
    piece, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    position = first + tl.arange(0, ROWS)
    live = position < end
    row = position
    if part < experts:
        row = tl.load(order + position, mask=live, other=0)
    last = spans + (part * len(KINDS) + len(KINDS) - 1) * 3
    blocks = tl.load(last + 2) + tl.cdiv(tl.load(last + 1), NEURONS)
    each = tl.cdiv(blocks, SPLITS)
    from_block = (piece % SPLITS) * each
    to_block = tl.minimum(from_block + each, blocks)
    y_row = y + (piece * all_rows + row).to(tl.int64)[None, :] * WIDTH
    for step in tl.static_range(len(STEPS)):
        if piece // SPLITS == step:
            codes: tl.constexpr = COLUMNS // STEPS[step][1]
            column, inside = _columns(tile * codes, STEPS[step][0], STEPS[step][1], codes, WIDTH)
            y_IM = tl.zeros([COLUMNS, ROWS], tl.float32)
            for kind in tl.static_range(len(KINDS)):
                if (KINDS[kind][0] == STEPS[step][0] and KINDS[kind][1] != KINDS[kind][0]) or (
                    STEPS[step][1] == 1 and KINDS[kind][1] == KINDS[kind][0]
                ):
                    y_IM = _products(
                        y_IM, z, position, live, spans + (part * len(KINDS) + kind) * 3,
                        kinds, tables, kind, tile, from_block, to_block, z_width,
                        KINDS, WIDTH, NEURONS, COLUMNS, WORDS, PRECISION,
                    )  # fmt: skip
            tl.store(
                y_row + column[:, None],
                y_IM.to(y.dtype.element_ty),
                mask=inside[:, None] & live[None, :],
            )


@triton.jit
def _products(
    y_IM,
    z,
    position,
    live,
    span,
    kinds,
    tables,
    kind: tl.constexpr,
    tile,
    from_block,
    to_block,
    z_width,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the products of a part's blocks of one kind between two blocks to ``y_IM``."""
    KIND: tl.constexpr = KINDS[kind]
    codes: tl.constexpr = COLUMNS // KIND[1]
    of_kind = kinds + kind * ADDRESSES
    base, total = tl.load(of_kind), tl.load(of_kind + 4)
    book = _book(kinds, tables, kind, KIND[0], KIND[1])
    first_neuron, count, first_block = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    z_row = z + position.to(tl.int64)[None, :] * z_width
    begin = tl.maximum(from_block, first_block)
    end = tl.minimum(to_block, first_block + tl.cdiv(count, NEURONS))
    packed = tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), 16)
    all_codes: tl.constexpr = (WIDTH + KIND[0] - 1) // KIND[0]
    last = first_neuron + count - 1
    place = tl.arange(0, NEURONS)
    row_X = (first_neuron - first_block * NEURONS + place).to(tl.int64)
    if KIND[2] != 0 and begin < end:
        down_X = tl.minimum(row_X + begin * NEURONS, last) + 2 * total
        word = _words(packed, down_X, tile * codes, all_codes, KIND, codes)
    else:
        word = tl.zeros([NEURONS, codes // 4], tl.int32)
    for block in range(begin, end):
        z_XM = tl.load(z_row + (block * NEURONS + place)[:, None], mask=live[None, :], other=0.0)
        if KIND[2] == 0:
            down_X = tl.minimum(row_X + block * NEURONS, last) + 2 * total
            down_XI = _plain(base, book, down_X, tile * codes, WIDTH, codes)
        else:
            after = tl.minimum(block + 1, end - 1)
            down_X = tl.minimum(row_X + after * NEURONS, last) + 2 * total
            word_after = _words(packed, down_X, tile * codes, all_codes, KIND, codes)
            down_XI = _entries(book, word, KIND, WORDS)
            word = word_after
        y_IM = tl.dot(tl.trans(down_XI), z_XM, y_IM, input_precision=PRECISION)
    return y_IM


@triton.jit
def sum_pieces(
    y,
    index,
    weight,
    bias,
    out,
    rows,
    all_rows,
    top_k,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum all pieces of a token's rows, and its experts' biases: ``y`` to ``out`` (T, D)."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.arange(0, SLOTS)
    own = slot < top_k
    row = tl.where(own, token * top_k + slot, rows + token)
    live = own
    if SHARED:
        live = slot <= top_k
    inside = column < WIDTH
    valid = live[:, None] & inside[None, :]
    total = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for piece in tl.static_range(PIECES):
        at = (piece * all_rows + row).to(tl.int64)[:, None] * WIDTH + column[None, :]
        total += tl.load(y + at, mask=valid, other=0.0).to(tl.float32)
    if BIAS:
        expert = tl.load(index + row, mask=own, other=0).to(tl.int64)
        share = tl.load(weight + row, mask=own, other=0.0).to(tl.float32)
        at = expert[:, None] * WIDTH + column[None, :]
        both = own[:, None] & inside[None, :]
        total += share[:, None] * tl.load(bias + at, mask=both, other=0.0).to(tl.float32)
    summed = tl.sum(total, 0)
    tl.store(
        out + token.to(tl.int64) * WIDTH + column, summed.to(out.dtype.element_ty), mask=inside
    )
