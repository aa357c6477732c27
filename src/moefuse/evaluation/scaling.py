"""The three scaling laws: what rows say of how KL follows fused experts, rank and healing tokens.

A row is a student at (groups, rank, healing tokens); its KL to the teacher stands for quality. Each
law is read along its axis, through one point that fixes the other two axes: all forms are fitted,
the best is chosen by held-out error, and the largest point is predicted from the others, by the
form that these others alone would have chosen. A law holds when that prediction lies within 10%.
Whatever else was measured along the same axis is judged the same way and counted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

from moefuse.evaluation.rows import TEACHER, Row
from moefuse.mathematics.curves import (
    LINEAR,
    POWER,
    QUADRATIC,
    SATURATION,
    Bootstrap,
    Curve,
    Interval,
    Points,
    bootstrap,
    choose,
    fit,
    held_out_error,
    is_at_bound,
)
from moefuse.mathematics.joint_law import JointLaw, fit_joint_law

NEAR = 0.1
"""How far, relative to what is measured, a prediction may be from it."""
FEWEST = 5
"""Points of which four can choose among forms of three parameters and the largest judge them."""


@dataclass(frozen=True)
class Axis:
    """One law: the claim, the forms that would be it, and all forms that are tried.

    ``name`` is what it is called, ``unit`` what a value is divided by (tokens: a million).
    """

    name: str
    title: str
    claim: str
    claimed: tuple[str, ...]
    forms: tuple[str, ...] = (LINEAR, POWER, SATURATION)
    unit: float = 1.0


GROUPS = Axis(
    "groups",
    "fused experts in a layer",
    "quality grows linearly with the number of fused experts",
    (LINEAR,),
)
RANKS = Axis(
    "rank",
    "rank of the deltas",
    "quality grows polynomially with rank",
    (LINEAR, QUADRATIC, POWER),
    (LINEAR, QUADRATIC, POWER, SATURATION),
)
TOKENS = Axis(
    "tokens",
    "healing tokens in millions",
    "quality follows the usual data scaling law, a power of the tokens",
    (POWER,),
    unit=1e6,
)
AXES = (GROUPS, RANKS, TOKENS)

Place = tuple[int, int, int]
"""(groups, rank, healing tokens), in the order of ``AXES``."""
Measured = Mapping[Place, Sequence[float]]
"""The KL of every seed at each place."""


@dataclass(frozen=True)
class Extrapolation:
    """The largest point's KL predicted from all others by ``form``: ``error`` is relative,
    ``within`` says whether it is at most 10%; ``interval`` is None where nothing tells one."""

    form: str
    x: float
    predicted: float
    interval: Interval | None
    measured: float
    error: float
    within: bool


AS_GOOD = 1.25
"""Times the least held-out error that counts as the same: few points do not tell them apart."""


@dataclass(frozen=True)
class FormFit:
    """One form fitted to all points of an axis, with 95% intervals of its parameters, the relative
    error of points left out, and what it predicts of the largest point without it."""

    form: str
    curve: Curve
    intervals: tuple[Interval, ...] | None
    held_out_error: float | None
    is_at_bound: bool
    extrapolation: Extrapolation | None


@dataclass(frozen=True)
class Elsewhere:
    """How the law does on every line of points along the axis, the main one among them.

    ``lines`` that could be judged, ``within`` of them predicted within 10%, the ``median_error`` of
    these predictions, and how often each form was the best.
    """

    lines: int
    within: int
    median_error: float | None
    best: dict[str, int]


@dataclass(frozen=True)
class Law:
    """What was found along one axis; ``at`` are the fixed values of the other two.

    ``best`` is the form chosen by held-out error, ``forecast`` the largest point predicted by the
    form that the others chose, ``holds`` whether that lies within 10% (None: it could not be
    judged). ``claim_is_best`` says whether ``best`` is a form that is claimed, ``claim_is_near``
    whether a claimed form errs hardly more, ``claim_forecast`` is what the claimed form predicts,
    and ``claim_holds`` whether it is among the best and predicts within 10%. ``remarks`` are what a
    reader has to know besides.
    """

    axis: str
    claim: str
    claimed: tuple[str, ...]
    at: dict[str, int]
    points: tuple[tuple[float, tuple[float, ...]], ...]
    fits: tuple[FormFit, ...]
    best: str | None
    forecast: Extrapolation | None
    holds: bool | None
    claim_is_best: bool | None
    claim_is_near: bool | None
    claim_forecast: Extrapolation | None
    claim_holds: bool | None
    elsewhere: Elsewhere
    remarks: tuple[str, ...]

    def fitted(self, form: str) -> FormFit | None:
        """Return the fit of one form; None where it was not tried or had too few points."""
        return next((found for found in self.fits if found.form == form), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def measured(rows: Sequence[Row]) -> dict[Place, list[float]]:
    """Gather the KL of every seed at each place; other methods' and the teacher's rows count not.

    Of students that were not healed (0 tokens) the rows of the last stage count.
    """
    found: dict[Place, list[float]] = {}
    for row in rows:
        place = (row.groups, row.rank, row.healed_tokens)
        if row.method != TEACHER and row.kl is not None and None not in place:
            found.setdefault(place, []).append(row.kl)  # type: ignore[arg-type]
    return found


def laws_of(cells: Measured, middle: Place, *, seed: int = 0) -> list[Law]:
    """Judge all three laws along the lines through ``middle``; an axis of one value has none."""
    found = [law_of(place, cells, middle, seed=seed) for place in range(len(AXES))]
    return [law for law in found if len(law.points) > 1]


def law_of(place: int, cells: Measured, middle: Place, *, seed: int = 0) -> Law:
    """Judge the law of the axis ``AXES[place]`` along the line through ``middle``."""
    axis, values = AXES[place], line(cells, place, middle)
    points = Points.of(values)
    choice = choose(points, axis.forms) if len(points) > 1 else None
    fits = tuple(
        _form_fit(form, curve, points, seed)
        for form in axis.forms
        if len(points) > 1 and (curve := fit(form, points)) is not None
    )
    forecast = _blind_forecast(axis.forms, points, seed)
    claim_is_best = choice.form in axis.claimed if choice else None
    claim_is_near = _is_near(axis.claimed, choice.errors) if choice else None
    claim_forecast = _blind_forecast(axis.claimed, points, seed)
    return Law(
        axis=axis.name,
        claim=axis.claim,
        claimed=axis.claimed,
        at={other.name: middle[n] for n, other in enumerate(AXES) if n != place},
        points=tuple((x, tuple(kls)) for x, kls in values),
        fits=fits,
        best=choice.form if choice else None,
        forecast=forecast,
        holds=forecast.within if forecast else None,
        claim_is_best=claim_is_best,
        claim_is_near=claim_is_near,
        claim_forecast=claim_forecast,
        claim_holds=claim_forecast and bool(claim_is_near and claim_forecast.within),
        elsewhere=_elsewhere(place, cells),
        remarks=(
            *_exact(place, cells, middle),
            *(_worse_for_healing(cells, values, middle) if axis is TOKENS else ()),
            *_remarks(axis, values, fits),
        ),
    )


def _is_near(claimed: Sequence[str], errors: Mapping[str, float | None]) -> bool:
    """Say whether a claimed form's held-out error is the least, or so near that points decide."""
    known = {form: error for form, error in errors.items() if error is not None}
    least = min(known.values(), default=0.0)
    return any(known[form] <= AS_GOOD * least for form in claimed if form in known)


