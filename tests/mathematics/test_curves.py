"""Curves of one variable: known laws are found again, wrong ones are told as wrong."""

import numpy as np
import pytest

from moefuse.mathematics.curves import (
    LINEAR,
    PARAMETERS,
    POWER,
    QUADRATIC,
    SATURATION,
    Array,
    Points,
    bootstrap,
    choose,
    fit,
    held_out_error,
    is_at_bound,
    widening,
)

X = np.array([1.0, 2, 4, 8, 16, 32])
FROM_ZERO = np.array([0.0, 2, 4, 8, 16, 32])
LAWS = {
    LINEAR: (X, 0.9 - 0.02 * X, (0.9, -0.02)),
    QUADRATIC: (X, 0.9 - 0.04 * X + 0.0007 * X**2, (0.9, -0.04, 0.0007)),
    POWER: (X, 0.2 + 0.6 * X**-0.5, (0.2, 0.6, 0.5)),
    SATURATION: (X, 0.3 + 0.5 * np.exp(-X / 6), (0.3, 0.5, 6.0)),
}
THREE = (LINEAR, POWER, SATURATION)


def points(x_N: Array, y_N: Array) -> Points:
    return Points.of([(float(x), [float(y)]) for x, y in zip(x_N, y_N, strict=True)])


@pytest.mark.parametrize("form", LAWS)
def test_a_known_law_is_found_again(form: str) -> None:
    x_N, y_N, parameters = LAWS[form]
    choice = choose(points(x_N, y_N), tuple(PARAMETERS))

    assert choice is not None
    assert choice.form == form
    assert choice.curve.parameters == pytest.approx(parameters, rel=1e-4)
    assert choice.errors[form] == pytest.approx(0, abs=1e-4)
    np.testing.assert_allclose(choice.curve(x_N), y_N, rtol=1e-6)


@pytest.mark.parametrize("form", [LINEAR, POWER, SATURATION])
def test_the_largest_point_is_predicted_without_it(form: str) -> None:
    x_N, y_N, _ = LAWS[form]
    choice = choose(points(x_N, y_N).without(-1), THREE)
    assert choice is not None
    assert choice.curve(x_N[-1:])[0] == pytest.approx(y_N[-1], rel=1e-4)


def test_a_power_law_that_starts_at_zero_is_of_one_more() -> None:
    y_N = 0.1 + 0.7 * (FROM_ZERO + 1) ** -0.8
    found = fit(POWER, points(FROM_ZERO, y_N))
    assert found is not None
    assert (found.shift, *found.parameters) == pytest.approx((1, 0.1, 0.7, 0.8), rel=1e-4)
    # The law stays the same where its first point is the one left out.
    assert held_out_error(POWER, points(FROM_ZERO, y_N)) == pytest.approx(0, abs=1e-4)


def test_a_wrong_law_is_told_as_wrong() -> None:
    x_N, y_N, _ = LAWS[SATURATION]
    errors = {form: held_out_error(form, points(x_N, y_N)) for form in THREE}
    assert errors[LINEAR] is not None
    assert errors[LINEAR] > 0.2
    line = fit(LINEAR, points(x_N, y_N).without(-1))
    assert line is not None
    assert abs(line(x_N[-1:])[0] / y_N[-1] - 1) > 0.3


def test_noise_does_not_make_a_line_into_something_else() -> None:
    random, chosen = np.random.default_rng(0), []
    for _ in range(40):
        y_N = (0.9 - 0.02 * X) * np.exp(0.01 * random.normal(size=len(X)))
        choice = choose(points(X, y_N), THREE)
        assert choice is not None
        chosen.append(choice.form)
    assert chosen.count(LINEAR) >= 36


