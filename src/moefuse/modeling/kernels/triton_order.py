"""Rows, which are (token, slot) pairs, in the order of their experts, and what launches share."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moefuse.modeling.kernels import triton_kernels as kernels
from moefuse.modeling.kernels.launching import beside_launches, launch, temporary

FEW = 256
"""Up to how many rows a row's inner values have more warps and fewer numbers at once."""
BLOCK, CHUNK = 16, 512
"""For how many rows a program counts, and how many others it looks at at once."""
ONE_BY_ONE, ONE_BY_ONE_RANK = 16384, 32
"""Up to how many numbers, rows times rank, and up to which rank, the deltas' inner rows are
computed one by one."""
MOST_LANES = 64
"""How many ranks of a group's members are multiplied at once."""
MOST_COUNTED = 4096
"""Up to how many rows one kernel orders by counting; more are sorted."""


@dataclass(frozen=True)
class Places:
    """The experts numbered so that a group's members are neighbours.

    ``of_expert`` and ``expert`` (E) int32, each the other's inverse; ``first`` (G + 1) int32, the
    place of each group's first member; ``every`` (E + 1) int32, all places; ``sortable`` is
    ``of_expert`` in the smallest dtype that holds it, which sorts fastest; ``largest`` is how many
    members the largest group has.
    """

    of_expert: Tensor
    expert: Tensor
    first: Tensor
    every: Tensor
    sortable: Tensor
    largest: int

    def lanes(self, rank: int) -> int:
        """Return how many ranks of neighbouring members are multiplied at once."""
        return filled(min(MOST_LANES, self.largest * rank), 16)


_places: Any = WeakIdKeyDictionary()


def places_of(group_of_expert: Tensor, groups: int) -> Places:
    """Number the experts of ``group_of_expert`` (E); remembered until that tensor changes."""
    version = 0 if group_of_expert.is_inference() else group_of_expert._version
    known = _places.get(group_of_expert)
    if known is not None and known[0] == version:
        return known[1]
    group_E, expert = group_of_expert.sort(stable=True)
    every = torch.arange(len(expert) + 1, device=expert.device, dtype=torch.int32)
    first = torch.searchsorted(group_E, torch.arange(groups + 1, device=expert.device))
    of_expert = torch.empty_like(every[:-1]).scatter_(0, expert, every[:-1])
    small = torch.uint8 if len(expert) <= 256 else torch.int32
    largest = int(first.diff().max())
    found = Places(of_expert, expert.int(), first.int(), every, of_expert.to(small), largest)
    _places[group_of_expert] = (version, found)
    return found


@dataclass(frozen=True)
class Rows:
    """Rows in their order: ``order`` (N) int32, and ``start`` (E + 1) int32 by place."""

    order: Tensor
    start: Tensor


def ordered(
    index_TK: Tensor,
    places: Places,
    x_TD: Tensor,
    a_ERI: Tensor | None = None,
    inner_NR: Tensor | None = None,
) -> Rows:
    """Order the rows by counting; write what the deltas make of ``x_TD`` beside it."""
    number, experts = index_TK.numel(), len(places.expert)
    order = temporary(x_TD, number, dtype=torch.int32)
    start = temporary(x_TD, experts + 1, dtype=torch.int32)
    blocks = triton.cdiv(number, BLOCK) + triton.cdiv(experts + 1, BLOCK)
    rank = 0 if a_ERI is None else a_ERI.shape[1]
    launch(
        kernels.order_rows,
        (blocks + (number if rank else 0),),
        index_TK, places.of_expert, order, start, number, experts,
        x_TD, a_ERI, inner_NR, x_TD.shape[1], index_TK.shape[1],
        ROWS=BLOCK, CHUNK=CHUNK, RANK=rank, **row_of_rank(rank, number),
    )  # fmt: skip
    return Rows(order, start)


def sorted_rows(index_TK: Tensor, places: Places) -> Rows:
    """Order the rows by sorting, which is faster for many."""
    beside_launches()
    place_N = places.sortable[index_TK.reshape(-1)]
    place_N, order = place_N.sort(stable=True)
    start = torch.searchsorted(place_N.int(), places.every)
    return Rows(order.int(), start.int())


@lru_cache(4096)
def table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers, most of them addresses, as int64 on ``device``; remembered."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def filled(number: int, least: int = 1) -> int:
    """Return the power of two that ``number`` is filled up to, at least ``least``."""
    return max(least, 1 << (number - 1).bit_length() if number > 0 else 1)


def one_by_one(rows: int, rank: int) -> bool:
    """Tell whether so many inner rows are computed one by one, rather than by tiles."""
    return rank <= ONE_BY_ONE_RANK and rows * rank <= ONE_BY_ONE


def row_of_rank(rank: int, rows: int) -> dict[str, int]:
    """Return how a row's inner values are computed: how many numbers of A at once."""
    width = filled(rank)
    numbers, warps = (8192, 8) if rows <= FEW else (16384, 4)
    return {"FILLED": width, "WIDTH": max(32, numbers // width), "num_warps": warps}
