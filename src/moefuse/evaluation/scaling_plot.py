"""The picture of one scaling law: what was measured, every form, and the point left out."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from moefuse.artifacts import write_atomically
from moefuse.evaluation.plots import COLOURS, FAINT, INK
from moefuse.evaluation.scaling import AXES, TOKENS, Law, Place
from moefuse.mathematics.curves import (
    LINEAR,
    POWER,
    QUADRATIC,
    SATURATION,
    Array,
    Points,
    bootstrap,
)

LOOKS = {
    LINEAR: (COLOURS[0], "-"),
    POWER: (COLOURS[1], "-"),
    SATURATION: (COLOURS[2], "-"),
    QUADRATIC: (COLOURS[3], "-"),
}
"""Colour and line of every form, the same in all pictures."""
SAMPLES = 120


def law_plot(law: Law, unhealed: Mapping[Place, float], path: Path) -> None:
    """Draw KL along one axis with the forms fitted to it and write it as a PNG, 150 dpi.

    The shade is the best form's 95% interval, the diamond the largest point as the others predict
    it, with its interval. ``unhealed`` is the KL of students that were not healed; the one that
    belongs to the data scaling law is drawn as a line, since 0 has no place on its axis.
    """
    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, law, unhealed)
    # No software version inside: the same rows give the same bytes.
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def draw(axes: Axes, law: Law, unhealed: Mapping[Place, float]) -> None:
    """Draw a law into ``axes`` (see ``law_plot``)."""
    points = Points.of(law.points)
    x_M = _samples(points.x_N)
    for found in law.fits:
        colour, dashes = LOOKS[found.form]
        is_best = found.form == law.best
        axes.plot(
            x_M,
            found.curve(x_M),
            color=colour,
            linestyle=dashes if is_best else (0, (4, 2)),
            linewidth=2.2 if is_best else 1.3,
            label=f"{found.form}, best" if is_best else found.form,
            zorder=3,
        )
        if is_best and (band := bootstrap(found.curve, points, x_M)) is not None:
            low_M, high_M = zip(*band.curve, strict=True)
            axes.fill_between(x_M, low_M, high_M, color=colour, alpha=0.16, linewidth=0, zorder=2)
    _draw_points(axes, law)
    _draw_forecast(axes, law)
    left = _unhealed_kl(law, unhealed)
    if left is not None:
        axes.axhline(left, color=FAINT, linewidth=1.2, linestyle=(0, (1, 2)), label="unhealed")
    _dress(axes, law, left)


def _samples(x_N: Array) -> Array:
    """Return x's between the ends, even in the logarithm of x + 1 so that small ones get enough."""
    return np.expm1(np.linspace(np.log1p(x_N[0]), np.log1p(x_N[-1]), SAMPLES))


def _draw_points(axes: Axes, law: Law) -> None:
    means = [mean(kls) for _, kls in law.points]
    low = [m - min(kls) for m, (_, kls) in zip(means, law.points, strict=True)]
    high = [max(kls) - m for m, (_, kls) in zip(means, law.points, strict=True)]
    axes.errorbar(
        [x for x, _ in law.points],
        means,
        yerr=[low, high],
        fmt="o",
        color=INK,
        markersize=6,
        capsize=3,
        linewidth=1.2,
        label="measured" + (", span of seeds" if max(len(k) for _, k in law.points) > 1 else ""),
        zorder=5,
    )


def _draw_forecast(axes: Axes, law: Law) -> None:
    found = law.forecast
    if found is None:
        return
    low, high = found.interval or (found.predicted, found.predicted)
    axes.errorbar(
        [found.x],
        [found.predicted],
        yerr=[[max(found.predicted - low, 0.0)], [max(high - found.predicted, 0.0)]],
        fmt="D",
        color=LOOKS[found.form][0],
        markerfacecolor="none",
        markeredgewidth=1.6,
        markersize=11,
        capsize=4,
        linewidth=1.4,
        label=f"predicted without it ({found.form}): {found.error:.1%} off",
        zorder=4,
    )


def _unhealed_kl(law: Law, unhealed: Mapping[Place, float]) -> float | None:
    if law.axis != TOKENS.name:
        return None
    return unhealed.get((law.at["groups"], law.at["rank"], 0))


def _dress(axes: Axes, law: Law, unhealed: float | None) -> None:
    axis = next(axis for axis in AXES if axis.name == law.axis)
    values = [x for x, _ in law.points]
    if values[0] > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", base=2, linthresh=values[1])
    axes.set_xticks(values, [f"{x:g}" for x in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    shown = [kl for _, kls in law.points for kl in kls]
    shown += [law.forecast.predicted] if law.forecast else []
    shown += [] if unhealed is None else [unhealed]
    axes.set_ylim(min([0.0, *shown]), 1.15 * max(shown) or 1.0)
    axes.set_xlabel(axis.title.capitalize(), fontsize=10)
    axes.set_ylabel("KL to the teacher (nats per token), lower is better", fontsize=10)
    fixed = ", ".join(f"{name} {value:,}" for name, value in law.at.items())
    axes.set_title(f"KL and the {axis.title}, at {fixed}", loc="left", fontsize=10, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, which="both")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="best", handlelength=2.6)