@pytest.mark.parametrize("form", [LINEAR, POWER])
def test_intervals_hold_the_truth_as_often_as_they_say(form: str) -> None:
    x_N, y_N, parameters = LAWS[form]
    random = np.random.default_rng(1)
    held = {"parameter": 0, "curve": 0, "observation": 0}
    rounds = 60
    for number in range(rounds):
        noisy = points(x_N, y_N * np.exp(0.02 * random.normal(size=len(x_N))))
        curve = fit(form, noisy.without(-1))
        assert curve is not None
        found = bootstrap(curve, noisy.without(-1), x_N[-1:], rounds=100, seed=number)
        assert found is not None
        for name, (low, high), truth in (
            ("parameter", found.parameters[1], parameters[1]),
            ("curve", found.curve[0], y_N[-1]),
            ("observation", found.observation[0], noisy.y_N[-1]),
        ):
            held[name] += low <= truth <= high
    assert min(held.values()) >= 0.85 * rounds


def test_too_few_points_are_not_judged() -> None:
    assert fit(POWER, points(X[:2], X[:2])) is None
    assert choose(points(X[:2], X[:2]), THREE) is None
    only = choose(points(X[:3], 1 - 0.1 * X[:3]), THREE)
    assert only is not None
    assert only.form == LINEAR
    assert only.errors[POWER] is None


def test_without_residuals_only_seeds_tell_an_interval() -> None:
    three = points(X[:3], np.array([0.9, 0.6, 0.5]))
    curve = fit(POWER, three)
    assert curve is not None
    assert bootstrap(curve, three, X[3:4]) is None

    seeds = Points.of([(x, [y * 0.99, y, y * 1.01]) for x, y in ((1, 0.9), (2, 0.6), (4, 0.5))])
    found = bootstrap(curve, seeds, np.array([1.0]))
    assert found is not None
    low, high = found.curve[0]
    # Three seeds that spread by 1% give a mean good to 0.58%.
    assert (high - low) / 2 / 0.9 == pytest.approx(1.96 * 0.01 / 3**0.5, rel=0.3)


def test_what_is_never_negative_has_no_negative_asymptote_and_no_negative_interval() -> None:
    falling = points(X, np.array([1.0, 0.8, 0.5, 0.25, 0.05, 0.002]))
    for form in (POWER, SATURATION):
        curve = fit(form, falling)
        assert curve is not None
        assert curve.parameters[0] >= 0
        found = bootstrap(curve, falling, X, rounds=30)
        assert found is not None
        assert min(low for low, _ in (*found.curve, *found.observation)) >= 0


def test_a_limit_of_a_form_is_told() -> None:
    step = points(X, np.array([1.0, 0.2, 0.2, 0.2, 0.2, 0.2]))
    curve = fit(POWER, step)
    assert curve is not None
    assert is_at_bound(curve, step)
    x_N, y_N, _ = LAWS[POWER]
    true = fit(POWER, points(x_N, y_N))
    assert true is not None
    assert not is_at_bound(true, points(x_N, y_N))


def test_errors_count_relative_to_what_is_measured() -> None:
    """The small point is followed as closely as the large ones."""
    curve = fit(LINEAR, points(np.array([1.0, 2, 3]), np.array([1.0, 0.6, 0.01])))
    assert curve is not None
    assert curve(np.array([3.0]))[0] == pytest.approx(0.01, rel=0.02)


def test_the_same_seed_gives_the_same_intervals() -> None:
    x_N, y_N, _ = LAWS[SATURATION]
    noisy = points(x_N, y_N * (1 + 0.01 * np.cos(x_N)))
    curve = fit(SATURATION, noisy)
    assert curve is not None
    assert bootstrap(curve, noisy, x_N, rounds=20) == bootstrap(curve, noisy, x_N, rounds=20)


def test_few_points_widen_residuals_as_student_asks() -> None:
    assert widening(1000, 2) == pytest.approx(1, abs=0.01)
    assert widening(5, 3) == pytest.approx(4.303 / 1.960 * (5 / 2) ** 0.5, rel=1e-3)
