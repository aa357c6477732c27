"""The picture of a comparison: distance to the teacher over size, a line for every method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from moefuse.arena.cells import OURS, WHOLE
from moefuse.arena.front import Point, best_at, last_stage, pareto_front, points
from moefuse.artifacts import write_atomically
from moefuse.evaluation.plots import COLOURS, FAINT, INK, MARKERS
from moefuse.evaluation.rows import Row

RIVAL_COLOURS = COLOURS[:-1]
"""For the best rivals; the others are pale, told apart by their marks."""
PALE = "#b9b9b9"
PALE_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "h", "p", "8")
LABELLED = 3
"""So many of the best rivals are named at their line."""
AXES_POINTS, NAME_POINTS = 350.0, 12.0
"""The height of the plot and of a name, in typographic points."""


def pareto_plot(rows: Sequence[Row], path: Path, *, by_parameters: bool = False) -> None:
    """Draw the last stage's KL over bits per weight, both logarithmic, as a PNG of 150 dpi.

    Every method's line goes through its own Pareto front; the shade spans the seeds. Rivals are
    ordered from best to worst. ``by_parameters`` shows the share of the parameters instead, for
    rows whose numbers all have 16 bits.
    """
    measured = [row for row in last_stage(rows) if row.kl]
    figure = Figure(figsize=(9.6, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    size = _share if by_parameters else _bpw
    rivals = ranked_rivals(measured)
    named = []
    for place, name in reversed(list(enumerate(rivals))):
        named.append((_line(measured, name), _rival_look(place), place < LABELLED))
    drawn = [name for name in OURS if _line(measured, name)]
    for place, name in reversed(list(enumerate(drawn))):
        named.append((_line(measured, name), OUR_LOOKS[place], True))
    for line, look, _ in named:
        _draw(axes, line, size, look)
    _dress(axes, points(measured), size, by_parameters=by_parameters)
    _name_lines(axes, [(line[0], look) for line, look, is_named in named if is_named], size)
    _legend(axes, [*OURS, *rivals])
    # No software version inside: the same rows give the same bytes.
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def _bpw(point: Point) -> float:
    return point.bpw


def _share(point: Point) -> float:
    return point.bpw / WHOLE


Size = Callable[[Point], float]


@dataclass(frozen=True)
class Look:
    """How a method's line is drawn."""

    colour: str
    marker: str
    width: float
    order: int
    is_filled: bool = True


OUR_LOOKS = (
    Look("#000000", "o", width=3.4, order=5),
    Look("#6b6b6b", "o", width=2.6, order=4, is_filled=False),
)


def ranked_rivals(rows: Sequence[Row]) -> list[str]:
    """Return the rivals of this design, best first.

    What counts is the mean, over all sizes that any of them has, of the logarithm of the KL of a
    method's best setting of that size; one that has nothing so small stands there as the worst.
    """
    rivals = [row for row in rows if row.method not in OURS]
    measured = points(rivals)
    sizes = sorted({point.bpw for point in measured})
    scores = dict.fromkeys((point.method for point in measured), 0.0)
    for size in sizes:
        best = {name: point.kl for name, point in best_at(rivals, size).items()}
        worst = 2 * max(best.values())
        for name in scores:
            scores[name] += math.log(best.get(name, worst))
    return sorted(scores, key=scores.__getitem__)


def _line(rows: Sequence[Row], name: str) -> list[Point]:
    return pareto_front(row for row in rows if row.method == name)


def _rival_look(place: int) -> Look:
    if place < len(RIVAL_COLOURS):
        return Look(RIVAL_COLOURS[place], MARKERS[place], width=1.8, order=3)
    marker = PALE_MARKERS[(place - len(RIVAL_COLOURS)) % len(PALE_MARKERS)]
    return Look(PALE, marker, width=1.0, order=2, is_filled=False)


def _draw(axes: Axes, line: Sequence[Point], size: Size, look: Look) -> None:
    sizes = [size(point) for point in line]
    axes.plot(
        sizes,
        [point.kl for point in line],
        color=look.colour,
        marker=look.marker,
        linewidth=look.width,
        markersize=5 + look.width,
        markerfacecolor=look.colour if look.is_filled else "white",
        markeredgecolor=look.colour,
        zorder=look.order,
        label=line[0].method,
    )
    if any(len(point.kls) > 1 for point in line):
        lows, highs = [min(p.kls) for p in line], [max(p.kls) for p in line]
        shade = {"color": look.colour, "alpha": 0.18, "linewidth": 0, "zorder": look.order}
        axes.fill_between(sizes, lows, highs, **shade)


def _name_lines(axes: Axes, ends: Sequence[tuple[Point, Look]], size: Size) -> None:
    """Write methods' names at the small ends of their lines, none over another."""
    low, high = axes.get_ylim()
    per_octave = AXES_POINTS / math.log2(high / low)
    ends = sorted(ends, key=lambda end: end[0].kl)
    own = [per_octave * math.log2(point.kl / low) for point, _ in ends]
    for (point, look), place, wanted in zip(ends, spaced(own), own, strict=True):
        axes.annotate(
            point.method,
            (size(point), point.kl),
            xytext=(-9, place - wanted),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=look.colour,
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def spaced(wanted: Sequence[float]) -> list[float]:
    """Return places, ascending as they were wanted, a name's height apart and below the top.

    Both in points above the bottom of the axes.
    """
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + NAME_POINTS) if places else place)
    room = AXES_POINTS - NAME_POINTS / 2
    for number in range(len(places) - 1, -1, -1):
        places[number] = min(places[number], room)
        room = places[number] - NAME_POINTS
    return places


def _dress(axes: Axes, measured: Sequence[Point], size: Size, *, by_parameters: bool) -> None:
    sizes, values = [size(point) for point in measured], [point.kl for point in measured]
    stage = measured[0].stage
    axes.set_title(f"Distance to the teacher, {stage}", loc="left", fontsize=11, color=INK, pad=10)
    axes.set_ylabel("KL to the teacher (nats per token), lower is better", fontsize=10)
    axes.set_xscale("log")
    # Room on the left for the names at the lines' ends.
    axes.set_xlim(min(sizes) / 2.1, max(sizes) * 1.25)
    ticks = [2.0**power for power in range(-12, 6)]
    ticks = [tick for tick in ticks if min(sizes) / 1.5 <= tick <= max(sizes) * 1.25]
    if by_parameters:
        axes.set_xlabel("Numbers of the routed experts, share of the teacher's", fontsize=10)
        axes.set_xticks(ticks, [f"1/{1 / tick:.0f}" if tick < 1 else "1" for tick in ticks])
    else:
        axes.set_xlabel("Bits stored per number of the teacher's routed experts", fontsize=10)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.35, max(values) * 1.35)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, which="both")
    axes.grid(axis="both", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Axes, order: Sequence[str]) -> None:
    handles, names = axes.get_legend_handles_labels()
    drawn = dict(zip(names, handles, strict=True))
    entries = [drawn[name] for name in order if name in drawn]
    axes.legend(
        handles=entries,
        frameon=False,
        fontsize=9,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        handlelength=2.4,
        labelspacing=0.7,
    )
