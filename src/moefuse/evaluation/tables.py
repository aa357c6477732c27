"""Rows as tables: a comparison to read and a listing of everything."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import mean, stdev
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from moefuse.evaluation.rows import TEACHER, Row, Setting, mean_of, setting, stage_order

SETTINGS = ("groups", "rank", "bits", "fraction", "healed_tokens")
# Sizes at one budget differ a little, since experts and ranks come in whole numbers.
SAME_SIZE = 1.1


def markdown_table(rows: Sequence[Row], *, by: Literal["groups", "expert_bytes"] = "groups") -> str:
    """Return a Markdown table: KL to the teacher (and agreement with it) of everything measured.

    One line for every number of groups or, with ``by="expert_bytes"``, for all whose experts take
    the same bytes within 10 %; one column for every method and stage; the lowest KL of each line
    and stage in bold. Rows that differ in nothing but the seed give mean ± standard deviation;
    settings that share a cell are told apart in it. The teacher's own figures stand below.
    """
    measured = [row for row in rows if row.method != TEACHER and row.kl is not None]
    parts = [_comparison(measured, by)] if measured else []
    notes = [_teacher_note(row) for row in rows if row.method == TEACHER]
    parts.extend(note for note in notes if note)
    return "\n\n".join(parts) + "\n"


def _comparison(rows: Sequence[Row], by: str) -> str:
    methods = list(dict.fromkeys(row.method for row in rows))
    stages = sorted({row.stage for row in rows}, key=stage_order)
    used = {(row.stage, row.method) for row in rows}
    columns = [column for column in product(stages, methods) if column in used]
    lead = ["Fused experts", "Expert bytes"] if by == "groups" else ["Expert bytes"]
    titles = [*lead, *(f"{method}, {stage}" if stage else method for stage, method in columns)]
    lines = _lines_by_groups(rows) if by == "groups" else _lines_by_bytes(rows)
    shown = {"groups"} if by == "expert_bytes" else set()
    return markdown(titles, [_line(line, columns, len(lead), shown) for line in lines])


def markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with right-aligned columns."""
    ruler = ["---:"] * len(titles)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ruler, *lines])


def _lines_by_groups(rows: Sequence[Row]) -> list[list[Row]]:
    counts = sorted({row.groups for row in rows}, key=lambda groups: -(groups or math.inf))
    return [[row for row in rows if row.groups == count] for count in counts]


def _lines_by_bytes(rows: Sequence[Row]) -> list[list[Row]]:
    lines: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -(row.expert_bytes or 0)):
        if lines and (lines[-1][0].expert_bytes or 0) <= SAME_SIZE * (row.expert_bytes or 0):
            lines[-1].append(row)
        else:
            lines.append([row])
    return lines


def _line(
    rows: Sequence[Row], columns: Sequence[tuple[str | None, str]], lead: int, shown: set[str]
) -> list[str]:
    groups = "-" if rows[0].groups is None else str(rows[0].groups)
    best = {stage: _best([row for row in rows if row.stage == stage]) for stage, _ in columns}
    cells = [
        _cell([row for row in rows if (row.stage, row.method) == column], best[column[0]], shown)
        for column in columns
    ]
    return [*[groups, _sizes(rows)][-lead:], *cells]


def _best(rows: Sequence[Row]) -> float | None:
    """Return the lowest mean KL of any method and setting, or None without a rival to it."""
    kinds = dict.fromkeys((row.method, setting(row)) for row in rows)
    means = [mean_of((r for r in rows if (r.method, setting(r)) == kind), "kl") for kind in kinds]
    rivals = [value for value in means if value is not None]
    return min(rivals) if len(rivals) > 1 else None


def _cell(rows: Sequence[Row], best: float | None, shown: set[str]) -> str:
    settings = sorted({setting(row) for row in rows}, key=Setting.order)
    varying = [
        name
        for name in SETTINGS
        if name in shown or len({getattr(item, name) for item in settings}) > 1
    ]
    entries = []
    for item in settings:
        label = item.label(varying)
        entry = _entry([row for row in rows if setting(row) == item], best)
        entries.append(f"{label}: {entry}" if label else entry)
    return "<br>".join(entries) or "-"


