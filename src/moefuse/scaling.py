"""``moefuse scaling``: students over a grid of groups, ranks and healing tokens, and their laws.

One calibration serves the whole grid. Every student goes through the stages of its own job and is
then healed, each number of tokens by a complete schedule of its own: a point in the middle of a
longer schedule would not be as good as one that was planned to end there. The cheapest come first,
and each is kept when it is done, so that an interrupted grid goes on where it was and several
processes can share it.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moefuse import artifacts
from moefuse.arena.bench import alone
from moefuse.arena.board import Board
from moefuse.arena.cells import listed, part_of
from moefuse.arena.run import HELD_OUT_TOKENS, read_held_out
from moefuse.arena.students import run_stages
from moefuse.comparison import (
    DISTILLED,
    ONE_SHOT,
    Contender,
    HeldOut,
    contender_row,
    fused,
    measure_contenders,
    measure_models,
    model_with,
    rounded,
    teacher_row,
)
from moefuse.config import SizeConfig, parse_count
from moefuse.console import say, track
from moefuse.errors import UserError
from moefuse.evaluation.report import Row, machine_meta, report_json
from moefuse.evaluation.rows import TEACHER
from moefuse.evaluation.run import load_model
from moefuse.evaluation.scaling import Place
from moefuse.evaluation.scaling_report import LeftOut, ScalingReport, write_scaling
from moefuse.families import MoeShape
from moefuse.fusion.plan import Teacher, make_plan
from moefuse.pipeline import Job
from moefuse.places import check_new, check_outside
from moefuse.sizes import maximum_rank

HEALED = "healed"


@dataclass(frozen=True)
class Student:
    """One student to make and measure; ``tokens`` are those it is healed on, 0 for none."""

    groups: int
    rank: int
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the student's file, without its ending; no other student has it."""
        return f"groups{self.groups}-rank{self.rank}-tokens{self.tokens}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """What to measure, checked: raises ``UserError`` for what makes no sense.

    Students that are not healed belong to every grid: ``tokens`` 0 need not be given. ``middle`` is
    the point through which the laws are read, without one the largest of every axis; with ``cross``
    only the axes through it are measured, not the full product. ``first_seed`` is the first of
    ``seeds``.
    """

    groups: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    seeds: int = 1
    first_seed: int = 0
    cross: bool = False
    middle: Place | None = None

    def __post_init__(self) -> None:
        for flag, values, least in (
            ("--groups", self.groups, 1),
            ("--ranks", self.ranks, 0),
            ("--tokens", self.tokens, 0),
        ):
            if not values:
                raise UserError(f"{flag} names nothing; give at least one number.")
            if min(values) < least:
                raise UserError(f"{flag} has {min(values)}; it must be at least {least}.")
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be at least 1.")
        for value, values in zip(self.middle or (), self._axes, strict=False):
            if value not in values:
                known = ", ".join(map(str, values))
                raise UserError(f"--middle has {value}, which is not on its axis: {known}.")

    @property
    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.groups, self.ranks, self.tokens

    @property
    def centre(self) -> Place:
        """The point through which the laws are read: (groups, rank, tokens)."""
        return self.middle or (max(self.groups), max(self.ranks), max(self.tokens))

    def students(self) -> list[Student]:
        """List every student of the grid, in no particular order."""
        healed = [
            place
            for place in product(*self._axes)
            if not self.cross or sum(a != b for a, b in zip(place, self.centre, strict=True)) <= 1
        ]
        unhealed = [(groups, rank, 0) for groups, rank, _ in healed]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        places = dict.fromkeys([*unhealed, *healed])
        return [Student(g, r, tokens, seed) for g, r, tokens in places for seed in seeds]

    def within(self, shape: MoeShape) -> tuple["Grid", list[LeftOut]]:
        """Return what of the grid can exist for this teacher, and what cannot, with the reason.

        Raises ``UserError`` where nothing is left of an axis.
        """
        most = maximum_rank(shape)
        left_out = [
            LeftOut("groups", value, f"A layer has only {shape.experts} experts.")
            for value in self.groups
            if value > shape.experts
        ]
        left_out += [
            LeftOut("ranks", value, f"No delta of this model can have a rank above {most}.")
            for value in self.ranks
            if value > most
        ]
        gone = {(item.axis, item.value) for item in left_out}
        groups = tuple(value for value in self.groups if ("groups", value) not in gone)
        ranks = tuple(value for value in self.ranks if ("ranks", value) not in gone)
        for flag, values in (("groups", groups), ("ranks", ranks)):
            if not values:
                reason = next(item.reason for item in left_out if item.axis == flag)
                raise UserError(f"No value of --{flag} is possible. {reason}")
        return replace(self, groups=groups, ranks=ranks), left_out


def read_grid(
    groups: str,
    ranks: str,
    tokens: str,
    seeds: int,
    *,
    first_seed: int = 0,
    cross: bool = False,
    middle: str | None = None,
) -> Grid:
    """Read what the command line says, lists with commas between; raises ``UserError``."""
    place = None
    if middle is not None:
        words = [word.strip() for word in middle.split(",")]
        if len(words) != 3 or not all(word.isdecimal() for word in words[:2]):
            raise UserError(
                f"--middle is {middle!r}; give groups, rank and tokens, such as 8,8,4M."
            )
        place = (int(words[0]), int(words[1]), _count(words[2], "--middle"))
    return Grid(
        groups=listed("--groups", groups, int),
        ranks=listed("--ranks", ranks, int),
        tokens=tuple(_count(word, "--tokens") for word in listed("--tokens", tokens, str)),
        seeds=seeds,
        first_seed=first_seed,
        cross=cross,
        middle=place,
    )


def _count(word: str, flag: str) -> int:
    return 0 if word == "0" else parse_count(word, flag)


@dataclass(frozen=True)
class Healing:
    """How students are healed.

    ``heal(model, teacher, tokens, seed)`` trains ``model`` in place against ``teacher``'s logits by
    a complete schedule of ``tokens``; ``settings``, JSON values, are all that it depends on.
    """

    settings: dict[str, Any]
    heal: Callable[[PreTrainedModel, PreTrainedModel, int, int], None]


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
    healing: Callable[[Job], Healing] | None = None,
    held_out: str | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    part: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Scaling:
    """Measure ``grid`` on ``checkpoint`` and write what it says of the three laws to ``out``.

    ``values`` are settings by name (see ``config``), ``held_out`` is the text to measure on,
    ``part`` says which of the students to do (see ``part_of``), ``healing`` how they are healed; a
    grid of 0 tokens alone needs none. Artifacts lie in ``out/work`` and
    finished students in ``out/cells``; the same call after an interruption goes on from the last
    one. What earlier calls measured with the same settings stands in the report too. Raises
    ``UserError`` for bad input before any expensive work starts.
    """
    out = Path(out)
    check_new(out)

    def job_for(more: Mapping[str, Any]) -> Job:
        return Job(
            checkpoint,
            out / "work",
            {**values, **more},
            revision=revision,
            trust_remote_code=trust_remote_code,
        )

    first = job_for({"groups": 1, "rank": 0})
    grid, left_out = grid.within(first.reader.shape)
    students = cheapest_first(grid.students(), first)
    mine = part_of(students, part)
    check_outside(out, first.reader.directory, "output")
    text = read_held_out(first, held_out, held_out_tokens)
    if healing is None and max(grid.tokens):
        raise UserError("--tokens asks for healing, and nothing says how; give --tokens 0.")
    how = healing(first) if healing and max(grid.tokens) else None
    bench = Bench(first, job_for, text, how)
    board = Board(Student, out / "cells", bench.settings())
    todo = [student for student in mine if not board.has(student)]
    if todo:
        with alone(first.work / "calibrate.lock"):
            first.calibrate()
    for student in track(todo, "Scaling") if todo else ():
        board.write(student, {"rows": bench.measure(student), "impossible": None})
    return _finish(out, board, students, bench, grid, left_out)


def cheapest_first(students: Sequence[Student], job: Job) -> list[Student]:
    """Sort students by what they cost: healing tokens times the parameters that a token passes."""
    kinds = {(student.groups, student.rank) for student in students}
    active = {kind: active_parameters(job.sizes, *kind, job) for kind in kinds}

    def cost(student: Student) -> tuple[int, ...]:
        passed = active[student.groups, student.rank]
        return student.tokens * passed, passed, student.groups, student.rank, student.seed

    return sorted(students, key=cost)


def active_parameters(teacher: Teacher, groups: int, rank: int, job: Job) -> int:
    """Return the parameters of one kind of student that a token passes at most."""
    size = SizeConfig(groups=groups, rank=rank)
    return make_plan(teacher, size, job.factoring).active_parameters


@dataclass(frozen=True)
class Bench:
    """What all students share: the job that calibrated, the text to measure on, how to heal.

    ``job_for(values)`` makes a job of the same checkpoint, text and settings with other ``values``.
    """

    job: Job
    job_for: Callable[[Mapping[str, Any]], Job]
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
            "healing": self.healing.settings if self.healing else None,
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
        self.healing.heal(model, self.teacher, student.tokens, student.seed)
        rounded(model, job.stored)
        found = measure_models(
            job, {HEALED: model}, self.text, teacher=self.teacher, description=None
        )
        seconds = contender.seconds + time.monotonic() - start
        made = replace(contender, stage=HEALED, seconds=seconds)
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
        healing=bench.healing.settings if bench.healing else None,
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
