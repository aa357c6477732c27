"""What all cells of a comparison share."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefuse.arena.lowbit import WHOLE_BYTES
from moefuse.evaluation.run import load_model
from moefuse.mathematics.experts import ExpertsCall
from moefuse.pipeline import Job

KEPT_BYTES = 2_000_000_000
"""Recorded tokens that stay on the device from one cell to the next, at most."""
LIKE_OURS: dict[str, Any] = {"expert_bits": 1.0}
"""Any budget: it makes the shared job one of this design's, so that rivals are distilled against
the very loss that it is."""


class Bench:
    """What all cells share: the job that calibrated, its teacher, and its recorded tokens.

    ``job_for(values)`` makes a job of the same checkpoint, text and settings with other ``values``;
    ``quantise`` is as in ``Wishes``.
    """

    def __init__(self, job: Job, job_for: Callable[[dict[str, Any]], Job], quantise: str) -> None:
        self.job = job
        self.job_for = job_for
        self.quantise = quantise
        self._kept: dict[int, ExpertsCall] = {}

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The whole teacher in fp32."""
        return load_model(self.job.reader.directory, dtype="float32", device=self.job.device)[0]

    @property
    def whole(self) -> torch.dtype:
        """The dtype of numbers in 16 bits: the teacher's, if it has 16."""
        stored = self.job.stored
        return stored if stored.itemsize == WHOLE_BYTES else torch.bfloat16

    def call(self, layer: int) -> ExpertsCall:
        """Return one layer's recorded tokens on the device."""
        if layer in self._kept:
            return self._kept[layer]
        call = self.job.call(layer)
        held = sum(_nbytes(kept) for kept in self._kept.values())
        if held + _nbytes(call) <= KEPT_BYTES:
            self._kept[layer] = call
        return call

    def layer_budget(self, fraction: float) -> int:
        """Return the bytes that the routed experts of one layer may take."""
        sizes = self.job.sizes
        return int(fraction * sizes.expert_parameters * sizes.itemsize / len(sizes.shape.layers))


def _nbytes(call: ExpertsCall) -> int:
    return sum(tensor.nbytes for tensor in vars(call).values())


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file ``path``, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
