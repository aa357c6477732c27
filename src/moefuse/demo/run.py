"""The main job on the bundled teacher: four sizes, two rivals, one report.

One calibration serves all sizes. Everything is kept in a work directory until the report is
written, so that an interrupted demonstration goes on where it was.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefuse import demo
from moefuse.comparison import Contender, HeldOut, contenders_at, measure_contenders
from moefuse.console import say
from moefuse.evaluation.report import Row, machine_meta, write_report
from moefuse.pipeline import Job, fuse
from moefuse.places import check_output

GROUPS = (16, 8, 4, 2)
RIVALS = ("reap", "hc-smoe")
SETTINGS: dict[str, Any] = {"tokens": 98_304, "steps": 120}
HELD_OUT_TOKENS = 12_288
REPORT = "report.json"


@dataclass(frozen=True)
class DemoResult:
    """Where the report and the checkpoints are, and the report's rows."""

    out: Path
    rows: list[Row]
    seconds: float


def run_demo(out: Path, *, overwrite: bool = False, device: str = "auto") -> DemoResult:
    """Fuse the bundled teacher to 16, 8, 4 and 2 experts and compare with rivals.

    Writes the four checkpoints ``out/fused-16`` and so on, ``report.json``, ``report.md`` and
    ``quality.png``. Raises ``UserError`` where ``out`` holds a finished report already, unless
    ``overwrite``; an unfinished one is gone on with.
    """
    start = time.monotonic()
    if (out / REPORT).exists():
        check_output(out / REPORT, overwrite=overwrite)
        shutil.rmtree(out)
    work, jobs, contenders = out / "work", [], []
    for groups in GROUPS:
        values = {**SETTINGS, "groups": groups, "device": device}
        say(f"Fusing to {groups} experts a layer")
        fuse(demo.teacher_path(), out / f"fused-{groups}", values, work=work)
        jobs.append(Job(demo.teacher_path(), work, values))
        contenders.append(contenders_at(jobs[-1], RIVALS, rivals_distilled=False))
    rows = measure_sizes(jobs, contenders, HELD_OUT_TOKENS)
    seconds = time.monotonic() - start
    write_report(out, demo_meta("moefuse demo", jobs[0], seconds), rows)
    shutil.rmtree(work)
    return DemoResult(out, rows, seconds)


def measure_sizes(
    jobs: Sequence[Job], contenders: Sequence[list[Contender]], tokens: int
) -> list[Row]:
    """Measure every size's contenders on the bundled held-out text; one row for the teacher."""
    held_out = HeldOut.read(demo.heldout_path(), jobs[0], tokens)
    rows: list[Row] = []
    for job, found in zip(jobs, contenders, strict=True):
        measured = measure_contenders(job, found, held_out)
        rows += measured[1:] if rows else measured
    return rows


def demo_meta(command: str, job: Job, seconds: float) -> dict[str, Any]:
    """Say how a report was made."""
    held_out = HeldOut.read(demo.heldout_path(), job, HELD_OUT_TOKENS)
    return machine_meta(
        command,
        device=job.device,
        data=held_out.to_json(),
        calibration=asdict(job.calibration),
        factoring=asdict(job.factoring),
        grouping=asdict(job.grouping),
        distillation=asdict(job.distillation),
        seconds=round(seconds, 1),
    )
