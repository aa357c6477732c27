"""Results as rows, and everything people see made from rows alone.

A row is one measured model. A report is a folder with ``report.json`` (``{"meta", "rows"}``), the
same as ``report.md`` and, where there is something to compare, as ``quality.png``; tables and
plots can be made anew from the JSON file at any time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moefuse.artifacts import read_json, write_json, write_text
from moefuse.errors import UserError
from moefuse.evaluation.machine import machine_meta
from moefuse.evaluation.rows import Row
from moefuse.evaluation.tables import listing, markdown, markdown_table, rich_table

__all__ = [
    "Row",
    "facts",
    "machine_meta",
    "markdown_table",
    "read_report",
    "report_json",
    "rich_table",
    "row_from_json",
    "write_report",
]


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
        return value["meta"], [row_from_json(item) for item in value["rows"]]
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; give a report.json or its folder.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no moefuse report ({error}); make it anew.") from error


def row_from_json(item: dict[str, Any]) -> Row:
    """Return the row that ``report_json`` wrote as ``item``; raises ``TypeError`` for another."""
    intervals = item.get("intervals")
    if intervals is not None:
        item = {**item, "intervals": {name: tuple(pair) for name, pair in intervals.items()}}
    return Row(**item)


def _markdown_report(meta: dict[str, Any], rows: Sequence[Row], *, has_plot: bool) -> str:
    parts = [
        "# Results",
        markdown_table(rows).strip(),
        "![KL to the teacher by expert bytes](quality.png)" if has_plot else "",
        "KL is the mean KL(teacher || model) in nats per token, in parentheses the share of tokens "
        "whose first choice is the teacher's. Square brackets hold 95 % intervals, bootstrapped "
        "over documents.",
        "## All rows",
        markdown(*listing(rows)) if rows else "",
        "## How this was made",
        facts(meta),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(meta: Mapping[str, Any]) -> str:
    """Return what a report says of how it was made as a Markdown list."""
    known = {key: value for key, value in meta.items() if value is not None}
    return "\n".join(f"- {key}: {_inline(value)}" for key, value in known.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    return f"`{value}`" if isinstance(value, str) else str(value)
