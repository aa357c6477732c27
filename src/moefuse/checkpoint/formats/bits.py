"""Whole numbers of few bits, several to an int32, and scales that blocks of numbers share."""

from collections.abc import Callable

import torch
from torch import Tensor


def unpack_columns(packed_RC: Tensor, bits: int) -> Tensor:
    """Return the numbers, 0 to 2^bits - 1, that each int32 of a row holds, the lowest bits first.

    ``packed_RC`` is (rows, columns) int32, the result (rows, columns * 32 / bits) int32.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed_RC.device)
    return ((packed_RC.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def unpack_rows(packed_RC: Tensor, bits: int) -> Tensor:
    """Do the same down each column: (rows * 32 / bits, columns) int32."""
    return unpack_columns(packed_RC.T.contiguous(), bits).T


def scaled(value_RC: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply every block of ``block`` rows and columns by its entry of ``scale``, in place.

    ``value_RC`` is fp32; the last blocks may be cut.
    """
    return _by_block(value_RC, scale, block, Tensor.mul_)


def shifted(value_RC: Tensor, zero: Tensor, block: tuple[int, int]) -> Tensor:
    """Subtract from every block its entry of ``zero``, in place; see ``scaled``."""
    return _by_block(value_RC, zero, block, Tensor.sub_)


def _by_block(
    value_RC: Tensor,
    each: Tensor,
    block: tuple[int, int],
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    rows, columns = block
    each = each.float()
    if value_RC.shape == (rows * each.shape[0], columns * each.shape[1]):
        # A view of whole blocks: spreading over a large matrix takes ten times as long.
        tiles = value_RC.view(each.shape[0], rows, each.shape[1], columns)
        change(tiles, each[:, None, :, None])
        return value_RC
    spread = each.repeat_interleave(rows, 0)[: len(value_RC)]
    return change(value_RC, spread.repeat_interleave(columns, 1)[:, : value_RC.shape[1]])
