"""One law of three variables."""

import math
from itertools import product

import numpy as np
import pytest

from moefuse.mathematics.joint_law import fit_joint_law

NAMES = ("groups", "rank", "tokens")
GRID = [
    dict(zip(NAMES, place, strict=True))
    for place in product((1.0, 2, 4, 8, 16), (0.0, 2, 4, 8, 16), (0.5e6, 1e6, 2e6, 4e6))
]


def law(groups: float, rank: float, tokens: float) -> float:
    return math.exp(1.5 - 0.03 * groups + 0.5 * math.exp(-rank / 4) - 0.15 * math.log(tokens))


def test_a_known_law_is_found_again() -> None:
    found = fit_joint_law(GRID, [law(**point) for point in GRID], NAMES)

    assert found is not None
    assert [term.scale for term in found.terms] == ["plain", "saturation", "log"]
    assert found.held_out_error == pytest.approx(0, abs=1e-9)
    assert found.formula == ("log KL = 1.5 -0.48 groups / 16 +0.5 exp(-rank / 4) -0.15 log(tokens)")
    at = {"groups": 3.0, "rank": 5.0, "tokens": 3e6}
    told = found.predict(at)
    assert told.value == pytest.approx(law(**at))
    assert told.beyond == ()
    far = found.predict({"groups": 32.0, "rank": 5.0, "tokens": 8e6})
    assert far.beyond == ("groups", "tokens")


def test_intervals_hold_a_new_measurement_as_often_as_they_say() -> None:
    random, held, rounds = np.random.default_rng(0), 0, 60
    at = {"groups": 8.0, "rank": 4.0, "tokens": 4e6}
    for number in range(rounds):
        noisy = [law(**point) * math.exp(0.05 * random.normal()) for point in GRID[::3]]
        found = fit_joint_law(GRID[::3], noisy, NAMES)
        assert found is not None
        low, high = found.predict(at, seed=number).interval
        held += low <= law(**at) * math.exp(0.05 * random.normal()) <= high
    assert held >= 0.85 * rounds


def test_products_are_taken_where_variables_need_each_other() -> None:
    values = [math.exp(-0.1 * math.log(p["groups"]) * math.log(p["rank"] + 1)) for p in GRID]
    found = fit_joint_law(GRID, values, NAMES)
    assert found is not None
    assert found.has_products
    assert found.held_out_error == pytest.approx(0, abs=1e-9)
    assert "log(groups) log(rank + 1)" in found.formula


def test_a_variable_that_never_changes_has_no_term() -> None:
    same = [point for point in GRID if point["tokens"] == 1e6]
    found = fit_joint_law(same, [law(**point) for point in same], NAMES)
    assert found is not None
    assert [term.variable for term in found.terms] == ["groups", "rank"]
    assert found.constants == {"tokens": 1e6}
    assert found.predict({"groups": 2.0, "rank": 2.0, "tokens": 2e6}).beyond == ("tokens",)


def test_axes_alone_give_a_law_without_products() -> None:
    middle = {"groups": 16.0, "rank": 16.0, "tokens": 4e6}
    cross = [p for p in GRID if sum(p[n] != middle[n] for n in NAMES) <= 1]
    found = fit_joint_law(cross, [law(**point) for point in cross], NAMES)
    assert found is not None
    assert not found.has_products
    assert found.predict({"groups": 2.0, "rank": 2.0, "tokens": 1e6}).value == pytest.approx(
        law(2, 2, 1e6)
    )


def test_too_few_points_have_no_law() -> None:
    assert fit_joint_law(GRID[:1], [0.5], NAMES) is None
    few = [GRID[0], GRID[-1]]
    assert fit_joint_law(few, [0.5, 0.4], NAMES) is None
