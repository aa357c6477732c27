"""The report of ``moefuse scaling``: ``scaling.json``, ``scaling.md`` and a plot for every law."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.report import facts, report_json
from moefuse.evaluation.rows import TEACHER, Row, mean_of
from moefuse.evaluation.scaling import (
    AXES,
    NEAR,
    Axis,
    Extrapolation,
    FormFit,
    JointLaws,
    Law,
    Place,
    formula,
    joint_laws,
    laws_of,
    measured,
)
from moefuse.evaluation.tables import human_bytes, listing, markdown, short
from moefuse.mathematics.curves import Interval
from moefuse.mathematics.joint_law import JointLaw

SCALING = "scaling.json"


@dataclass(frozen=True)
class LeftOut:
    """A value of an axis, ``groups`` or ``ranks``, for which no student can exist, and why."""

    axis: str
    value: int
    reason: str


@dataclass(frozen=True)
class ScalingReport:
    """What a grid gave: how it was made, every row, the laws, and what is not in it."""

    meta: dict[str, Any]
    rows: list[Row]
    laws: list[Law]
    joint: JointLaws
    left_out: list[LeftOut]

    @classmethod
    def of(
        cls,
        meta: dict[str, Any],
        rows: list[Row],
        middle: Place,
        left_out: list[LeftOut],
    ) -> "ScalingReport":
        """Fit everything to ``rows``; the laws are read along the lines through ``middle``."""
        cells = measured(rows)
        return cls(meta, rows, laws_of(cells, middle), joint_laws(cells), left_out)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **report_json(self.meta, self.rows),
            "laws": [law.to_json() for law in self.laws],
            "joint": self.joint.to_json(),
            "left_out": [asdict(item) for item in self.left_out],
        }


def write_scaling(out: Path, report: ScalingReport) -> None:
    """Write ``scaling.json``, ``scaling.md`` and a plot for every law to ``out``."""
    from moefuse.evaluation.scaling_plot import law_plot  # noqa: PLC0415  slow to import

    unhealed = {place: mean(kls) for place, kls in measured(report.rows).items() if place[2] == 0}
    for law in report.laws:
        law_plot(law, unhealed, out / plot_name(law))
    write_json(out / SCALING, report.to_json())
    write_text(out / "scaling.md", scaling_markdown(report))


def plot_name(law: Law) -> str:
    """Return the name of a law's picture."""
    return f"scaling-{law.axis}.png"


def scaling_markdown(report: ScalingReport) -> str:
    """Return the whole report."""
    parts = [
        "# Scaling",
        "KL is the mean KL(teacher || student) on held-out text, nats per token; it stands for "
        "quality. Every healed student is trained by a complete schedule of its own.",
        summary(report),
        *(text for law in report.laws for text in _law(law)),
        *_joint(report.joint),
        "## The grid",
        _grid(report.rows),
        *_left_out(report.left_out),
        "## All rows",
        markdown(*listing(report.rows)) if report.rows else "",
        "## How this was made",
        facts(report.meta),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(report: ScalingReport) -> str:
    """Return one line for every law, Markdown: what is claimed, and what came out."""
    if not report.laws:
        return "Each axis has a single value: there is no law to judge."
    return "\n".join(f"- {verdict(law)}" for law in report.laws)


def verdict(law: Law) -> str:
    """Return what came out of one law, in plain words."""
    axis = axis_of(law)
    if law.forecast is None or law.claim_forecast is None or law.best is None:
        return (
            f"Claim: {law.claim}. **This could not be judged**: {len(law.points)} points along the "
            f"{axis.title} are too few."
        )
    holds = "The claim holds" if law.claim_holds else "The claim does not hold"
    best = f"the {law.best} form has the least held-out error"
    if not law.claim_is_best:
        lesser = "a hardly lesser" if law.claim_is_near else "a lesser"
        best = f"the {law.best} form has {lesser} held-out error"
    parts = [
        f"Claim: {law.claim}. **{holds}**: {best}, and the claimed form "
        f"({law.claim_forecast.form}) {_forecast_words(law.claim_forecast)}.",
    ]
    if law.forecast.form != law.claim_forecast.form:
        parts.append(f"The form chosen without that point, {_forecast_phrase(law.forecast)}.")
    plain = "the fitted law holds" if law.holds else "**the fitted law does not hold**"
    parts.append(f"At {_fixed(law)}, {plain}.")
    if law.elsewhere.lines > 1:
        parts.append(
            f"Of {law.elsewhere.lines} lines along this axis {law.elsewhere.within} are predicted "
            f"within {NEAR:.0%}, with a median error of {law.elsewhere.median_error:.1%}."
        )
    return " ".join(parts)


def axis_of(law: Law) -> Axis:
    """Return the axis of a law."""
    return next(axis for axis in AXES if axis.name == law.axis)


def _forecast_words(found: Extrapolation) -> str:
    interval = "" if found.interval is None else f" {_interval(found.interval)}"
    return (
        f"predicts {found.predicted:.3g}{interval} for the point at {found.x:g} left out, where "
        f"{found.measured:.3g} was measured: {found.error:.1%} off, "
        f"{'within' if found.within else 'not within'} {NEAR:.0%}"
    )


def _forecast_phrase(found: Extrapolation) -> str:
    return f"{found.form}, {_forecast_words(found)}"


def _interval(interval: Interval) -> str:
    return f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def _fixed(law: Law) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in law.at.items())