def line(cells: Measured, place: int, middle: Place) -> list[tuple[float, Sequence[float]]]:
    """Return (x, KL of every seed) along one axis through ``middle``, x increasing.

    An unhealed student is no point of the data scaling law: nothing was trained on 0 tokens. Nor is
    an exact one of any: it is the teacher, and no error is relative to a KL of 0.
    """
    axis = AXES[place]
    return [
        (where[place] / axis.unit, kls)
        for where, kls in sorted(cells.items())
        if all(where[n] == middle[n] for n in range(len(AXES)) if n != place)
        and not (axis is TOKENS and where[place] == 0)
        and mean(kls) > 0
    ]


def _form_fit(form: str, curve: Curve, points: Points, seed: int) -> FormFit:
    found = bootstrap(curve, points, points.x_N[-1:], seed=seed)
    without = fit(form, points.without(-1))
    return FormFit(
        form=form,
        curve=curve,
        intervals=found.parameters if found else None,
        held_out_error=held_out_error(form, points),
        is_at_bound=is_at_bound(curve, points),
        extrapolation=_extrapolation(without, points, seed) if without else None,
    )


def _blind_forecast(forms: Sequence[str], points: Points, seed: int) -> Extrapolation | None:
    """Predict the largest point by the form that all others choose; None where they cannot."""
    choice = choose(points.without(-1), forms) if len(points) >= FEWEST else None
    return _extrapolation(choice.curve, points, seed) if choice else None


def _extrapolation(curve: Curve, points: Points, seed: int) -> Extrapolation:
    x, actual = float(points.x_N[-1]), float(points.y_N[-1])
    predicted = float(curve(points.x_N[-1:])[0])
    found: Bootstrap | None = bootstrap(curve, points.without(-1), points.x_N[-1:], seed=seed)
    error = abs(predicted - actual) / actual
    interval = found.observation[0] if found else None
    return Extrapolation(curve.form, x, predicted, interval, actual, error, error <= NEAR)


