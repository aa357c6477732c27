"""The main job on the bundled teacher: four sizes, unhealed and healed, two rivals, one report.

One calibration serves all sizes. Everything is kept in a work directory until the report is
written, so that an interrupted demonstration goes on where it was.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moefuse import demo
from moefuse.comparison import (
    DISTILLED,
    HEALED,
    Contender,
    contenders_at,
    fused,
    measure_contenders,
    read_held_out_for,
)
from moefuse.console import say
from moefuse.errors import UserError
from moefuse.evaluation.report import Row, machine_meta, write_report
from moefuse.evaluation.run import load_model
from moefuse.heal import heal
from moefuse.pipeline import Job, fuse
from moefuse.places import check_output

GROUPS = (16, 8, 4, 2)
RIVALS = ("reap", "hc-smoe")
SETTINGS: dict[str, Any] = {"tokens": 98_304, "steps": 120}
HEALING: dict[str, Any] = {
    "tokens": "120K",
    "sequence_length": 256,
    "batch_size": 4,
    "expert_rate": 2.5e-4,
    "rate": 1e-4,
    "router_rate": 1e-4,
    # More than there are: held-out text is measured at the end alone.
    "eval_steps": 1000,
}
"""How every size is healed: a minute each on two cores, on far fewer tokens than would pay."""
HELD_OUT_TOKENS = 12_288
REPORT = "report.json"


@dataclass(frozen=True)
class DemoResult:
    """Where the report and the checkpoints are, and the report's rows."""

    out: Path
    rows: list[Row]
    seconds: float


def run_demo(
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    sizes: Sequence[int] = GROUPS,
    settings: Mapping[str, Any] = SETTINGS,
    healing: Mapping[str, Any] = HEALING,
    held_out_tokens: int = HELD_OUT_TOKENS,
) -> DemoResult:
    """Fuse the bundled teacher to every number of experts in ``sizes``, heal each and compare.

    Writes the checkpoints ``out/fused-16`` and ``out/healed-16`` and so on, ``report.json``,
    ``report.md`` and ``quality.png``. ``settings`` are those of fusing, ``healing`` of healing.
    Raises ``UserError`` where ``out`` holds a finished report already, unless ``overwrite``; an
    unfinished one is gone on with.
    """
    start = time.monotonic()
    if device.startswith("cuda:"):
        raise UserError(
            f"--device is {device}; healing takes cuda, the GPU chosen by CUDA_VISIBLE_DEVICES."
        )
    if (out / REPORT).exists():
        check_output(out, overwrite=overwrite, mark=REPORT, what="demonstration")
        shutil.rmtree(out)
    work, jobs, contenders = out / "work", [], []
    for groups in sizes:
        values = {**settings, "groups": groups, "device": device}
        say(f"Fusing to {groups} experts a layer")
        fuse(demo.teacher_path(), out / f"fused-{groups}", values, work=work)
        jobs.append(Job(demo.teacher_path(), work, values))
        found = contenders_at(jobs[-1], RIVALS, rivals_distilled=False)
        contenders.append([*found, _healed(jobs[-1], out, healing)])
    rows = measure_sizes(jobs, contenders, held_out_tokens)
    meta = demo_meta(
        "moefuse demo",
        jobs[0],
        time.monotonic() - start,
        held_out_tokens=held_out_tokens,
        healing=healing,
    )
    write_report(out, meta, rows)
    shutil.rmtree(work)
    return DemoResult(out, rows, time.monotonic() - start)


def _healed(job: Job, out: Path, healing: Mapping[str, Any]) -> Contender:
    """Heal the checkpoint that ``job`` wrote, and return the healed one as it was written.

    It is healed on the calibration text, against the teacher itself.
    """
    distilled = fused(job, DISTILLED)
    say(f"Healing {distilled.groups} experts a layer")
    result = heal(
        out / f"fused-{distilled.groups}",
        out / f"healed-{distilled.groups}",
        {**healing, "data": str(demo.calibration_path()), "device": job.compute.device},
        teacher=demo.teacher_path(),
        # What an interrupted demonstration healed is found again, not made again.
        overwrite=True,
    )
    return replace(
        distilled,
        stage=HEALED,
        seconds=distilled.seconds + result.seconds,
        healed_tokens=result.tokens,
        model=load_model(result.out, dtype="float32", device=job.device)[0],
    )


def measure_sizes(
    jobs: Sequence[Job], contenders: Sequence[list[Contender]], tokens: int
) -> list[Row]:
    """Measure every size's contenders on the bundled held-out text; one row for the teacher."""
    held_out = read_held_out_for(jobs[0], demo.heldout_path(), tokens)
    rows: list[Row] = []
    for job, found in zip(jobs, contenders, strict=True):
        measured = measure_contenders(job, found, held_out)
        rows += measured[1:] if rows else measured
    return rows


def demo_meta(
    command: str,
    job: Job,
    seconds: float,
    *,
    held_out_tokens: int = HELD_OUT_TOKENS,
    healing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Say how a report was made."""
    held_out = read_held_out_for(job, demo.heldout_path(), held_out_tokens)
    return machine_meta(
        command,
        device=job.device,
        data=held_out.to_json(),
        calibration=asdict(job.calibration),
        factoring=asdict(job.factoring),
        grouping=asdict(job.grouping),
        distillation=asdict(job.distillation),
        healing=None if healing is None else dict(healing),
        seconds=round(seconds, 1),
    )
