"""Curves of one variable: fitted, chosen among by held-out error, bootstrapped, extrapolated.

The forms, with x >= 0 the variable and y > 0 what is measured:

    linear       y = a + b x
    quadratic    y = a + b x + c x^2
    power        y = a + b (x + s)^-c,    a >= 0,  s = 1 where a point lies at x = 0, else 0
    saturation   y = a + b exp(-x / c),   a >= 0

Errors count relative to y, so that small values are followed as well as large ones. The power law
and the saturation are separable: for a given c the best a and b follow in closed form, so that
scipy's bounded scalar minimiser has only c to find, from the best of a grid on. No start can then
end in a poor local minimum of three variables.

N points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import t as student_t

LINEAR, QUADRATIC, POWER, SATURATION = "linear", "quadratic", "power", "saturation"
PARAMETERS = {LINEAR: 2, QUADRATIC: 3, POWER: 3, SATURATION: 3}
"""The forms, and how many parameters each has."""
EXPONENTS = (0.01, 6.0)
"""Exponents of the power law; below, it is a logarithm, above, a step."""
SCALES = (0.1, 30.0)
"""Scales of the saturation: from a tenth of the smallest step of x to 30 times its largest; beyond,
it is a straight line."""
GRID = 40
EVEN = 1.1
"""Held-out errors within so many times the least are even; the form of fewer parameters wins."""
ROUNDING = 1e-6
LEVEL = 0.95
ROUNDS = 300
FLAT = 1e-24
"""Variance of a decay over points, relative to its power, that is nothing but rounding."""

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """What is fitted to: ``x_N`` increasing, ``y_N`` > 0 the means over seeds.

    ``scale_N`` is what errors are divided by, ``shift`` the power law's s, ``spread_N`` the
    standard errors of the means (None with a single seed anywhere).
    """

    x_N: Array
    y_N: Array
    scale_N: Array
    shift: float = 0.0
    spread_N: Array | None = None

    @classmethod
    def of(cls, values: Sequence[tuple[float, Sequence[float]]]) -> "Points":
        """Gather points of ``(x, [y of every seed])``, sorted by x; errors count relative to y."""
        ordered = sorted(values, key=lambda value: value[0])
        x_N = np.array([x for x, _ in ordered], dtype=np.float64)
        y_N = np.array([np.mean(ys) for _, ys in ordered], dtype=np.float64)
        assert (y_N > 0).all()
        shift = 1.0 if ordered and ordered[0][0] == 0 else 0.0
        if any(len(ys) < 2 for _, ys in ordered):
            return cls(x_N, y_N, y_N, shift)
        errors = [float(np.std(ys, ddof=1)) / math.sqrt(len(ys)) for _, ys in ordered]
        return cls(x_N, y_N, y_N, shift, np.array(errors))

    def __len__(self) -> int:
        return len(self.x_N)

    def without(self, place: int) -> "Points":
        """Return all points but one."""
        kept = np.arange(len(self)) != place % len(self)
        spread_N = None if self.spread_N is None else self.spread_N[kept]
        scale_N = self.scale_N[kept]
        return Points(self.x_N[kept], self.y_N[kept], scale_N, self.shift, spread_N)


@dataclass(frozen=True)
class Curve:
    """A form with its parameters (a, b) or (a, b, c) and the shift s of the power law."""

    form: str
    parameters: tuple[float, ...]
    shift: float = 0.0

    def __call__(self, x_N: Array) -> Array:
        """Return y at every x."""
        a, b, *rest = self.parameters
        if self.form == LINEAR:
            return a + b * x_N
        if self.form == QUADRATIC:
            return a + b * x_N + rest[0] * x_N**2
        return a + b * _decay(self.form, x_N + self.shift, rest[0])


@dataclass(frozen=True)
class Choice:
    """The form chosen, its curve, and every form's held-out error (see ``held_out_error``)."""

    curve: Curve
    errors: dict[str, float | None]

    @property
    def form(self) -> str:
        """The form chosen."""
        return self.curve.form