def _law(law: Law) -> list[str]:
    axis = axis_of(law)
    points = [[f"{x:g}", _mean(kls), str(len(kls))] for x, kls in law.points]
    return [
        f"## KL and the {axis.title}",
        f"![KL against the {axis.title}]({plot_name(law)})",
        f"Points, at {_fixed(law)}:",
        markdown([axis.title.capitalize(), "KL", "Seeds"], points),
        "Forms fitted to all of them, with 95 % intervals of their parameters a, b and c; the "
        "held-out error is the relative error of points left out, one at a time. The last columns "
        "are the prediction of the largest point from the others.",
        _forms(law),
        "\n".join(f"- {remark}" for remark in law.remarks),
        _elsewhere(law),
    ]


def _mean(kls: Sequence[float]) -> str:
    return short(mean(kls)) + (f" ± {short(stdev(kls))}" if len(kls) > 1 else "")


def _forms(law: Law) -> str:
    titles = ["Form", "KL =", "Intervals", "Held-out error", "Predicted", "Error"]
    lines = [_form_line(law, found) for found in law.fits]
    return (
        markdown(titles, lines) if lines else "No form has as few parameters as there are points."
    )


def _form_line(law: Law, found: FormFit) -> list[str]:
    name = f"**{found.form}**" if found.form == law.best else found.form
    intervals = "-" if found.intervals is None else ", ".join(map(_interval, found.intervals))
    ahead = found.extrapolation
    predicted = "-"
    if ahead is not None:
        predicted = f"{ahead.predicted:.3g}"
        predicted += "" if ahead.interval is None else f" {_interval(ahead.interval)}"
    return [
        f"{name} (claimed)" if found.form in law.claimed else name,
        f"`{formula(found.curve)}`",
        intervals,
        "-" if found.held_out_error is None else f"{found.held_out_error:.1%}",
        predicted,
        "-" if ahead is None else f"{ahead.error:.1%}",
    ]


def _elsewhere(law: Law) -> str:
    found = law.elsewhere
    if found.lines < 2:
        return ""
    best = ", ".join(f"{form} {count}" for form, count in sorted(found.best.items()))
    return f"The best form on each of the {found.lines} lines along this axis: {best}."


def _joint(joint: JointLaws) -> list[str]:
    lines = [
        [name, f"`{law.formula}`", str(len(law.residual_N)), f"{law.held_out_error:.1%}"]
        for name, law in (("unhealed", joint.unhealed), ("healed", joint.healed))
        if law is not None
    ]
    if not lines:
        return []
    titles = ["Students", "Law", "Places", "Held-out error"]
    return [
        "## All together",
        "What `moefuse plan --scaling` predicts by, chosen by leave-one-out error:",
        markdown(titles, lines),
        _constants(joint.healed or joint.unhealed),
        f"{joint.exact} places with a KL of 0 are left out of it." if joint.exact else "",
    ]


def _constants(law: JointLaw | None) -> str:
    told = [f"{name} {value:,g}" for name, value in (law.constants if law else {}).items()]
    return f"Always the same, and therefore without a term: {', '.join(told)}." if told else ""


def _grid(rows: Sequence[Row]) -> str:
    """Return a line for every (groups, rank), with a column for every number of healing tokens."""
    cells = measured(rows)
    tokens = sorted({place[2] for place in cells})
    kinds = sorted({place[:2] for place in cells})
    lines = []
    for groups, rank in kinds:
        same = [r for r in rows if (r.groups, r.rank) == (groups, rank) and r.method != TEACHER]
        size = mean_of(same, "expert_bytes")
        kls = [cells.get((groups, rank, count)) for count in tokens]
        lines.append(
            [
                str(groups),
                str(rank),
                "-" if size is None else human_bytes(size),
                *("-" if found is None else _mean(found) for found in kls),
            ]
        )
    titles = [f"{count / 1e6:g}M tokens" if count else "unhealed" for count in tokens]
    return markdown(["G", "R", "Expert bytes", *titles], lines)


def _left_out(left_out: Sequence[LeftOut]) -> list[str]:
    if not left_out:
        return []
    lines = [[item.axis, str(item.value), item.reason] for item in left_out]
    return ["## Left out", markdown(["Axis", "Value", "Why"], lines)]
