"""Deltas of few bits read as the plain factors that they stand for, one layer's at a time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor

from moefuse.modeling.modeling_moefuse import CodedLowRankDelta, CodedRows, LowRankDelta

PREFIX = "delta."


class DeltaDecoder:
    """What reads the coded matrices of ``delta``, which may be on the meta device.

    Factors come in ``dtype``, in which they are decoded, as where the whole layer is kept. With
    plain deltas, or None, there is nothing to decode.
    """

    def __init__(self, delta: LowRankDelta | None, dtype: torch.dtype) -> None:
        named = () if delta is None else delta.named_children()
        # Without memory: a layer's codes are there only while they are read.
        self.rows = {
            name: deepcopy(rows).to("meta") for name, rows in named if isinstance(rows, CodedRows)
        }
        self.dtype = dtype
        self.waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def decoded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield a ``FusedExperts``' tensors by name as they come, each factor when it is complete.

        The parts of a factor may lie in different files, and so come in several calls.
        """
        for name, tensor in weights:
            matrix, _, part = name.removeprefix(PREFIX).rpartition(".")
            if matrix not in self.rows:
                yield name, tensor
                continue
            parts = self.waiting[matrix]
            parts[part] = tensor
            if len(parts) == len(self.rows[matrix].state_dict()):
                yield self._factor(matrix, self.waiting.pop(matrix))

    @torch.no_grad()
    def _factor(self, matrix: str, parts: dict[str, Tensor]) -> tuple[str, Tensor]:
        """Return the name of A, and A (E, R, I), or B, and B (E, O, R)."""
        rows = self.rows[matrix]
        rows.load_state_dict(parts, assign=True)
        rows_ERI = rows.to(self.dtype).read_parts(slice(None))
        rows.to("meta")
        stem, _, side = matrix.rpartition("_")
        if side == "in":
            return f"{PREFIX}{stem}_a", rows_ERI
        return f"{PREFIX}{stem}_b", rows_ERI.mT


def ranks_of(delta: LowRankDelta) -> tuple[int, int]:
    """Return the ranks of gate and up's deltas and of down's; nothing is decoded for it."""
    if isinstance(delta, CodedLowRankDelta):
        return delta.gate_up_in.scale.shape[1], delta.down_in.scale.shape[1]
    return delta.gate_up_a.shape[1], delta.down_a.shape[1]
