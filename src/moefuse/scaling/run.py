"""``moefuse scaling``: students over a grid of groups, ranks and healing tokens, and their laws.

One calibration serves the whole grid. Every student goes through the stages of its own job and is
then healed, each number of tokens by a complete schedule of its own: a point in the middle of a
longer schedule would not be as good as one that was planned to end there. The cheapest come first,
and each is kept when it is done, so that an interrupted grid goes on where it was and several
processes can share it.
"""

import copy
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moefuse import artifacts
from moefuse.arena.bench import alone
from moefuse.arena.board import Board
from moefuse.arena.cells import part_of
from moefuse.arena.healing import Healing, healing_of
from moefuse.arena.lowbit import round_to
from moefuse.arena.run import HELD_OUT_TOKENS, read_held_out
from moefuse.arena.students import run_stages
from moefuse.comparison import (
    DISTILLED,
    HEALED,
    ONE_SHOT,
    Contender,
    HeldOut,
    contender_row,
    fused,
    measure_contenders,
    measure_models,
    model_with,
    teacher_row,
)
from moefuse.console import say, track
from moefuse.evaluation.report import Row, machine_meta, report_json
from moefuse.evaluation.rows import TEACHER
from moefuse.evaluation.run import load_model
from moefuse.evaluation.scaling_report import LeftOut, ScalingReport, write_scaling
from moefuse.pipeline import Job, JobFor, jobs_of
from moefuse.places import check_new, check_outside
from moefuse.scaling.grid import Grid, Student, cheapest_first
from moefuse.scaling.healing import heal_student


@dataclass(frozen=True)
class Scaling:
    """What ``scaling`` found: its report, None while ``missing`` students are still to be done by
    other parts."""

    out: Path
    report: ScalingReport | None
    missing: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"missing": self.missing, **(self.report.to_json() if self.report else {})}


def scaling(
    checkpoint: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    grid: Grid,
    *,
    healing: Mapping[str, Any] | None = None,
    held_out: str | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    part: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Scaling:
    """Measure ``grid`` on ``checkpoint`` and write what it says of the three laws to ``out``.

    ``values`` are settings by name (see ``config``), ``healing`` those that students are healed
    with (see ``healing_of``), ``held_out`` is the text to measure on, ``part`` says which of the
    students to do (see ``part_of``). Artifacts lie in ``out/work`` and finished students in
    ``out/cells``; the same call after an interruption goes on from the last one. What earlier calls
    measured with the same settings stands in the report too. Raises ``UserError`` for bad input
    before any expensive work starts.
    """
    out = Path(out)
    check_new(out)

    job_for = jobs_of(
        checkpoint, out / "work", values, revision=revision, trust_remote_code=trust_remote_code
    )
    first = job_for({"groups": 1, "rank": 0})
    grid, left_out = grid.within(first.reader.shape)
    students = cheapest_first(grid.students(), first)
    mine = part_of(students, part)
    check_outside(out, first.reader.directory, "output")
    text = read_held_out(first, held_out, held_out_tokens)
    mixed = first.device.startswith("cuda")
    how = healing_of(first, healing or {}, mixed=mixed) if max(grid.tokens) else None
    bench = Bench(first, job_for, text, how)
    board = Board(Student, out / "cells", bench.settings())
    todo = [student for student in mine if not board.has(student)]
    if todo:
        with alone(first.work / "calibrate.lock"):
            first.calibrate()
    for student in track(todo, "Scaling") if todo else ():
        board.write(student, {"rows": bench.measure(student), "impossible": None})
    return _finish(out, board, students, bench, grid, left_out)


@dataclass(frozen=True)
class Bench:
    """What all students share: the job that calibrated, the text to measure on, how to heal.

    ``job_for(values)`` makes a job of the same checkpoint, text and settings with other ``values``.
    """

    job: Job
    job_for: JobFor
    text: HeldOut
    healing: Healing | None

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The whole teacher in fp32."""
        return load_model(self.job.reader.directory, dtype="float32", device=self.job.device)[0]

    def settings(self) -> dict[str, Any]:
        """Return all that figures depend on besides the student."""
        return {
            "calibration": self.job.store.directory.name,
            "held_out": self.text.to_json()["fingerprint"],
            "grouping": asdict(self.job.grouping),
            "factoring": asdict(self.job.factoring),
            "distillation": asdict(self.job.distillation),
            "healing": self.healing.settings() if self.healing else None,
        }

    def measure(self, student: Student) -> list[dict[str, Any]]:
        """Make and measure one student: its row after the teacher's, as JSON values."""
        start = time.monotonic()
        job = self.job_for({**_size(student), "seed": student.seed})
        run_stages(job)
        contender = fused(job, DISTILLED if job.distillation.steps else ONE_SHOT)
        if student.tokens:
            rows = self._healed(job, contender, student)
        else:
            rows = measure_contenders(
                job, [contender], self.text, teacher=self.teacher, description=None
            )
        rows[-1] = replace(rows[-1], healed_tokens=student.tokens)
        say(f"{student.name}: KL {rows[-1].kl:.4f} ({time.monotonic() - start:.0f} s)")
        return report_json({}, rows)["rows"]

    def _healed(self, job: Job, contender: Contender, student: Student) -> list[Row]:
        assert self.healing is not None
        start = time.monotonic()
        # A copy of all weights: what is healed may not train the teacher's along.
        model = copy.deepcopy(model_with(self.teacher, job.reader.family, contender.students))
        mark = artifacts.fingerprint([job.distilled_directory.name, self.healing.settings()])
        directory = job.work / f"healing-{student.name}-{mark}"
        with job.suited_threads():
            heal_student(self.healing, model, self.teacher, student, directory)
        round_to(model.parameters(), job.stored)
        found = measure_models(
            job, {HEALED: model}, self.text, teacher=self.teacher, description=None
        )
        seconds = contender.seconds + time.monotonic() - start
        made = replace(contender, stage=HEALED, seconds=seconds)
        shutil.rmtree(directory, ignore_errors=True)
        return [teacher_row(job, found[TEACHER]), contender_row(job, made, found[HEALED])]


def _size(student: Student) -> dict[str, Any]:
    return {"groups": student.groups, "rank": student.rank}


def _finish(
    out: Path,
    board: Board[Student],
    students: Sequence[Student],
    bench: Bench,
    grid: Grid,
    left_out: list[LeftOut],
) -> Scaling:
    """Gather all students and, if none is missing, write the report."""
    done = [student for student in students if board.has(student)]
    missing = len(students) - len(done)
    if missing:
        return Scaling(out, None, missing)
    rows: list[Row] = []
    for student in [*done, *board.others(students)]:
        found, _, _ = board.read(student)
        rows += [row for row in found if row.method != TEACHER or not rows]
    job = bench.job
    meta = machine_meta(
        "moefuse scaling",
        device=job.device,
        data=bench.text.to_json(),
        teacher=teacher_facts(job),
        grid=asdict(grid),
        calibration=asdict(job.calibration),
        grouping=asdict(job.grouping),
        factoring=asdict(job.factoring),
        distillation=asdict(job.distillation),
        healing=bench.healing.settings() if bench.healing else None,
    )
    report = ScalingReport.of(meta, rows, grid.centre, left_out)
    with alone(job.work / "report.lock"):
        write_scaling(out, report)
    return Scaling(out, report, missing)


def teacher_facts(job: Job) -> dict[str, Any]:
    """Say which teacher was measured, so that a plan for another one can be told apart."""
    return {
        "name": Path(job.reader.source).name,
        "config": artifacts.fingerprint(job.reader.config),
    }
