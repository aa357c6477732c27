"""One law of several variables: how y depends on all of them at once.

    log y = θ_0 + sum over variables i of θ_i u_i(x_i)  [+ sum over i < j of θ_ij u_i(x_i) u_j(x_j)]

Each u_i is one of log(x + s) (s = 1 where the variable reaches 0), sqrt(x / m), x / m and
exp(-4 x / m), m the largest x measured; every choice of them is tried with and without the
products, and the one of least leave-one-out error of log y is kept, of even ones the simplest. It
is a linear regression, so leaving each point out is exact and free: the error of a left-out point
is its residual divided by (1 - its leverage). A variable that never changes has no term.

N points, V variables, P parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from moefuse.mathematics.curves import Array, Interval, percentiles, still_even, widening

SCALES = ("log", "root", "plain", "saturation")
DECAY = 4.0
"""How often the saturation falls by a factor e within what was measured."""
ROUNDS = 2000
LEVERAGE = 0.999
"""A point of more leverage alone decides a parameter: nothing is left to judge it by."""


@dataclass(frozen=True)
class Term:
    """How one variable enters: its name, ``scale``, and the ``low`` and ``high`` end measured."""

    variable: str
    scale: str
    low: float
    high: float

    def of(self, x_N: Array) -> Array:
        """Return u(x)."""
        if self.scale == "log":
            return np.log(x_N + (self.low == 0))
        if self.scale == "saturation":
            return np.exp(-DECAY * x_N / self.high)
        return np.sqrt(x_N / self.high) if self.scale == "root" else x_N / self.high

    @property
    def words(self) -> str:
        """Return u as people write it."""
        name, high = self.variable, self.high
        if self.scale == "log":
            return f"log({name} + 1)" if self.low == 0 else f"log({name})"
        if self.scale == "saturation":
            return f"exp(-{name} / {high / DECAY:g})"
        return f"sqrt({name} / {high:g})" if self.scale == "root" else f"{name} / {high:g}"


@dataclass(frozen=True)
class Prediction:
    """y, its 95% interval, and what it is ``beyond``: variables outside what was measured."""

    value: float
    interval: Interval
    beyond: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class JointLaw:
    """A fitted law, and what it was fitted to: ``basis_NP`` and ``residual_N`` of log y.

    ``constants`` are the variables that never changed, with their values; ``held_out_error`` is the
    root mean square of log y's leave-one-out errors, thus about a relative one.
    """

    terms: tuple[Term, ...]
    has_products: bool
    parameters: tuple[float, ...]
    constants: dict[str, float]
    held_out_error: float
    residual_N: Array
    basis_NP: Array

    @property
    def formula(self) -> str:
        """The law as people write it, with its numbers."""
        words = [term.words for term in self.terms]
        if self.has_products:
            words += [" ".join(pair) for pair in combinations(words, 2)]
        first, *others = self.parameters
        told = [f"{value:+.4g} {word}" for value, word in zip(others, words, strict=True)]
        return " ".join([f"log KL = {first:.4g}", *told])

    def predict(self, at: Mapping[str, float], *, seed: int = 0) -> Prediction:
        """Return y for a point with a value of every variable.

        The interval is that of a new measurement: the residuals, widened as in ``curves``, are
        drawn with replacement, the regression is solved again, and one more residual is added.
        """
        x_1V = np.array([[float(at[term.variable]) for term in self.terms]])
        basis_P = _basis(self.terms, x_1V, self.has_products)[0]
        value = float(basis_P @ np.array(self.parameters))
        beyond = [t.variable for t in self.terms if not t.low <= at[t.variable] <= t.high]
        beyond += [name for name, known in self.constants.items() if at[name] != known]
        return Prediction(math.exp(value), self._interval(value, basis_P, seed), tuple(beyond))

    def _interval(self, value: float, basis_P: Array, seed: int) -> Interval:
        count, parameters = self.basis_NP.shape
        random = np.random.default_rng(seed)
        residual_N = self.residual_N * widening(count, parameters)
        follows_N = self.basis_NP @ np.linalg.solve(self.basis_NP.T @ self.basis_NP, basis_P)
        shift_B = random.choice(residual_N, (ROUNDS, count)) @ follows_N
        logarithm_B = value + shift_B + random.choice(residual_N, ROUNDS)
        ((low, high),) = percentiles(np.exp(logarithm_B)[:, None])
        return low, high


def fit_joint_law(
    points: Sequence[Mapping[str, float]], y: Sequence[float], variables: Sequence[str]
) -> JointLaw | None:
    """Fit and choose a law of ``y`` > 0; None where there are too few points for any."""
    x_NV = np.array([[point[name] for name in variables] for point in points], dtype=np.float64)
    log_N = np.log(np.array(y, dtype=np.float64))
    moving = [place for place in range(len(variables)) if np.ptp(x_NV[:, place]) > 0]
    constants = {
        name: float(x_NV[0, place]) for place, name in enumerate(variables) if place not in moving
    }
    ends = [(float(x_NV[:, place].min()), float(x_NV[:, place].max())) for place in moving]
    laws = [
        _regress(
            tuple(
                Term(variables[place], scale, *end)
                for place, scale, end in zip(moving, scales, ends, strict=True)
            ),
            x_NV[:, moving],
            log_N,
            constants,
            has_products=has_products,
        )
        for has_products in (False, True)[: 1 + (len(moving) > 1)]
        for scales in product(SCALES, repeat=len(moving))
    ]
    known = [law for law in laws if law is not None]
    if not known or not moving:
        return None
    most = still_even(min(law.held_out_error for law in known))
    even = [law for law in known if law.held_out_error <= most]
    return min(even, key=lambda law: (len(law.parameters), law.held_out_error))


def _regress(
    terms: tuple[Term, ...],
    x_NV: Array,
    log_N: Array,
    constants: dict[str, float],
    *,
    has_products: bool,
) -> JointLaw | None:
    basis_NP = _basis(terms, x_NV, has_products)
    count, parameters = basis_NP.shape
    if count <= parameters or np.linalg.matrix_rank(basis_NP) < parameters:
        return None
    inverse_PP = np.linalg.inv(basis_NP.T @ basis_NP)
    solved_P, *_ = np.linalg.lstsq(basis_NP, log_N, rcond=None)
    residual_N = log_N - basis_NP @ solved_P
    leverage_N = np.einsum("np,pq,nq->n", basis_NP, inverse_PP, basis_NP)
    if leverage_N.max() > LEVERAGE:
        return None
    left_out = float(np.sqrt(np.mean((residual_N / (1 - leverage_N)) ** 2)))
    return JointLaw(
        terms,
        has_products,
        tuple(map(float, solved_P)),
        constants,
        left_out,
        residual_N,
        basis_NP,
    )


def _basis(terms: Sequence[Term], x_NV: Array, has_products: bool) -> Array:
    columns = [term.of(x_NV[:, place]) for place, term in enumerate(terms)]
    if has_products:
        columns += [left * right for left, right in combinations(columns, 2)]
    return np.column_stack([np.ones(len(x_NV)), *columns])
