"""Whole numbers of few bits, several to an int32, and scales spread over what they scale."""

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


def spread(scale_RC: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Return a block's scale at each of its numbers: (rows, columns) of ``shape``, fp32.

    ``scale_RC`` has an entry for every block of ``block`` rows and columns, the last ones cut.
    """
    rows_RC = scale_RC.float().repeat_interleave(block[0], 0)[: shape[0]]
    return rows_RC.repeat_interleave(block[1], 1)[:, : shape[1]]
