"""This design and two rivals on the bundled teacher at equal bytes, all distilled, three seeds.

Writes benchmarks/results/quality.{json,md,png} and the table in README.md between its marks.
Run it by ``make quality``; it goes on where it was interrupted.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from moefuse import demo
from moefuse.artifacts import read_json, write_json, write_text
from moefuse.comparison import contenders_at
from moefuse.console import say
from moefuse.demo.run import (
    GROUPS,
    HELD_OUT_TOKENS,
    RIVALS,
    SETTINGS,
    demo_meta,
    measure_sizes,
)
from moefuse.evaluation.report import Row, markdown_table, write_report
from moefuse.evaluation.rows import TEACHER
from moefuse.pipeline import Job

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- quality: begin -->", "<!-- quality: end -->"


def main(
    work: Path = Path("runs/quality"),
    seeds: int = 3,
    part: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Measure only this seed and number of groups; to run several at once."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to name where there is no git to ask.")
    ] = None,
    measured_on: Annotated[
        str | None, typer.Option(help="Where the parts were measured, if on another machine.")
    ] = None,
) -> None:
    """Measure every seed and size, then write the results."""
    start = time.monotonic()
    if part is not None:
        measured(work, *part)
        return
    rows: list[Row] = []
    for seed in range(seeds):
        for groups in GROUPS:
            found = measured(work, seed, groups)
            rows += [row for row in found if row.method != TEACHER or not rows]
    job = Job(demo.teacher_path(), work, {**SETTINGS, "groups": GROUPS[0]})
    meta = demo_meta("make quality", job, time.monotonic() - start)
    meta |= {"seeds": list(range(seeds)), "commit": commit or meta["commit"]}
    if measured_on:
        meta["measured_on"] = measured_on
    write_report(work / "report", meta, rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.md", "quality.png"):
        (RESULTS / f"quality.{name.split('.')[1]}").write_bytes(
            (work / "report" / name).read_bytes()
        )
    put_into_readme(rows, meta)


def measured(work: Path, seed: int, groups: int) -> list[Row]:
    """Measure one seed and size, or read what an earlier run measured."""
    path = work / f"rows-{seed}-{groups}.json"
    if path.exists():
        return [Row(**item) for item in read_json(path)]
    values = {**SETTINGS, "groups": groups, "seed": seed}
    job = Job(demo.teacher_path(), work, values)
    say(f"Seed {seed}, {groups} fused experts")
    rows = measure_sizes(
        [job], [contenders_at(job, RIVALS, rivals_distilled=True)], HELD_OUT_TOKENS
    )
    write_json(path, [vars(row) for row in rows])
    return rows


def put_into_readme(rows: list[Row], meta: dict) -> None:
    """Replace what stands between the marks in README.md by the table of ``rows``."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    said = (
        f"Written by `make quality` at commit `{meta['commit']}`: "
        f"{len(meta['seeds'])} seeds, {meta['data']['tokens']} held-out tokens."
    )
    write_text(readme, f"{before}{BEGIN}\n{markdown_table(rows)}\n\n{said}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(typer.run(main))