def fit(form: str, points: Points) -> Curve | None:
    """Fit one form; None where there are fewer points than parameters."""
    if len(points) < PARAMETERS[form]:
        return None
    weight_N = points.scale_N**-2
    if form in (LINEAR, QUADRATIC):
        return Curve(form, _polynomial(points, weight_N, PARAMETERS[form]))
    shift = points.shift if form == POWER else 0.0
    x_N = points.x_N + shift

    def errors(logarithm_C: Array) -> Array:
        decay_CN = _decay(form, x_N, np.exp(logarithm_C)[:, None])
        a_C1, b_C1 = _lines(decay_CN, points.y_N, weight_N)
        return np.sum(weight_N * (a_C1 + b_C1 * decay_CN - points.y_N) ** 2, axis=1)

    c = math.exp(_least(errors, *_range(form, points.x_N)))
    a_11, b_11 = _lines(_decay(form, x_N, c)[None], points.y_N, weight_N)
    return Curve(form, (float(a_11[0, 0]), float(b_11[0, 0]), c), shift)


def is_at_bound(curve: Curve, points: Points) -> bool:
    """Say whether c ended at an end of its range: a limit of the form then fits best."""
    if curve.form in (LINEAR, QUADRATIC):
        return False
    low, high = _range(curve.form, points.x_N)
    place = (math.log(curve.parameters[2]) - low) / (high - low)
    return not 0.01 < place < 0.99


def held_out_error(form: str, points: Points) -> float | None:
    """Return the root mean square of the relative errors of points predicted from all others.

    None where too few others would be left for the form.
    """
    misses = []
    for place in range(len(points)):
        curve = fit(form, points.without(place))
        if curve is None:
            return None
        predicted = curve(points.x_N[place : place + 1])[0]
        misses.append((predicted - points.y_N[place]) / points.scale_N[place])
    return float(np.sqrt(np.mean(np.square(misses)))) if misses else None


def choose(points: Points, forms: Sequence[str]) -> Choice | None:
    """Choose the form of the least held-out error, of even ones (``EVEN``) the simplest.

    None where there are too few points for any.
    """
    errors = {form: held_out_error(form, points) for form in forms}
    known = {form: error for form, error in errors.items() if error is not None}
    if not known:
        return None
    most = still_even(min(known.values()))
    even = [form for form, error in known.items() if error <= most]
    best = min(even, key=lambda form: (PARAMETERS[form], known[form]))
    curve = fit(best, points)
    assert curve is not None
    return Choice(curve, errors)


def still_even(least: float) -> float:
    """Return up to which held-out error a form is as good as the one with the ``least``."""
    # An exact law leaves errors of rounding alone, between which there is nothing to choose.
    return max(EVEN * least, ROUNDING)


@dataclass(frozen=True)
class Bootstrap:
    """What resampling gave: 95% intervals of the ``parameters``, of the ``curve`` at every x that
    was asked for, and of a new ``observation`` there, which has the noise of a point on top."""

    parameters: tuple[Interval, ...]
    curve: tuple[Interval, ...]
    observation: tuple[Interval, ...]


def bootstrap(
    curve: Curve, points: Points, x_M: Array, *, rounds: int = ROUNDS, seed: int = 0
) -> Bootstrap | None:
    """Resample what points deviate from ``curve`` by, fit its form again each time, and return
    percentile intervals at ``x_M``.

    With more points than parameters the relative residuals of the points are drawn with
    replacement: they hold both noise and what the form cannot follow. Fits follow their points, so
    the residuals are too small and, being few, too certain: they are widened by
    sqrt(N / (N - p)) times the ratio of Student's quantile at N - p degrees of freedom to the
    normal one. With as many parameters as points there are no residuals, and the spread of seeds,
    normal, stands in for them; without several seeds there is no interval: None. What is never
    negative has no interval below 0.
    """
    draw = _residual_drawer(curve, points, np.random.default_rng(seed))
    if draw is None:
        return None
    fitted_N, values_M = curve(points.x_N), np.abs(curve(x_M))
    parameters, curves, observations = [], [], []
    for _ in range(rounds):
        drawn_N = fitted_N + points.scale_N * draw(len(points))
        again = fit(curve.form, Points(points.x_N, drawn_N, points.scale_N, points.shift))
        assert again is not None
        parameters.append(again.parameters)
        curves.append(np.maximum(again(x_M), 0.0))
        observations.append(np.maximum(again(x_M) + values_M * draw(len(x_M)), 0.0))
    return Bootstrap(*(percentiles(np.array(part)) for part in (parameters, curves, observations)))


