"""The picture of a report: how far each method is from the teacher, at which size."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from moefuse.artifacts import write_atomically
from moefuse.errors import UserError
from moefuse.evaluation.rows import TEACHER, Row, mean_of, setting, stage_order
from moefuse.evaluation.tables import human_bytes

# Okabe and Ito's colours, told apart by colour-blind people; yellow is left out on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "D", "h", "p", "8", "H")
"""All of them roomy enough for two digits."""
DASHES = {"one-shot": (0, (4, 2.5)), "distilled": "-", "healed": (0, (6, 1.5, 1, 1.5))}
INK, FAINT = "#222222", "#8a8a8a"
LEAST_SPAN = 2.5
"""How many times its left end the right end of the size axis is at least: room for two ticks."""
LOG_FROM = 6.0
"""How many times the largest KL must exceed the smallest for a log axis to read better."""


def can_plot(rows: Sequence[Row]) -> bool:
    """Say whether any row has both figures that the plot shows."""
    return bool(_measured(rows))


def quality_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw KL to the teacher over the bytes of the experts and write it as a PNG, 150 dpi.

    One line for every method and stage; the shade spans the seeds. Sizes are shares of the
    teacher's where its row tells its bytes, else bytes. Raises ``UserError`` when no row has both.
    """
    measured = _measured(rows)
    if not measured:
        raise UserError("There is nothing to plot: no row has both `kl` and `expert_bytes`.")
    teacher = next((row for row in rows if row.method == TEACHER), None)
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, measured, teacher)
    # No software version inside: the same rows give the same bytes.
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def _measured(rows: Sequence[Row]) -> list[Row]:
    # A KL of zero is an exact copy; a log axis has no place for it.
    return [row for row in rows if row.method != TEACHER and row.kl and row.expert_bytes]


def _draw(axes: Axes, rows: Sequence[Row], teacher: Row | None) -> None:
    whole = teacher.expert_bytes if teacher and teacher.expert_bytes else None
    methods = list(dict.fromkeys(row.method for row in rows))
    stages = sorted({row.stage for row in rows}, key=stage_order)
    for stage in stages:
        for number, method in enumerate(methods):
            line = [row for row in rows if (row.method, row.stage) == (method, stage)]
            _line(axes, line, number, whole or 1, is_last=stage == stages[-1])
    _dress(axes, rows, teacher)
    _legend(axes, methods, stages, has_groups=any(row.groups is not None for row in rows))


def _points(rows: Sequence[Row]) -> list[tuple[float, list[float], int | None]]:
    """Return (bytes, KL of every seed, groups) for every setting, smallest first."""
    points = []
    for item in {setting(row) for row in rows}:
        same = [row for row in rows if setting(row) == item]
        size = mean_of(same, "expert_bytes") or 0.0
        points.append((size, [row.kl for row in same if row.kl is not None], item.groups))
    return sorted(points, key=lambda point: point[0])


def _line(axes: Axes, rows: Sequence[Row], number: int, whole: float, *, is_last: bool) -> None:
    points = _points(rows)
    if not points:
        return
    colour = COLOURS[number % len(COLOURS)]
    sizes = [size / whole for size, _, _ in points]
    means = [mean(kl) for _, kl, _ in points]
    axes.plot(
        sizes,
        means,
        color=colour,
        linestyle=DASHES.get(rows[0].stage or "", "-"),
        linewidth=2.0 if is_last else 1.4,
        marker=MARKERS[number % len(MARKERS)],
        markersize=11 if is_last else 5.5,
        markerfacecolor=colour if is_last else "white",
        markeredgecolor=colour,
        markeredgewidth=1.4,
        zorder=4 if is_last else 3,
    )
    if any(len(kl) > 1 for _, kl, _ in points):
        lows, highs = [min(kl) for _, kl, _ in points], [max(kl) for _, kl, _ in points]
        axes.fill_between(sizes, lows, highs, color=colour, alpha=0.16, linewidth=0, zorder=2)


def _name_groups(axes: Axes, rows: Sequence[Row], whole: float) -> None:
    """Write the number of fused experts into the markers of the last stage, which are big enough.

    Only models with deltas have fused experts; rivals at the same bytes keep another number.
    """
    rows = [row for row in rows if row.rank is not None]
    last = max((row.stage for row in rows), key=stage_order, default=None)
    for method in dict.fromkeys(row.method for row in rows):
        line = [row for row in rows if (row.method, row.stage) == (method, last)]
        for size, kl, groups in _points(line):
            if groups is not None:
                axes.text(
                    size / whole,
                    mean(kl),
                    str(groups),
                    ha="center",
                    va="center_baseline",
                    fontsize=7,
                    fontweight="bold",
                    color="white",
                    zorder=5,
                )


def _dress(axes: Axes, rows: Sequence[Row], teacher: Row | None) -> None:
    whole = teacher.expert_bytes if teacher and teacher.expert_bytes else None
    _name_groups(axes, rows, whole or 1)
    _size_axis(axes, [(row.expert_bytes or 0) / (whole or 1) for row in rows], whole)
    _kl_axis(axes, [row.kl or 0.0 for row in rows])
    axes.set_title(_headline(teacher), loc="left", fontsize=10, color=INK, pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, which="both")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _headline(teacher: Row | None) -> str:
    if teacher is None:
        return "Distance to the teacher"
    facts = [
        f"{human_bytes(teacher.expert_bytes)} of experts" if teacher.expert_bytes else "",
        f"perplexity {teacher.perplexity:.2f}" if teacher.perplexity else "",
    ]
    return "Distance to the teacher (" + ", ".join(fact for fact in facts if fact) + ")"


def _size_axis(axes: Axes, sizes: Sequence[float], whole: float | None) -> None:
    low, high = min(sizes), max(sizes)
    margin = max(1.15, (LEAST_SPAN * low / high) ** 0.5)
    ticks = _round_ticks(low / margin, high * margin)
    write = human_bytes if whole is None else lambda size: f"{100 * size:.3g} %"
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.set_xticks(ticks, [write(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    label = "Bytes of the routed experts"
    axes.set_xlabel(label if whole is None else label + ", share of the teacher's", fontsize=10)


def _round_ticks(low: float, high: float) -> list[float]:
    """Return the round numbers between two sizes, fewer of each power of ten on a long axis."""
    digits = (1, 1.5, 2, 3, 5, 7) if high < 50 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [digit * 10.0**power for power in range(-9, 16) for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _kl_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_ylabel("KL to the teacher (nats per token), lower is better", fontsize=10)
    if max(values) < LOG_FROM * min(values):
        axes.set_ylim(0, 1.06 * max(values))
        return
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.35, max(values) * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(
    axes: Axes, methods: Sequence[str], stages: Sequence[str | None], *, has_groups: bool
) -> None:
    entries = [
        Line2D(
            [],
            [],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            ms=8,
            linewidth=2,
            label=method,
        )
        for i, method in enumerate(methods)
    ]
    if len(stages) > 1:
        entries += [
            Line2D([], [], color=FAINT, linestyle=DASHES.get(stage or "", "-"), label=stage)
            for stage in stages
        ]
    if has_groups:
        entries.append(Line2D([], [], linestyle="", label="number: fused experts in a layer"))
    axes.legend(handles=entries, frameon=False, fontsize=9, loc="best", handlelength=2.6)