def _elsewhere(place: int, cells: Measured) -> Elsewhere:
    axis, errors, best = AXES[place], [], Counter[str]()
    others = {tuple(v for n, v in enumerate(where) if n != place) for where in cells}
    for fixed in sorted(others):
        middle = list(fixed)
        middle.insert(place, 0)
        groups, rank, tokens = middle
        points = Points.of(line(cells, place, (groups, rank, tokens)))
        if len(points) < FEWEST:
            continue
        choice = choose(points, axis.forms)
        without = choose(points.without(-1), axis.forms)
        if choice is None or without is None:
            continue
        best[choice.form] += 1
        predicted, actual = float(without.curve(points.x_N[-1:])[0]), float(points.y_N[-1])
        errors.append(abs(predicted - actual) / actual)
    within = sum(error <= NEAR for error in errors)
    return Elsewhere(len(errors), within, median(errors) if errors else None, dict(best))


def _exact(place: int, cells: Measured, middle: Place) -> list[str]:
    """Say which points of a line are left out because their students equal the teacher."""
    axis, exact = AXES[place], []
    for where, kls in sorted(cells.items()):
        on_line = all(where[n] == middle[n] for n in range(len(AXES)) if n != place)
        if on_line and mean(kls) == 0:
            exact.append(f"{where[place] / axis.unit:g}")
    return [f"At {', '.join(exact)} the student equals the teacher: no point of a law."] * bool(
        exact
    )


def _worse_for_healing(
    cells: Measured, values: Sequence[tuple[float, Sequence[float]]], middle: Place
) -> list[str]:
    """Say where healing left a student further from the teacher than it found it."""
    before = cells.get((middle[0], middle[1], 0))
    if before is None:
        return []
    worse = ", ".join(f"{x:g}" for x, kls in values if mean(kls) >= mean(before))
    return [f"At {worse} million tokens healed students are no better than unhealed ones."] * bool(
        worse
    )


def _remarks(
    axis: Axis, values: Sequence[tuple[float, Sequence[float]]], fits: Sequence[FormFit]
) -> list[str]:
    """Say plainly what makes the points of an axis less than a law needs."""
    means = [(x, mean(kls)) for x, kls in values]
    told = []
    if len(means) < FEWEST:
        told.append(
            f"There are only {len(means)} points; {FEWEST} are needed, so that all but the largest "
            "can choose a form of three parameters and the largest judges it."
        )
    if any(len(kls) < 2 for _, kls in values):
        told.append("One seed: how much a point owes to chance is not known.")
    for (x, kl), (after, more) in pairwise(means):
        if more > kl:
            told.append(
                f"KL rises from {kl:.4g} to {more:.4g} where the {axis.title} go from {x:g} to "
                f"{after:g}; linear, power and saturation cannot follow a change of direction."
            )
    for found in fits:
        if found.is_at_bound:
            told.append(f"The {found.form} ended at the end of its range: it is a limit of itself.")
    return told


@dataclass(frozen=True)
class JointLaws:
    """KL of all three variables at once: of students that were not ``healed`` and of those that
    were, None where there is too little of either; ``exact`` places have a KL of 0, which has no
    logarithm, and are left out."""

    unhealed: JointLaw | None
    healed: JointLaw | None
    exact: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: the formulas and how well they predict what is left out."""
        return {
            "unhealed": _joint_json(self.unhealed),
            "healed": _joint_json(self.healed),
            "exact": self.exact,
        }


def joint_laws(cells: Measured) -> JointLaws:
    """Fit one law to all places that were not healed, and one to those that were."""
    names = [axis.name for axis in AXES]

    def law(*, healed: bool) -> JointLaw | None:
        kept = [
            (dict(zip(names, where, strict=True)), mean(kls))
            for where, kls in sorted(cells.items())
            if (where[2] > 0) == healed and mean(kls) > 0
        ]
        return fit_joint_law([p for p, _ in kept], [y for _, y in kept], names) if kept else None

    return JointLaws(
        law(healed=False), law(healed=True), sum(mean(kls) == 0 for kls in cells.values())
    )


def _joint_json(law: JointLaw | None) -> dict[str, Any] | None:
    if law is None:
        return None
    return {
        "formula": law.formula,
        "parameters": list(law.parameters),
        "terms": [asdict(term) for term in law.terms],
        "products": law.has_products,
        "constants": law.constants,
        "places": len(law.residual_N),
        "held_out_error": law.held_out_error,
    }


def formula(curve: Curve, name: str = "x") -> str:
    """Return a curve as people write it, with its numbers."""
    a, b, *rest = (float(f"{value:.4g}") for value in curve.parameters)
    inside = f"({name} + {curve.shift:g})" if curve.shift else name
    if curve.form == LINEAR:
        return f"{a:g} {b:+g} {name}"
    if curve.form == QUADRATIC:
        return f"{a:g} {b:+g} {name} {rest[0]:+g} {name}^2"
    if curve.form == POWER:
        return f"{a:g} {b:+g} {inside}^-{rest[0]:g}"
    return f"{a:g} {b:+g} exp(-{name} / {rest[0]:g})"
