"""What ``moefuse compare`` does: every cell once, each kept as a file, and a report of all.

A cell's rows are written when it is done, so that an interrupted comparison goes on where it was
and several processes, each with its part of the cells, work side by side on one output.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moefuse import demo
from moefuse.arena.bench import LIKE_OURS, Bench, alone
from moefuse.arena.board import Board
from moefuse.arena.cells import Cell, Wishes, part_of
from moefuse.arena.healing import Healing, healing_of
from moefuse.arena.report import Impossible, write_comparison
from moefuse.arena.students import make_contenders
from moefuse.artifacts import fingerprint
from moefuse.baselines import TooSmallError
from moefuse.comparison import Contender, HeldOut, measure_contenders, model_of, read_held_out_for
from moefuse.console import say, track
from moefuse.errors import UserError
from moefuse.evaluation.report import Row, machine_meta, report_json
from moefuse.evaluation.rows import TEACHER
from moefuse.evaluation.run import TaskRunner, task_runner
from moefuse.pipeline import Job, jobs_of
from moefuse.places import check_new, check_outside

HELD_OUT_TOKENS = 12_288


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: rows, the teacher's first, and cells that could not be made.

    ``missing`` cells are other processes' parts that are not done yet; the report is written once
    there are none.
    """

    out: Path
    meta: dict[str, Any]
    rows: list[Row]
    impossible: list[Impossible]
    missing: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        impossible = [asdict(item) for item in self.impossible]
        return {**report_json(self.meta, self.rows), "impossible": impossible}


