"""Tile sizes of the Triton kernels, by how many rows a group has."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Product:
    """A grouped product: columns of a tile, what is summed at a time, warps, stages."""

    columns: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """All sizes of one call; ``rows`` of a tile is common to both products."""

    rows: int
    gate_up: Product
    down: Product
    inner_rows: int = 16
    inner_chunk: int = 256


BY_ROWS = (
    Tiles(16, Product(32, 64, 4, 5), Product(64, 64, 4, 5)),
    Tiles(32, Product(64, 64, 4, 3), Product(128, 64, 8, 5)),
    Tiles(64, Product(64, 64, 4, 3), Product(128, 64, 4, 3)),
    Tiles(128, Product(128, 64, 8, 4), Product(128, 64, 4, 3)),
)
MANY = Tiles(128, Product(128, 64, 8, 3), Product(256, 64, 8, 3), 64)
"""The fastest of some dozens that were tried on an H100 with DeepSeek-Coder-V2-Lite's shapes."""

MANY_ROWS = 1024

IN_FP32 = Tiles(16, Product(32, 32, 4, 2), Product(32, 32, 4, 2), 16, 32)


FEW_PROGRAMS = 80
"""Below so many programs tiles of 128 rows leave most of a GPU idle; smaller ones make more."""


def tiles_for(rows: int, groups: int, columns: int, dtype: torch.dtype) -> Tiles:
    """Return the tile sizes for ``rows`` rows spread over ``groups`` groups.

    ``columns`` is F, how wide the narrower of the two products is.
    """
    if dtype == torch.float32:
        return IN_FP32
    expected = rows / groups
    if expected > MANY_ROWS:
        return MANY
    found = next((tiles for tiles in BY_ROWS if tiles.rows >= expected), BY_ROWS[-1])
    programs = groups * math.ceil(expected / found.rows) * math.ceil(columns / 128)
    return BY_ROWS[-2] if found is BY_ROWS[-1] and programs < FEW_PROGRAMS else found


@dataclass(frozen=True)
class PairTiles:
    """All sizes of one call by pairs: of both products, and of what joins gate and up."""

    rows: int
    product: Product
    join_rows: int
    join_columns: int


PAIRS = PairTiles(128, Product(256, 64, 8, 3), 32, 128)
PAIRS_IN_FP32 = PairTiles(16, Product(32, 32, 4, 2), 16, 32)


def pair_tiles_for(*, ieee: bool) -> PairTiles:
    """Return the tile sizes for pairs; ``ieee`` where products are those of float32."""
    return PAIRS_IN_FP32 if ieee else PAIRS


@dataclass(frozen=True)
class CodedTiles:
    """All sizes of one call of experts whose neurons are coded.

    ``rows`` of a tile and ``neurons`` of a block are common to both products. The first sums
    ``chunk`` numbers of a row at a time; the second makes ``columns`` of the output, and splits an
    expert's neurons until there are about ``programs`` programs.
    """

    rows: int
    neurons: int
    chunk: int
    warps: int
    stages: int
    columns: int
    down_warps: int
    down_stages: int
    programs: int = 256


CODED_BY_ROWS = (
    CodedTiles(16, 64, 128, 4, 3, 128, 4, 3),
    CodedTiles(32, 64, 128, 4, 3, 128, 4, 3),
    CodedTiles(64, 64, 128, 4, 3, 128, 4, 3),
    CodedTiles(128, 64, 64, 4, 2, 128, 4, 3),
)
"""The fastest of some dozens that were tried on an H100 with DeepSeek-Coder-V2-Lite's shapes."""
CODED_IN_FP32 = CodedTiles(16, 16, 32, 4, 1, 32, 4, 1, programs=8)
MOST_SPLITS = 8


def coded_tiles_for(rows: int, experts: int, dtype: torch.dtype) -> CodedTiles:
    """Return the tile sizes for ``rows`` rows spread over ``experts`` experts.

    Decoding costs more than multiplying, so that most experts' rows should find room in one tile.
    """
    if dtype == torch.float32:
        return CODED_IN_FP32
    expected = 4 / 3 * rows / experts
    return next((tiles for tiles in CODED_BY_ROWS if tiles.rows >= expected), CODED_BY_ROWS[-1])
