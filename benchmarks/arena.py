"""The comparison that the README quotes: which cells, with how many seeds, on one teacher.

Every rival is measured with one seed; this design and the rivals that came near it, with three.
``moefuse compare`` does the work, one command after another on the same output, which its report
gathers. Several processes with ``--part 0/16`` to ``--part 15/16`` share it; the one that finishes
last leaves the report in benchmarks/results/NAME and the tables in README.md, between its marks.

Run it by ``make arena``, or for another teacher with ``--checkpoint`` and ``--name``.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from moefuse import demo
from moefuse.arena.cells import FUSED, FUSED_BF16, Wishes
from moefuse.arena.front import ratio_table, ratio_table_16_bits
from moefuse.arena.report import COMPARISON, PARAMETERS_PLOT, PLOT, ratio_lines
from moefuse.arena.run import compare
from moefuse.artifacts import write_text
from moefuse.evaluation.report import read_report
from moefuse.evaluation.tables import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- arena: begin -->", "<!-- arena: end -->"
TEACHERS = {
    "arena": "The bundled teacher (DeepSeek-V2 style, with shared experts)",
    "arena-qwen3_moe": "A second teacher (Qwen3-MoE style, no shared experts)",
}
"""What is said of the reports that README.md quotes."""
PARAMETERS = (0.25, 0.125, 0.0625, 0.03125)
"""Shares of the routed experts' parameters, all in 16 bits."""
BYTES = (0.125, 0.09375, 0.0625, 0.03125, 0.015625)
"""Shares of their bytes: 2, 1.5, 1, 0.5 and 0.25 bits per number."""
MORE_BYTES = (0.5, 0.25, 0.1875)
SEEDS = 3


def rounds() -> list[Wishes]:
    """List what is compared, the most telling first."""
    multiplexing = (
        "multiplex-mean",
        "multiplex-fused-lora",
        "multiplex-mixture-of-lora",
        "multiplex-bases-only",
        "multiplex-sce",
        "multiplex-output-clusters",
        "multiplex-halving",
    )
    near_whole = ("reap", "ream", "m-smoe", "hc-smoe", "d2-moe", "naee")
    structural = (*near_whole, "frequency", "mobe")
    return [
        Wishes((FUSED,), (*MORE_BYTES, *BYTES), SEEDS),
        Wishes((FUSED_BF16,), PARAMETERS, SEEDS),
        Wishes(("reap", "ream", "naee"), BYTES, SEEDS, bits=(2,)),
        Wishes(near_whole, PARAMETERS, SEEDS, bits=(16,)),
        Wishes(("gptq", "qmoe", "signs"), (1.0,), SEEDS),
        Wishes(structural, PARAMETERS, 1, bits=(16,)),
        Wishes(("round-to-nearest",), (1.0,), 1),
        Wishes(multiplexing, PARAMETERS, 1, bits=(16,)),
        Wishes(structural, BYTES, 1, bits=(2,)),
        Wishes(structural, (0.25, 0.125, 0.0625), 1, bits=(4,)),
    ]


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="Teacher; the bundled one.")] = None,
    name: Annotated[str, typer.Option(help="The report's folder in results.")] = "arena",
    out: Annotated[Path, typer.Option(help="Cells and artifacts.")] = Path("runs/arena"),
    device: str = "auto",
    part: Annotated[str | None, typer.Option(help="Only this part, such as 0/16.")] = None,
) -> None:
    """Compare, and keep the report."""
    values = {"device": device, "dtype": "float32", "data": str(demo.calibration_path())}
    teacher, held_out = checkpoint or demo.teacher_path(), str(demo.heldout_path())
    *earlier, last = rounds()
    for wishes in earlier:
        compare(teacher, out, values, wishes, held_out=held_out, part=part)
    found = compare(teacher, out, values, last, held_out=held_out, part=part)
    if not found.missing:
        kept = RESULTS / name
        kept.mkdir(parents=True, exist_ok=True)
        for file in (COMPARISON, "compare.md", PLOT, PARAMETERS_PLOT):
            shutil.copyfile(out / file, kept / file)
        write_readme()


def write_readme() -> None:
    """Replace what stands between the marks in README.md by the ratios of the reports kept."""
    parts = [part for name, told in TEACHERS.items() for part in _ratios(RESULTS / name, told)]
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    write_text(readme, before + "\n\n".join([BEGIN, *parts, END]) + after)


def _ratios(report: Path, told: str) -> list[str]:
    """Return one report's tables, Markdown; nothing where there is no report."""
    if not (report / COMPARISON).exists():
        return []
    meta, rows = read_report(report / COMPARISON)
    titles = ["Budget, bits per number", "This design", "Best rival", "Rival's KL / ours"]
    return [
        f"{told}, equal true bytes:",
        markdown(titles, ratio_lines(ratio_table(rows))),
        f"{told}, equal parameters, all in 16 bits:",
        markdown(titles, ratio_lines(ratio_table_16_bits(rows))),
        f"Written by `benchmarks/arena.py` from [the report]"
        f"(benchmarks/results/{report.name}/compare.md), commit `{meta['commit'][:7]}`.",
    ]


if __name__ == "__main__":
    sys.exit(typer.run(main))