def _entry(rows: Sequence[Row], best: float | None) -> str:
    kl = [row.kl for row in rows if row.kl is not None]
    text = short(mean(kl))
    text = f"**{text}**" if mean(kl) == best else text
    spread = f" ± {short(stdev(kl))}" if len(kl) > 1 else ""
    agreement = mean_of(rows, "agreement")
    return text + spread + ("" if agreement is None else f" ({agreement:.1%})")


def short(value: float) -> str:
    """Return a KL as people write it: three decimals, or powers of ten where it is tiny."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else f"{value:.1e}"


def _sizes(rows: Sequence[Row]) -> str:
    sizes = [row.expert_bytes for row in rows if row.expert_bytes is not None]
    if not sizes:
        return "-"
    low, high = human_bytes(min(sizes)), human_bytes(max(sizes))
    return low if low == high else f"{low} to {high}"


def human_bytes(size: float) -> str:
    """Return a size in bytes as people write it, three digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _teacher_note(row: Row) -> str:
    facts = [
        None if row.expert_bytes is None else f"{human_bytes(row.expert_bytes)} of experts",
        None if row.cross_entropy is None else f"cross-entropy {row.cross_entropy:.3f}",
        None if row.perplexity is None else f"perplexity {row.perplexity:.2f}",
    ]
    known = ", ".join(fact for fact in facts if fact)
    experts = "" if row.groups is None else f" ({row.groups} experts a layer)"
    return f"Teacher{experts}: {known}." if known else ""


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("Method", str),
    "stage": ("Stage", str),
    "groups": ("G", str),
    "rank": ("R", str),
    "bits": ("Bits", "{:g}".format),
    "fraction": ("Budget", "{:.3g}".format),
    "healed_tokens": ("Healed on", "{:,}".format),
    "seed": ("Seed", str),
    "kl": ("KL", short),
    "agreement": ("Agreement", "{:.1%}".format),
    "cross_entropy": ("Cross-entropy", "{:.3f}".format),
    "perplexity": ("Perplexity", "{:.2f}".format),
    "parameters": ("Parameters", "{:,}".format),
    "active_parameters": ("Active", "{:,}".format),
    "expert_bytes": ("Expert bytes", human_bytes),
    "total_bytes": ("Total bytes", human_bytes),
    "bpw": ("Bits per weight", "{:.3g}".format),
    "tokens": ("Tokens", "{:,}".format),
    "seconds": ("Seconds", "{:.1f}".format),
    "peak_bytes": ("Peak memory", human_bytes),
}
"""Every column of the full listing: its title and how a value is written."""


def listing(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return titles and lines of all rows, columns without a single value left out."""
    used = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    pairs = scored(rows)
    titles = [COLUMNS[name][0] for name in used] + [" ".join(pair) for pair in pairs]
    lines = [
        [_value(row, name) for name in used] + [_score(row, *pair) for pair in pairs]
        for row in rows
    ]
    return titles, lines


def scored(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return every (task, metric) of any row, standard errors left out."""
    pairs = (
        (task, metric)
        for row in rows
        for task, metrics in (row.tasks or {}).items()
        for metric in metrics
        if not metric.partition(",")[0].endswith("_stderr")
    )
    return list(dict.fromkeys(pairs))


def _score(row: Row, task: str, metric: str) -> str:
    metrics = (row.tasks or {}).get(task, {})
    name, comma, way = metric.partition(",")
    value, error = metrics.get(metric), metrics.get(f"{name}_stderr{comma}{way}")
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _value(row: Row, name: str) -> str:
    value, write = getattr(row, name), COLUMNS[name][1]
    if value is None:
        return "-"
    interval = (row.intervals or {}).get(name)
    return write(value) + (f" [{write(interval[0])}, {write(interval[1])}]" if interval else "")


def rich_table(rows: Sequence[Row]) -> Table:
    """Return a table for the terminal: a line for every figure, a column for every row."""
    titles, lines = listing(rows)
    table = Table(show_header=False, title_justify="left")
    for cells in zip(titles, *lines, strict=True):
        table.add_row(*map(escape, cells))
    return table
