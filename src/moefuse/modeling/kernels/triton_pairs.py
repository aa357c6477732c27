"""Fused experts for many rows: a base multiplies every (token, group) pair once.

With several members of a group chosen for a token, a base would otherwise multiply the same token
several times. Base products are written out, members' neurons made of them row by row, summed, and
multiplied by the base again; the down deltas of all members of a group are one more stretch of what
that product sums over. Nothing waits for the host: there are at most as many pairs as rows.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moefuse.modeling.kernels import triton_pair_kernels as kernels
from moefuse.modeling.kernels.launching import beside_launches, launch
from moefuse.modeling.kernels.tiles import MANY_ROWS, PairTiles, pair_tiles_for
from moefuse.modeling.kernels.triton_order import Places, Rows, filled

MOST_SHARE = 0.85
"""Pairs for every row up to which numbering them pays."""


def pays(tokens: int, top_k: int, groups: int, largest: int, down_shape: tuple[int, int]) -> bool:
    """Tell whether multiplying pairs is likely to be faster than multiplying rows.

    Pairs are counted as for members chosen evenly. ``largest`` is how many members the largest
    group has, ``down_shape`` the rank of the down deltas and the width F that a base sums over.
    """
    share = groups * (1 - (1 - 1 / groups) ** top_k) / top_k
    rank, intermediate = down_shape
    many = tokens * top_k > MANY_ROWS * groups
    return many and share <= MOST_SHARE and 2 * largest * rank <= intermediate


@dataclass(frozen=True)
class Pairs:
    """(Token, group) pairs that occur, by group and then by token; all int32.

    ``hit`` (G, T) is 1 where a pair occurs and ``number`` (G, T) which one it is; ``token``
    (N + 1) names the tokens of pairs, what is past them meaning nothing; ``start`` (G + 1).
    """

    hit: Tensor
    number: Tensor
    token: Tensor
    start: Tensor


def pairs_of(index_TK: Tensor, group_of_expert: Tensor, groups: int) -> Pairs:
    """Number the pairs of a routing."""
    beside_launches()
    tokens, top_k = index_TK.shape
    token_T = torch.arange(tokens, device=index_TK.device)
    at_TK = group_of_expert[index_TK] * tokens + token_T[:, None]
    hit = torch.zeros(groups * tokens, dtype=torch.int32, device=index_TK.device)
    hit.index_fill_(0, at_TK.reshape(-1), 1)
    until = hit.cumsum(0, dtype=torch.int32)
    number = until - hit
    nowhere = tokens * top_k
    place = torch.where(hit > 0, number, nowhere).long()
    token = torch.empty(nowhere + 1, dtype=torch.int32, device=index_TK.device)
    token.scatter_(0, place, token_T.int().repeat(groups))
    start = torch.nn.functional.pad(until.view(groups, tokens)[:, -1], (1, 0))
    return Pairs(hit, number, token, start)


@dataclass(frozen=True)
class PairLayer:
    """One call by pairs: what all of its kernels share."""

    index_TK: Tensor
    weight_TK: Tensor
    group_of_expert: Tensor
    places: Places
    precision: str

    @property
    def tiles(self) -> PairTiles:
        """The tile sizes."""
        return pair_tiles_for(ieee=self.precision == "ieee")

    def product(
        self, source: Tensor, place_P: Tensor, pairs: Pairs, bases: Tensor, columns: int,
        deltas: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Return every pair's product with its base, (N, columns), of which P rows count.

        ``place_P`` says which row of ``source`` is a pair's. ``deltas`` are what their first
        factors made (N, M * R), and their second factors (E, columns, R).
        """
        groups, tile, width = len(self.places.first) - 1, self.tiles.product, source.shape[1]
        inner, b = deltas or (None, None)
        rank = 0 if b is None else b.shape[2]
        out = source.new_empty(self.index_TK.numel(), columns)
        launch(
            kernels.product_of_pairs,
            (
                triton.cdiv(columns, tile.columns),
                triton.cdiv(self.index_TK.numel(), self.tiles.rows) + groups,
            ),
            source, place_P, bases, pairs.start, self.places.first, self.places.every,
            self.places.expert, inner, b, out, groups, width, columns, self.places.largest,
            RANK=rank, LANES=self.places.lanes(rank), ROWS=self.tiles.rows,
            COLUMNS=tile.columns, CHUNK=tile.chunk, PARTS=filled(groups),
            EVEN=width % tile.chunk == 0 and columns % tile.columns == 0,
            PRECISION=self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    def neurons(
        self, base_PH: Tensor, pairs: Pairs, rows: Rows, inner_NR: Tensor | None,
        b_EHR: Tensor | None, extras: tuple[Tensor | None, Tensor | None],
        gating: tuple[int, float, float],
    ) -> Tensor:  # fmt: skip
        """Return every row's weighted neurons, (N, F), as the rows are numbered."""
        tiles, experts = self.tiles, len(self.places.expert)
        tokens, top_k = self.index_TK.shape
        intermediate = base_PH.shape[1] // 2
        scale, bias = extras
        rank = 0 if b_EHR is None else b_EHR.shape[2]
        z_NF = base_PH.new_empty(tokens * top_k, intermediate)
        launch(
            kernels.neurons_of_rows,
            (
                triton.cdiv(intermediate, tiles.join_columns),
                triton.cdiv(len(z_NF), tiles.join_rows) + min(experts, len(z_NF)),
            ),
            base_PH, pairs.number, rows.order, rows.start, self.places.every, self.places.expert,
            self.group_of_expert, self.weight_TK, scale, bias, inner_NR, b_EHR, z_NF,
            experts, tokens, intermediate, top_k, *gating[1:],
            RANK=rank, FILLED=filled(rank, 16), SCALE=scale is not None, BIAS=bias is not None,
            GATING=gating[0], ROWS=tiles.join_rows, COLUMNS=tiles.join_columns,
            PARTS=filled(experts), PRECISION=self.precision,
        )  # fmt: skip
        return z_NF

    def members(
        self, z_NF: Tensor, inner_NR: Tensor | None, pairs: Pairs
    ) -> tuple[Tensor, Tensor | None]:
        """Sum every pair's rows in its first one; say which that is, (N), and return what deltas
        made of its members side by side, (N, M * R). P rows count."""
        groups, top_k = len(self.places.first) - 1, self.index_TK.shape[1]
        most, intermediate = self.places.largest, z_NF.shape[1]
        rank = 0 if inner_NR is None else inner_NR.shape[1]
        row_P = pairs.token.new_empty(len(z_NF))
        inner_PW = None if inner_NR is None else z_NF.new_empty(len(z_NF), most * rank)
        slots = filled(top_k)
        launch(
            kernels.sum_members,
            (len(z_NF),),
            z_NF, inner_NR, pairs.token, pairs.start, self.places.every, self.index_TK,
            self.places.of_expert, self.group_of_expert, self.places.first, row_P, inner_PW,
            groups, intermediate, top_k, most,
            RANK=rank, WIDE=filled(most * rank), SLOTS=slots,
            COLUMNS=max(32, min(2048 // slots, filled(intermediate))), PARTS=filled(groups),
            num_warps=1,
        )  # fmt: skip
        return row_P, inner_PW

    def sums(self, y_PD: Tensor, pairs: Pairs, down_bias: Tensor | None, into: Tensor) -> None:
        """Write the sum of every token's pairs into ``into`` (T, D)."""
        tokens, hidden = into.shape
        columns = min(1024, filled(hidden))
        launch(
            kernels.sum_groups,
            (tokens, triton.cdiv(hidden, columns)),
            y_PD, pairs.number, pairs.hit, self.index_TK, self.weight_TK, down_bias, into,
            len(self.places.first) - 1, tokens, hidden, self.index_TK.shape[1],
            BIAS=down_bias is not None, COLUMNS=columns,
        )  # fmt: skip
