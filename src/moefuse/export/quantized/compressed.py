"""Weights in the format of compressed-tensors, which Transformers and vLLM load.

Whole numbers of 4 and 8 bits are packed into int32 (``pack-quantized``), for products in the
model's dtype; int8 and fp8 whose inputs are rounded too, token by token as they come, are stored as
they are (``int-quantized``, ``float-quantized``).

Shape suffixes: O outputs, I inputs, W int32 words of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics.integers import Grid, Rounded

METHOD = "compressed-tensors"
GROUPS = (128, 64, 32)
"""Numbers that share a scale, the most first; engines have kernels for these."""
LINEAR = "Linear"


@dataclass(frozen=True)
class Layout:
    """How a scheme's weights are stored: ``bits`` each, by ``group`` or row, inputs rounded too."""

    format: str
    bits: int
    is_float: bool = False
    grouped: bool = False
    rounds_inputs: bool = False


LAYOUTS = {
    "w4a16": Layout("pack-quantized", 4, grouped=True),
    "gptq": Layout("pack-quantized", 4, grouped=True),
    "awq": Layout("pack-quantized", 4, grouped=True),
    "w8a16": Layout("pack-quantized", 8),
    "w8a8": Layout("int-quantized", 8, rounds_inputs=True),
    "fp8": Layout("float-quantized", 8, is_float=True, rounds_inputs=True),
}


def grid_of(layout: Layout, widths: set[int], wanted: int | None) -> Grid:
    """Return the grid for matrices of all ``widths`` (numbers in a row).

    A group is ``wanted`` numbers or, without, the most of ``GROUPS`` that divide every width.
    Raises ``UserError`` where none does, and where packed rows would not be whole words.
    """
    ragged = sorted(width for width in widths if width % (32 // layout.bits))
    if layout.format == "pack-quantized" and ragged:
        raise UserError(
            f"Rows of {ragged[0]} numbers of {layout.bits} bits fill no whole 32-bit words; leave "
            "those layers out with --what, or use w8a8 or fp8."
        )
    if not layout.grouped:
        return Grid(layout.bits, None, layout.is_float)
    sizes = GROUPS if wanted is None else (wanted,)
    size = next((size for size in sizes if not any(width % size for width in widths)), None)
    if size is None:
        raise UserError(
            f"Groups of {' or '.join(map(str, sizes))} numbers do not divide rows of "
            f"{', '.join(map(str, sorted(widths)))}; pass another --group-size, or use w8a16."
        )
    return Grid(layout.bits, size, layout.is_float)


def parts(name: str, rounded: Rounded, layout: Layout) -> dict[str, Tensor]:
    """Return what is stored of the linear layer ``name``, by the names of tensors."""
    if layout.format != "pack-quantized":
        kind = torch.float8_e4m3fn if layout.is_float else torch.int8
        return {
            f"{name}.weight": rounded.codes_OI.to(kind),
            f"{name}.weight_scale": rounded.scale_OG,
        }
    return {
        f"{name}.weight_packed": packed(rounded.codes_OI, layout.bits),
        f"{name}.weight_scale": rounded.scale_OG,
        f"{name}.weight_shape": torch.tensor(rounded.codes_OI.shape, dtype=torch.int64),
    }


def stored_bytes(layout: Layout, grid: Grid, rows: int, columns: int, itemsize: int) -> int:
    """Return the bytes of what ``parts`` stores of a matrix; a scale has ``itemsize``."""
    scales = rows * (1 if grid.group is None else columns // grid.group) * itemsize
    if layout.format != "pack-quantized":
        return rows * columns + scales
    shape = 2 * torch.int64.itemsize
    return rows * columns * layout.bits // 8 + scales + shape


def packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Return whole numbers of ``bits`` bits in int32 words (O, W), the first in the lowest bits.

    Each is stored plus 2^(bits - 1). I must be a multiple of 32 / bits.
    """
    per_word = 32 // bits
    above_OWN = (codes_OI.long() + 2 ** (bits - 1)).unflatten(1, (-1, per_word))
    shifts_N = torch.arange(0, 32, bits)
    word_OW = (above_OWN << shifts_N).sum(-1)
    return torch.where(word_OW >= 2**31, word_OW - 2**32, word_OW).to(torch.int32)


def settings(layout: Layout, grid: Grid, ignore: list[str]) -> dict[str, Any]:
    """Return ``quantization_config``; ``ignore`` are all linear layers that stay as they are."""
    kind = "float" if layout.is_float else "int"
    weights = {
        "num_bits": layout.bits,
        "type": kind,
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if grid.group is None else "group",
        "group_size": grid.group,
        "observer": "minmax",
    }
    inputs = {
        "num_bits": layout.bits,
        "type": kind,
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
    }
    group = {
        "targets": [LINEAR],
        "weights": weights,
        "input_activations": inputs if layout.rounds_inputs else None,
        "output_activations": None,
        "format": layout.format,
    }
    return {
        "quant_method": METHOD,
        "format": layout.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