def percentiles(samples_BN: Array) -> tuple[Interval, ...]:
    """Return the interval that holds ``LEVEL`` of each column, its ends equally unlikely."""
    tail = 50 * (1 - LEVEL)
    low_N, high_N = np.percentile(samples_BN, [tail, 100 - tail], axis=0)
    return tuple((float(low), float(high)) for low, high in zip(low_N, high_N, strict=True))


def widening(points: int, parameters: int) -> float:
    """Return by what residuals of so many points and parameters are multiplied; points are more."""
    freedom = points - parameters
    quantile = 0.5 + LEVEL / 2
    student = student_t.ppf(quantile, freedom) / student_t.ppf(quantile, np.inf)
    return float(student * math.sqrt(points / freedom))


def _residual_drawer(
    curve: Curve, points: Points, random: np.random.Generator
) -> Callable[[int], Array] | None:
    scale_N, count = points.scale_N, PARAMETERS[curve.form]
    if len(points) > count:
        residual_N = (points.y_N - curve(points.x_N)) / scale_N * widening(len(points), count)
        return lambda number: random.choice(residual_N, number)
    if points.spread_N is None:
        return None
    deviation = float(np.sqrt(np.mean((points.spread_N / scale_N) ** 2)))
    return lambda number: random.normal(0.0, deviation, number)


def _decay(form: str, x_N: Array, c: Array | float) -> Array:
    return x_N**-c if form == POWER else np.exp(-x_N / c)


def _range(form: str, x_N: Array) -> tuple[float, float]:
    """Return the logarithms of the least and the largest c."""
    if form == POWER:
        return math.log(EXPONENTS[0]), math.log(EXPONENTS[1])
    low, high = SCALES
    return math.log(low * float(np.diff(x_N).min())), math.log(high * float(x_N[-1]))


def _least(errors: Callable[[Array], Array], low: float, high: float) -> float:
    """Return where ``errors`` is least: the best of a grid, refined between its neighbours."""
    grid_C = np.linspace(low, high, GRID)
    best = int(np.argmin(errors(grid_C)))
    bounds = (grid_C[max(best - 1, 0)], grid_C[min(best + 1, GRID - 1)])

    def error(place: float) -> float:
        return float(errors(np.array([place]))[0])

    found = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return min((float(found.x), float(grid_C[best])), key=error)


def _lines(decay_CN: Array, y_N: Array, weight_N: Array) -> tuple[Array, Array]:
    """Return a >= 0 and b, (C, 1) each, of the least weighted squared error of a + b decay."""
    share_N = weight_N / weight_N.sum()
    centre_C1 = (decay_CN @ share_N)[:, None]
    power_C1 = (decay_CN**2 @ share_N)[:, None]
    mean = float(share_N @ y_N)
    variance_C1 = ((decay_CN - centre_C1) ** 2 @ share_N)[:, None]
    # A decay that is the same everywhere, to the last bits, says nothing besides a constant.
    is_flat_C1 = variance_C1 <= FLAT * power_C1
    shared_C1 = ((decay_CN - centre_C1) @ (share_N * (y_N - mean)))[:, None]
    b_C1 = np.where(is_flat_C1, 0.0, shared_C1 / np.where(is_flat_C1, 1.0, variance_C1))
    a_C1 = mean - b_C1 * centre_C1
    alone_C1 = (decay_CN @ (share_N * y_N))[:, None] / np.where(power_C1 > 0, power_C1, 1.0)
    return np.maximum(a_C1, 0.0), np.where(a_C1 >= 0, b_C1, alone_C1)


def _polynomial(points: Points, weight_N: Array, count: int) -> tuple[float, ...]:
    largest = float(points.x_N[-1]) or 1.0
    basis_NP = (points.x_N[:, None] / largest) ** np.arange(count)
    root_N = np.sqrt(weight_N)
    solved_P, *_ = np.linalg.lstsq(basis_NP * root_N[:, None], points.y_N * root_N, rcond=None)
    return tuple(float(value) for value in solved_P / largest ** np.arange(count))
