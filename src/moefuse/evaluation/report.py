"""Results as rows, and everything people see made from rows alone.

A row is one measured model. A report is a folder with ``report.json`` (``{"meta", "rows"}``), the
same as ``report.md`` and, where there is something to compare, as ``quality.png``; tables and
plots can be made anew from the JSON file at any time.
"""

import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import psutil
import torch
from rich.markup import escape
from rich.table import Table

from moefuse.artifacts import read_json, write_json, write_text
from moefuse.errors import UserError

TEACHER = "teacher"
STAGES = ("one-shot", "distilled", "healed")
SETTINGS = ("groups", "rank", "bits")
PACKAGES = ("moefuse", "torch", "transformers", "safetensors", "numpy")
CPU_FACTS = Path("/proc/cpuinfo")
# Sizes at one budget differ a little, since experts and ranks come in whole numbers.
SAME_SIZE = 1.1
# A directory in front of a file name, wherever an absolute path can start in a command line.
ABSOLUTE_DIRECTORY = re.compile(r"(?<![\w.\-/])~?/(?:[^\s'\"/]+/)*")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured model; None where something does not apply or was not measured."""

    method: str
    """``teacher``, ``fused``, ``reap``, ``hc-smoe``, ``quantized``, ..."""
    groups: int | None = None
    """Fused or kept experts of a layer."""
    rank: int | None = None
    bits: float | None = None
    """Bits per stored number of an expert."""
    seed: int | None = None
    stage: str | None = None
    """``one-shot``, ``distilled`` or ``healed``."""
    tokens: int | None = None
    """Predicted tokens that the figures are means of."""
    parameters: int | None = None
    active_parameters: int | None = None
    """Parameters that a token passes at most."""
    expert_bytes: int | None = None
    total_bytes: int | None = None
    """Bytes stored: of the routed experts, and of all tensors."""
    kl: float | None = None
    cross_entropy: float | None = None
    """Nats per token."""
    perplexity: float | None = None
    agreement: float | None = None
    """Share of tokens, 0 to 1, where the first choice is the teacher's."""
    seconds: float | None = None
    peak_bytes: int | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    """95 % interval of a metric, by its name."""