def compare(
    checkpoint: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    wishes: Wishes,
    *,
    healing: Mapping[str, Any] | None = None,
    held_out: str | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    part: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare methods on ``checkpoint`` at equal bytes, and write what was found to ``out``.

    ``values`` are settings by name (see ``config``; every method is distilled by what the logits
    feel unless they say otherwise), ``healing`` those of healing, its tokens among them (see
    ``healing_of``; None: nothing is healed). ``held_out`` is the text to measure on, ``part`` says
    which of the cells to do (see ``part_of``). ``tasks``, ``limit`` and ``num_fewshot`` are what
    ``prepare_tasks`` takes; only the last stage's students are measured on them, and the teacher
    once. Artifacts lie in ``out/work`` and finished cells in ``out/cells``, healed ones in
    ``out/healed-cells``; the same call after an interruption goes on from the last finished cell,
    and does not distil again what waits for its healing. Raises ``UserError``
    for bad input before any expensive work starts.
    """
    out = Path(out)
    check_new(out)

    job_for = jobs_of(
        checkpoint, out / "work", values, revision=revision, trust_remote_code=trust_remote_code
    )
    job, cells = job_for(LIKE_OURS), wishes.cells()
    mine = part_of(cells, part)
    check_outside(out, job.reader.directory, "output")
    text = read_held_out(job, held_out, held_out_tokens)
    runner = task_runner(
        tasks,
        job.tokenizer,
        batch_size=job.calibration.batch_size,
        limit=limit,
        num_fewshot=num_fewshot,
    )
    how = None if healing is None else _healing(job, healing)
    board = _board(out, _settings(job, text, wishes.quantise, runner), how)
    todo = [cell for cell in mine if not board.has(cell)]
    if todo:
        with alone(job.work / "calibrate.lock"):
            job.calibrate()
    kept = None if how is None else job.work / f"students-{fingerprint(board.settings)}"
    bench = Bench(job, job_for, wishes.quantise, runner, how, kept)
    for cell in track(todo, "Compare") if todo else ():
        board.write(cell, measure_cell(bench, cell, text))
        bench.forget_students(cell)
    return _finish(out, board, cells, job, text, wishes, how)


def read_held_out(job: Job, source: str | None, tokens: int) -> HeldOut:
    """Read the text to measure on; the bundled teacher has one of its own.

    Raises ``UserError`` where another teacher is given none.
    """
    _ = job.teacher, job.batches
    if source is None:
        if not job.is_bundled:
            raise UserError(
                "Say with --held-out what text to measure on: a file, a folder, JSONL with text or "
                "messages, or a hub data set, none of it in the calibration text."
            )
        source = str(demo.heldout_path())
    if tokens < 2:
        raise UserError(f"--held-out-tokens is {tokens}; it must be at least 2.")
    return read_held_out_for(job, source, tokens)


def _healing(job: Job, values: Mapping[str, Any]) -> Healing:
    healing = healing_of(job, values)
    if healing.options.train == "deltas":
        raise UserError("Rivals have no deltas to heal alone: give train: all or train: experts.")
    return healing


def _board(out: Path, settings: dict[str, Any], healing: Healing | None) -> Board[Cell]:
    """Return where cells are kept; healed ones are others than those that are not."""
    if healing is None:
        return Board(Cell, out / "cells", settings)
    how = {**healing.settings(), "tokens": healing.tokens}
    return Board(Cell, out / "healed-cells", {**settings, "healing": how})


def _settings(job: Job, text: HeldOut, quantise: str, tasks: TaskRunner) -> dict[str, Any]:
    """Return all that a cell's figures depend on besides the cell."""
    settings = {
        "calibration": job.store.directory.name,
        "sensitivity_tokens": job.calibration.sensitivity_tokens,
        "held_out": text.to_json()["fingerprint"],
        "quantise": quantise,
        "grouping": asdict(job.grouping),
        "factoring": asdict(job.factoring),
        "distillation": asdict(job.distillation),
    }
    # Without tasks there is no word of them, so that cells from before there were any still count.
    return settings if tasks.asked is None else {**settings, "tasks": tasks.asked}


def measure_cell(bench: Bench, cell: Cell, text: HeldOut) -> dict[str, Any]:
    """Make and measure one cell: its ``rows`` as JSON values, or why it is ``impossible``.

    ``tasks`` says what the scores of the tasks depend on, where there are any.
    """
    start = time.monotonic()
    try:
        contenders = make_contenders(bench, cell)
    except TooSmallError as error:
        say(f"{cell.name}: impossible: {error}")
        return {"impossible": str(error), "rows": []}
    rows = measure_contenders(bench.job, contenders, text, teacher=bench.teacher, description=None)
    rows, facts = _with_tasks(bench, contenders[-1], rows)
    stages = ", ".join(f"{row.kl:.4f} {row.stage}" for row in rows if row.method != TEACHER)
    say(f"{cell.name}: KL {stages}, {rows[-1].bpw:.3f} bpw ({time.monotonic() - start:.0f} s)")
    found = {"impossible": None, "rows": report_json({}, rows)["rows"]}
    return found if facts is None else {**found, "tasks": facts}


def _with_tasks(
    bench: Bench, last: Contender, rows: Sequence[Row]
) -> tuple[list[Row], dict[str, Any] | None]:
    """Put scores into the first row, the teacher's, and the last, that of the contender ``last``.

    Returns the rows and what the scores depend on, None without tasks.
    """
    if bench.tasks.asked is None:
        return list(rows), None
    teacher, *others, student = rows
    scores, facts = bench.run_tasks(model_of(bench.teacher, bench.job.reader.family, last))
    scored = [replace(teacher, tasks=bench.teacher_scores), *others, replace(student, tasks=scores)]
    return scored, facts


def _finish(
    out: Path,
    board: Board[Cell],
    cells: Sequence[Cell],
    job: Job,
    text: HeldOut,
    wishes: Wishes,
    healing: Healing | None,
) -> Comparison:
    """Gather all cells and, if none is missing, write the report.

    What earlier commands measured with the same settings, other methods, say, stands in it too.
    """
    asked_for = [cell for cell in cells if board.has(cell)]
    done = [*asked_for, *board.others(cells)]
    rows: list[Row] = []
    impossible: list[Impossible] = []
    tasks: dict[str, Any] | None = None
    for cell in done:
        found, reason, facts = board.read(cell)
        tasks = tasks or facts
        rows += [row for row in found if row.method != TEACHER or not rows]
        if reason is not None:
            impossible.append(Impossible(**asdict(cell), reason=reason))
    meta = machine_meta(
        "moefuse compare",
        device=job.device,
        data=text.to_json(),
        calibration=asdict(job.calibration),
        grouping=asdict(job.grouping),
        factoring=asdict(job.factoring),
        distillation=asdict(job.distillation),
        healing=None if healing is None else board.settings["healing"],
        tasks=tasks,
        **asdict(wishes),
    )
    missing = len(cells) - len(asked_for)
    comparison = Comparison(out, meta, rows, impossible, missing)
    if not missing:
        with alone(job.work / "report.lock"):
            write_comparison(out, comparison.to_json(), meta, rows, impossible)
    return comparison
