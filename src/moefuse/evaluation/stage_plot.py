"""The picture of a model card: how far a student is from its teacher, stage by stage."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moefuse.artifacts import write_atomically
from moefuse.errors import UserError
from moefuse.evaluation.plots import COLOURS, FAINT, INK
from moefuse.evaluation.rows import Row

HEIGHT, HEIGHT_OF_STAGE = 0.9, 0.55
"""Inches that the picture is high, without its stages and for each of them."""


def stage_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw KL to the teacher and agreement with it, a line a stage, as a PNG of 150 dpi.

    Whiskers are the rows' 95 % intervals. The same rows give the same bytes. Raises ``UserError``
    when no row has a KL.
    """
    measured = [row for row in rows if row.kl is not None]
    if not measured:
        raise UserError("There is nothing to plot: no row has a `kl`.")
    figure = Figure(
        figsize=(7.2, HEIGHT + HEIGHT_OF_STAGE * len(measured)), dpi=150, layout="constrained"
    )
    FigureCanvasAgg(figure)
    distance, agreement = figure.subplots(1, 2, sharey=True)
    _panel(distance, measured, "kl", "KL (nats per token), lower is better", "{:.3f}".format)
    _panel(
        agreement, measured, "agreement", "first choice alike, higher is better", "{:.1%}".format
    )
    distance.set_yticks(range(len(measured)), [row.stage or row.method for row in measured])
    distance.set_ylim(len(measured) - 0.5, -0.5)
    # No software version inside: the same rows give the same bytes.
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def _panel(
    axes: Axes, rows: Sequence[Row], name: str, title: str, write: Callable[[float], str]
) -> None:
    for line, row in enumerate(rows):
        value = getattr(row, name)
        if value is None:
            continue
        colour = COLOURS[line % len(COLOURS)]
        low, high = (row.intervals or {}).get(name, (value, value))
        axes.plot([low, high], [line, line], color=colour, linewidth=2.0, zorder=3)
        axes.plot([value], [line], "o", color=colour, markersize=6, zorder=4)
        axes.annotate(
            write(value),
            (value, line),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )
    ends = [
        end
        for row in rows
        if getattr(row, name) is not None
        for end in (getattr(row, name), *(row.intervals or {}).get(name, ()))
    ]
    # From 0, so that lengths can be compared; with room for what is written above the points.
    axes.set_xlim(0, 1.15 * max([*ends, 1e-6]) if name == "kl" else 1)
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