def write_report(directory: Path, meta: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write ``report.json``, ``report.md`` and, where rows can be compared, ``quality.png``.

    Each file is written whole or not at all. A figure that is infinite becomes null.
    """
    from moefuse.evaluation.plots import can_plot, quality_plot  # noqa: PLC0415  slow to import

    write_json(directory / "report.json", report_json(meta, rows))
    if can_plot(rows):
        quality_plot(rows, directory / "quality.png")
    write_text(directory / "report.md", _markdown_report(meta, rows, has_plot=can_plot(rows)))


def report_json(meta: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return ``{"meta", "rows"}`` of plain JSON values."""
    return {"meta": meta, "rows": [_finite(asdict(row)) for row in rows]}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """Read ``(meta, rows)`` of a ``report.json`` or of the folder that holds one.

    Raises ``UserError`` for a file that is no report.
    """
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        value = read_json(file)
        return value["meta"], [_row(item) for item in value["rows"]]
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; give a report.json or its folder.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no moefuse report ({error}); make it anew.") from error


def _row(item: dict[str, Any]) -> Row:
    intervals = item.get("intervals")
    if intervals is not None:
        item = {**item, "intervals": {name: tuple(pair) for name, pair in intervals.items()}}
    return Row(**item)


@dataclass(frozen=True)
class _Setting:
    """What tells rows of one method and stage apart, the seed left aside."""

    groups: int | None
    rank: int | None
    bits: float | None

    def order(self) -> tuple[float, ...]:
        """Return a sort key; what is not known comes first."""
        return tuple(-1 if x is None else x for x in (self.groups, self.rank, self.bits))

    def label(self, names: Sequence[str]) -> str:
        words = {"groups": "G = {}", "rank": "R = {}", "bits": "{:g}-bit"}
        values = {name: getattr(self, name) for name in names}
        return ", ".join(words[name].format(x) for name, x in values.items() if x is not None)


def setting(row: Row) -> _Setting:
    """Return what a row must share with another of its method and stage to differ by seed only."""
    return _Setting(row.groups, row.rank, row.bits)


def stage_order(stage: str | None) -> tuple[int, str]:
    """Return a sort key that puts stages in the order in which they happen."""
    known = STAGES.index(stage) if stage in STAGES else len(STAGES)
    return known, stage or ""


def markdown_table(rows: Sequence[Row], *, by: Literal["groups", "expert_bytes"] = "groups") -> str:
    """Return a Markdown table: KL to the teacher (and agreement with it) of everything measured.

    One line for every number of groups or, with ``by="expert_bytes"``, for all whose experts take
    the same bytes within 10 %; one column for every method and stage; the lowest KL of each line
    and stage in bold. Rows that differ in nothing but the seed give mean ± standard deviation;
    settings that share a cell are told apart in it. The teacher's own figures stand below.
    """
    measured = [row for row in rows if row.method != TEACHER and row.kl is not None]
    parts = [_comparison(measured, by)] if measured else []
    parts.extend(_teacher_note(row) for row in rows if row.method == TEACHER)
    return "\n\n".join(parts) + "\n"


def _comparison(rows: Sequence[Row], by: str) -> str:
    methods = list(dict.fromkeys(row.method for row in rows))
    stages = sorted({row.stage for row in rows}, key=stage_order)
    used = {(row.stage, row.method) for row in rows}
    columns = [column for column in product(stages, methods) if column in used]
    lead = ["Experts", "Expert bytes"] if by == "groups" else ["Expert bytes"]
    titles = [*lead, *(f"{method}, {stage}" if stage else method for stage, method in columns)]
    lines = _lines_by_groups(rows) if by == "groups" else _lines_by_bytes(rows)
    shown = {"groups"} if by == "expert_bytes" else set()
    return _markdown(titles, [_line(line, columns, len(lead), shown) for line in lines])


def _markdown(titles: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
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
    settings = sorted({setting(row) for row in rows}, key=_Setting.order)
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
    text = _short(mean(kl))
    text = f"**{text}**" if mean(kl) == best else text
    spread = f" ± {_short(stdev(kl))}" if len(kl) > 1 else ""
    agreement = mean_of(rows, "agreement")
    return text + spread + ("" if agreement is None else f" ({agreement:.1%})")


def mean_of(rows: Iterable[Row], name: str) -> float | None:
    """Return the mean of a row's figure over the rows that have it, or None where none has."""
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return mean(values) if values else None


def _short(value: float) -> str:
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
    experts = "" if row.groups is None else f" ({row.groups} experts a layer)"
    return f"Teacher{experts}: {', '.join(fact for fact in facts if fact)}."


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "method": ("Method", str),
    "stage": ("Stage", str),
    "groups": ("G", str),
    "rank": ("R", str),
    "bits": ("Bits", "{:g}".format),
    "seed": ("Seed", str),
    "kl": ("KL", _short),
    "agreement": ("Agreement", "{:.1%}".format),
    "cross_entropy": ("Cross-entropy", "{:.3f}".format),
    "perplexity": ("Perplexity", "{:.2f}".format),
    "parameters": ("Parameters", "{:,}".format),
    "active_parameters": ("Active", "{:,}".format),
    "expert_bytes": ("Expert bytes", human_bytes),
    "total_bytes": ("Total bytes", human_bytes),
    "tokens": ("Tokens", "{:,}".format),
    "seconds": ("Seconds", "{:.1f}".format),
    "peak_bytes": ("Peak memory", human_bytes),
}
"""Every column of the full listing: its title and how a value is written."""


def _listing(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return titles and lines of all rows, columns without a single value left out."""
    used = [name for name in COLUMNS if any(getattr(row, name) is not None for row in rows)]
    titles = [COLUMNS[name][0] for name in used]
    return titles, [[_value(row, name) for name in used] for row in rows]


def _value(row: Row, name: str) -> str:
    value, write = getattr(row, name), COLUMNS[name][1]
    if value is None:
        return "-"
    interval = (row.intervals or {}).get(name)
    return write(value) + (f" [{write(interval[0])}, {write(interval[1])}]" if interval else "")


def rich_table(rows: Sequence[Row]) -> Table:
    """Return a table for the terminal: a line for every figure, a column for every row."""
    titles, lines = _listing(rows)
    table = Table(show_header=False, title_justify="left")
    for cells in zip(titles, *lines, strict=True):
        table.add_row(*map(escape, cells))
    return table


def _markdown_report(meta: dict[str, Any], rows: Sequence[Row], *, has_plot: bool) -> str:
    facts = [f"- {key}: {_inline(value)}" for key, value in meta.items() if value is not None]
    parts = [
        "# Results",
        markdown_table(rows).strip(),
        "![KL to the teacher by expert bytes](quality.png)" if has_plot else "",
        "KL is the mean KL(teacher || model) in nats per token, in parentheses the share of tokens "
        "whose first choice is the teacher's. Square brackets hold 95 % intervals, bootstrapped "
        "over documents.",
        "## All rows",
        _markdown(*_listing(rows)) if rows else "",
        "## How this was made",
        "\n".join(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return f"`{value}`" if isinstance(value, str) else str(value)


def machine_meta(
    command: str,
    *,
    device: str = "cpu",
    data: dict[str, Any] | None = None,
    **details: Any,
) -> dict[str, Any]:
    """Return what a report says about its making.

    ``command`` is the command line; directories of absolute paths are taken out of it. ``data``
    says what the figures were measured on (name, documents, tokens, a fingerprint). ``details``
    come last, as they are. Nothing names the machine or its folders.
    """
    return {
        "command": ABSOLUTE_DIRECTORY.sub("", command),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": _device(device),
        "data": data,
        **details,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return moefuse's own commit, with ``-dirty`` if changed, when it runs from its repository."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_FACTS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def _device(device: str) -> str:
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else str(kind)
