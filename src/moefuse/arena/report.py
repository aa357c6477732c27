"""The report of a comparison: ``compare.json``, ``compare.md`` and plots, all made from rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moefuse.arena.cells import FUSED, FUSED_BF16, OURS, WHOLE
from moefuse.arena.front import (
    Point,
    Ratio,
    best_at,
    budgets,
    last_stage,
    pareto_front,
    points,
    ratio_table,
    ratio_table_16_bits,
)
from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.report import facts
from moefuse.evaluation.rows import TEACHER, Row, stage_order
from moefuse.evaluation.tables import human_bytes, listing, markdown, scored, short

COMPARISON = "compare.json"
TASKS_NOTE = (
    "Scores of tasks are those of the last stage's students: means, and with several seeds their "
    "standard deviations."
)
PLOT, PARAMETERS_PLOT = "pareto.png", "pareto-parameters.png"


@dataclass(frozen=True)
class Impossible:
    """A cell that cannot be made, and why."""

    method: str
    bits: float | None
    fraction: float | None
    seed: int
    reason: str


def write_comparison(
    out: Path,
    comparison: dict[str, Any],
    meta: dict[str, Any],
    rows: Sequence[Row],
    impossible: Sequence[Impossible],
) -> None:
    """Write ``compare.json`` (``comparison``), ``compare.md`` and the plots to ``out``."""
    from moefuse.arena.plot import pareto_plot  # noqa: PLC0415  slow to import

    measured = points(last_stage(rows))
    whole = [row for row in rows if row.method == TEACHER or row.bits == WHOLE]
    plots = []
    if measured:
        pareto_plot(rows, out / PLOT)
        plots.append(PLOT)
    if points(last_stage(whole)):
        pareto_plot(whole, out / PARAMETERS_PLOT, by_parameters=True)
        plots.append(PARAMETERS_PLOT)
    write_text(out / "compare.md", comparison_markdown(meta, rows, impossible, plots))
    write_json(out / COMPARISON, comparison)


def comparison_markdown(
    meta: dict[str, Any],
    rows: Sequence[Row],
    impossible: Sequence[Impossible],
    plots: Sequence[str] = (),
) -> str:
    """Return the whole report; ``plots`` are the names of pictures beside it."""
    parts = [
        "# Comparison",
        *(f"![KL to the teacher by size]({name})" for name in plots),
        summary(rows),
        *_front(rows),
        *_chosen(rows),
        *_budget_parts(rows),
        *_active(rows),
        *_impossible(impossible),
        "## All rows",
        markdown(*listing(rows)) if rows else "Nothing could be made.",
        "## How this was made",
        facts(meta),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """Return the tables of ratios alone, Markdown."""
    parts = [
        *_ratios("At equal true bytes", ratio_table(rows), FUSED),
        *_ratios("At equal parameters, all in 16 bits", ratio_table_16_bits(rows), FUSED_BF16),
    ]
    return "\n\n".join(parts)


def ratio_lines(ratios: Sequence[Ratio]) -> list[list[str]]:
    """Return a table's lines: budget, ours, the best rival and how many times our KL it has."""
    return [
        [
            f"{ratio.budget:.3g}",
            "-" if ratio.ours is None else _figure(ratio.ours),
            "-" if ratio.rival is None else f"{_called(ratio.rival)}: {_figure(ratio.rival)}",
            "-" if ratio.value is None else f"{ratio.value:.2f}",
        ]
        for ratio in ratios
    ]


def _ratios(title: str, ratios: Sequence[Ratio], ours: str) -> list[str]:
    if all(ratio.ours is None and ratio.rival is None for ratio in ratios):
        return []
    titles = ["Budget (bits per weight)", ours, "Best rival", "KL ratio"]
    return [
        f"## {title}",
        "Mean KL(teacher || model), nats per token, of the last stage; every rival at its best "
        f"number of bits within the budget. Above 1, {ours} is better.",
        markdown(titles, ratio_lines(ratios)),
    ]


def _front(rows: Sequence[Row]) -> list[str]:
    front = pareto_front(last_stage(rows))
    if not front:
        return []
    lines = [[f"{point.bpw:.3f}", _called(point), _figure(point)] for point in front]
    return [
        "## Pareto front",
        "No other setting of any method is both no larger and no worse.",
        markdown(["Bits per weight", "Method", "KL"], lines),
    ]


def _chosen(rows: Sequence[Row]) -> list[str]:
    """Say what the planner chose at every budget, in plain words, and whether anything beats it."""
    measured = last_stage(rows)
    front = pareto_front(measured)
    ours = [point for point in points(measured) if point.method == FUSED]
    lines = [
        [
            f"{point.bpw:.3f}",
            _figure(point),
            "yes" if point in front else "no",
            point.rows[0].advice or "-",
        ]
        for point in sorted(ours, key=lambda point: point.bpw)
    ]
    titles = ["Bits per weight", "KL", "On the Pareto front", "In plain words"]
    return ["## What the planner chose", markdown(titles, lines)] if lines else []


