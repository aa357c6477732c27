"""What all cells of a comparison share."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefuse.arena.cells import Cell
from moefuse.arena.healing import Healing
from moefuse.arena.lowbit import WHOLE_BYTES
from moefuse.artifacts import fingerprint, write_json
from moefuse.evaluation.report import Row, read_report, report_json
from moefuse.evaluation.rows import TEACHER, TaskScores
from moefuse.evaluation.run import NO_TASKS, Scored, TaskRunner, load_model
from moefuse.mathematics.experts import ExpertsCall
from moefuse.pipeline import Job, JobFor

KEPT_BYTES = 2_000_000_000
"""Recorded tokens that stay on the device from one cell to the next, at most."""
LIKE_OURS: dict[str, Any] = {"expert_bits": 1.0}
"""Any budget: it makes the shared job one of this design's, so that rivals are distilled against
the very loss that it is."""


class Bench:
    """What all cells share: the job that calibrated, its teacher, and its recorded tokens.

    ``job_for(values)`` makes a job of the same checkpoint, text and settings with other ``values``;
    ``quantise`` is as in ``Wishes``, ``tasks`` are run on students of the last stage. With
    ``healing`` there is a third stage, and rivals' distilled students lie in ``kept`` meanwhile.
    """

    def __init__(
        self,
        job: Job,
        job_for: JobFor,
        quantise: str,
        tasks: TaskRunner = NO_TASKS,
        healing: Healing | None = None,
        kept: Path | None = None,
    ) -> None:
        self.job = job
        self.job_for = job_for
        self.quantise = quantise
        self.tasks = tasks
        self.healing = healing
        self._kept_students = kept
        self._kept: dict[int, ExpertsCall] = {}

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The whole teacher in fp32."""
        return load_model(self.job.reader.directory, dtype="float32", device=self.job.device)[0]

    def run_tasks(self, model: PreTrainedModel) -> Scored:
        """Return what the tasks give for ``model``, the teacher or a copy with other experts."""
        with self.job.suited_threads():
            return self.tasks.run(model)

    @cached_property
    def teacher_scores(self) -> TaskScores | None:
        """The teacher's scores on the tasks, kept as a report in the work directory.

        Whichever process comes first measures them, those beside it wait and later ones read.
        """
        made_of = [self.job.store.directory.name, self.tasks.asked]
        path = self.job.work / f"tasks-{fingerprint(made_of)}.json"
        with alone(path.with_suffix(".lock")):
            if not path.exists():
                scores, facts = self.run_tasks(self.teacher)
                write_json(path, report_json(facts or {}, [Row(method=TEACHER, tasks=scores)]))
            _, (row,) = read_report(path)
        return row.tasks

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

    def kept_students(self, cell: Cell) -> Path | None:
        """Return the file of a cell's distilled students; None where none is kept."""
        if self._kept_students is None:
            return None
        return self._kept_students / f"{cell.name}.safetensors"

    def forget_students(self, cell: Cell) -> None:
        """Remove what was kept of a cell, which is done."""
        path = self.kept_students(cell)
        if path is not None:
            path.unlink(missing_ok=True)

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