def _budget_parts(rows: Sequence[Row]) -> list[str]:
    return [
        text
        for share, budget in budgets(rows).items()
        for text in (
            f"## Budget {share:.4g} of the teacher's routed experts ({budget:.3g} bits per weight)",
            TASKS_NOTE if scored(rows) else "",
            _budget_table(rows, share, budget),
        )
    ]


def _budget_table(rows: Sequence[Row], share: float, budget: float) -> str:
    """Return a line for every setting made for this budget; each method's best bits are bold.

    A method without a budget stands there with its best setting that fits.
    """
    stages = sorted({row.stage for row in rows if row.stage is not None}, key=stage_order)
    free = best_at((row for row in last_stage(rows) if row.fraction is None), budget)
    kept = {(name, point.bits) for name, point in free.items()}
    made = [
        point
        for point in points(rows)
        if point.fraction == share
        or (point.fraction is None and (point.method, point.bits) in kept)
    ]
    settings = dict.fromkeys((point.method, point.bits) for point in made)
    pairs = scored(rows)
    lines = [
        _line([p for p in made if (p.method, p.bits) == key], made, stages, pairs)
        for key in settings
    ]
    figures = [*stages, *map(" ".join, pairs)]
    titles = ["Method", "Bits", *figures, "Expert bytes", "Bits per weight", "Active parameters"]
    return markdown(titles, sorted(lines, key=lambda line: line[0])) if lines else "Nothing fits."


def _line(
    same: Sequence[Point],
    made: Sequence[Point],
    stages: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> list[str]:
    """Return one setting's line; ``same`` are its points at every stage.

    ``pairs`` are the tasks and metrics that have columns.
    """
    first = same[0]
    cells = []
    for stage in stages:
        rivals = [p for p in made if (p.method, p.stage) == (first.method, stage)]
        point = next((p for p in same if p.stage == stage), None)
        best = min((p.kl for p in rivals), default=None)
        cells.append("-" if point is None else _figure(point, bold=point.kl == best))
    size, active = first.mean("expert_bytes"), first.mean("active_parameters")
    return [
        first.method,
        "-" if first.bits is None else f"{first.bits:g}",
        *cells,
        *(_score(same, *pair) for pair in pairs),
        "-" if size is None else human_bytes(size),
        f"{first.bpw:.3f}",
        "-" if active is None else f"{active:,.0f}",
    ]


def _figure(point: Point, *, bold: bool = False) -> str:
    text = f"**{short(point.kl)}**" if bold else short(point.kl)
    spread = "" if point.deviation is None else f" ± {short(point.deviation)}"
    agreement = point.mean("agreement")
    return text + spread + ("" if agreement is None else f" ({agreement:.1%})")


def _score(same: Sequence[Point], task: str, metric: str) -> str:
    """Return the mean score over the rows that have one, which differ by the seed only."""
    found = [(row.tasks or {}).get(task, {}).get(metric) for point in same for row in point.rows]
    scores = [score for score in found if score is not None]
    if not scores:
        return "-"
    return f"{mean(scores):.3f}" + (f" ± {stdev(scores):.3f}" if len(scores) > 1 else "")


def _called(point: Point) -> str:
    return point.method if point.bits is None else f"{point.method}, {point.bits:g}-bit"


def _active(rows: Sequence[Row]) -> list[str]:
    teacher = next((r.active_parameters for r in rows if r.method == TEACHER), None)
    ours = [p for p in points(last_stage(rows)) if p.method in OURS]
    most = [(p, p.mean("active_parameters")) for p in ours]
    if teacher is None or not ours:
        return []
    lines = [
        [p.method, f"{p.bpw:.3f}", f"{active:,.0f}", f"{active / teacher:.1%}"]
        for p, active in most
        if active is not None
    ]
    titles = ["Method", "Bits per weight", "Active parameters", "Of the teacher's"]
    return [
        "## Active parameters",
        f"A token passes at most {teacher:,} of the teacher's parameters.",
        markdown(titles, lines),
    ]


def _impossible(impossible: Sequence[Impossible]) -> list[str]:
    if not impossible:
        return []
    told: dict[tuple, list[str]] = {}
    for cell in impossible:
        setting = (cell.method, cell.bits, cell.fraction, cell.reason)
        told.setdefault(setting, []).append(str(cell.seed))
    lines = [
        [
            name,
            "-" if bits is None else f"{bits:g}",
            "-" if fraction is None else f"{fraction:.4g}",
            ", ".join(seeds),
            reason,
        ]
        for (name, bits, fraction, reason), seeds in told.items()
    ]
    titles = ["Method", "Bits", "Budget", "Seeds", "Why"]
    return ["## Impossible", markdown(titles, lines)]
