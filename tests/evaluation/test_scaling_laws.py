"""The three laws, read from rows: judged, told in plain words, drawn, and foretold from."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from moefuse.artifacts import fingerprint
from moefuse.errors import UserError
from moefuse.evaluation.forecast import read_experience
from moefuse.evaluation.report import read_report, report_json
from moefuse.evaluation.rows import Row
from moefuse.evaluation.scaling import Law, joint_laws, law_of, laws_of, measured
from moefuse.evaluation.scaling_plot import draw
from moefuse.evaluation.scaling_report import (
    SCALING,
    LeftOut,
    ScalingReport,
    scaling_markdown,
    summary,
    verdict,
    write_scaling,
)

GROUPS, RANKS = (1, 2, 4, 8, 16), (0, 2, 4, 8, 16)
TOKENS = (250_000, 500_000, 1_000_000, 2_000_000, 4_000_000)
MIDDLE = (16, 16, 4_000_000)
META: dict[str, Any] = {
    "command": "moefuse scaling",
    "teacher": {"name": "small", "config": fingerprint({"layers": 2})},
}


def kl_at(groups: int, rank: int, tokens: int) -> float:
    """Linear in groups, a saturation in rank, a power law in tokens."""
    healed = 0.2 + 0.4 * (tokens / 1e6) ** -0.5 if tokens else 2.0
    return (1 - 0.03 * groups) * (0.4 + 0.6 * math.exp(-rank / 4)) * healed


def row(groups: int, rank: int, tokens: int, seed: int = 0, noise: float = 0.0) -> Row:
    kl = kl_at(groups, rank, tokens) * (1 + noise * (-1) ** (seed + groups + rank // 2))
    return Row(
        method="fused",
        stage="healed" if tokens else "distilled",
        groups=groups,
        rank=rank,
        healed_tokens=tokens,
        seed=seed,
        kl=kl,
        expert_bytes=1000 * groups + 64 * rank,
    )


def grid(seeds: int = 2, noise: float = 0.002) -> list[Row]:
    places = product(GROUPS, RANKS, (0, *TOKENS))
    rows = [row(*place, seed, noise) for place in places for seed in range(seeds)]
    return [Row(method="teacher", kl=0.0), *rows]


@pytest.fixture(scope="module")
def report() -> ScalingReport:
    left_out = [LeftOut("groups", 64, "A layer has only 16 experts.")]
    return ScalingReport.of(META, grid(), MIDDLE, left_out)


def law(report: ScalingReport, axis: str) -> Law:
    return next(found for found in report.laws if found.axis == axis)


def test_laws_that_hold_and_one_that_does_not(report: ScalingReport) -> None:
    assert [found.axis for found in report.laws] == ["groups", "rank", "tokens"]
    groups, rank, tokens = report.laws

    assert (groups.best, groups.claim_is_best, groups.claim_holds, groups.holds) == (
        "linear",
        True,
        True,
        True,
    )
    assert (tokens.best, tokens.claim_holds, tokens.holds) == ("power", True, True)
    assert (rank.best, rank.claim_is_best, rank.claim_holds) == ("saturation", False, False)
    assert rank.holds
    assert rank.forecast is not None
    assert rank.forecast.form == "saturation"
    assert rank.forecast.measured == pytest.approx(kl_at(*MIDDLE))
    assert groups.at == {"rank": 16, "tokens": 4_000_000}
    assert [x for x, _ in tokens.points] == [0.25, 0.5, 1, 2, 4], (
        "the unhealed is no point of the law"
    )
    assert groups.elsewhere.lines == len(RANKS) * (1 + len(TOKENS))
    assert groups.elsewhere.best.keys() == {"linear"}


def test_verdicts_are_plain_words(report: ScalingReport) -> None:
    told = summary(report).splitlines()
    assert len(told) == 3
    assert "**The claim holds**: the linear form has the least held-out error" in told[0]
    assert "**The claim does not hold**: the saturation form has a lesser" in told[1]
    assert "At groups 16, tokens 4,000,000, the fitted law holds." in told[1]
    assert "within 10%" in told[2]


def test_a_law_that_breaks_is_said_not_to_hold() -> None:
    """Up to 8 groups a straight line, then a cliff that no form foresees."""
    rows = [replace(r, kl=(r.kl or 0) * (0.5 if r.groups == 16 else 1)) for r in grid()]
    groups = law_of(0, measured(rows), MIDDLE)
    assert groups.forecast is not None
    assert groups.forecast.error > 0.5
    assert groups.holds is False
    assert groups.claim_holds is False
    assert "**the fitted law does not hold**" in verdict(groups)
    assert "not within 10%" in verdict(groups)


def test_what_makes_a_law_doubtful_is_told() -> None:
    few = [row(groups, 4, 0) for groups in (1, 2, 4)]
    (found,) = laws_of(measured(few), (4, 4, 0))
    assert any("only 3 points" in remark for remark in found.remarks)
    assert any(remark.startswith("One seed") for remark in found.remarks)
    assert (found.holds, found.claim_holds) == (None, None)
    assert "**This could not be judged**: 3 points" in verdict(found)

    bent = [replace(r, kl=0.9) if r.groups == 4 else r for r in grid() if r.healed_tokens == 0]
    groups = law_of(0, measured(bent), (16, 16, 0))
    assert any("KL rises from" in remark and "2 to 4" in remark for remark in groups.remarks)


def test_healing_that_does_harm_is_told(report: ScalingReport) -> None:
    assert not any("no better" in remark for remark in law(report, "tokens").remarks)
    rows = [replace(r, kl=9.0) if r.healed_tokens == TOKENS[0] else r for r in grid()]
    found = law_of(2, measured(rows), MIDDLE)
    assert "At 0.25 million tokens healed students are no better than unhealed ones." in (
        found.remarks
    )


def test_exact_students_are_no_points_of_a_law() -> None:
    rows = [replace(r, kl=0.0) if r.groups == 16 else r for r in grid()]
    groups = law_of(0, measured(rows), MIDDLE)
    assert [x for x, _ in groups.points] == [1, 2, 4, 8]
    assert "At 16 the student equals the teacher: no point of a law." in groups.remarks
    joint = joint_laws(measured(rows))
    assert joint.exact == len(RANKS) * (1 + len(TOKENS))
    assert joint.healed is not None


def test_an_axis_of_one_value_has_no_law() -> None:
    rows = [r for r in grid() if r.rank == 4]
    assert [found.axis for found in laws_of(measured(rows), (16, 4, 4_000_000))] == [
        "groups",
        "tokens",
    ]
    assert "no law to judge" in summary(ScalingReport.of(META, rows[:3], (1, 4, 0), []))


def test_the_report_is_the_one_kind_of_result(report: ScalingReport, tmp_path: Path) -> None:
    write_scaling(tmp_path, report)

    meta, rows = read_report(tmp_path / SCALING)
    assert (meta, rows) == (report.meta, report.rows)
    stored = json.loads((tmp_path / SCALING).read_text())
    assert stored["laws"][1]["best"] == "saturation"
    assert stored["laws"][0]["fits"][0]["curve"]["form"] == "linear"
    assert stored["left_out"] == [vars(report.left_out[0])]
    told = (tmp_path / "scaling.md").read_text()
    assert told == scaling_markdown(report)
    for text in ("A layer has only 16 experts.", "**linear** (claimed)", "log KL =", "unhealed"):
        assert text in told
    for name in ("groups", "rank", "tokens"):
        with Image.open(tmp_path / f"scaling-{name}.png") as image:
            assert image.size == (1080, 675)
        assert f"(scaling-{name}.png)" in told


def test_plots_show_points_forms_and_the_prediction(report: ScalingReport) -> None:
    axes = Figure().add_subplot()
    draw(axes, law(report, "tokens"), {(16, 16, 0): kl_at(16, 16, 0)})

    _, names = axes.get_legend_handles_labels()
    assert {"linear", "power, best", "saturation", "unhealed"} < set(names)
    assert any(name.startswith("predicted without it (power)") for name in names)
    assert axes.get_xscale() == "log"
    other = Figure().add_subplot()
    draw(other, law(report, "rank"), {})
    assert other.get_xscale() == "symlog", "rank 0 has its place"
    assert "quadratic" in other.get_legend_handles_labels()[1]


def test_a_grid_foretells_students_it_has_not_measured(
    report: ScalingReport, tmp_path: Path
) -> None:
    (tmp_path / SCALING).write_text(json.dumps(report.to_json()))
    experience = read_experience(tmp_path)

    told = experience.forecast({"layers": 2}, 6, 3, None)
    assert told.is_same_teacher
    unhealed, healed = told.expected
    assert (unhealed.tokens, healed.tokens) == (0, 4_000_000)
    for found in told.expected:
        assert found.kl == pytest.approx(kl_at(6, 3, found.tokens), rel=0.1)
        low, high = found.interval
        assert low < found.kl < high
        assert not found.beyond
    far = experience.forecast({"layers": 3}, 32, 3, 16_000_000)
    assert not far.is_same_teacher
    assert far.expected[1].beyond == ("groups", "tokens")


def test_what_cannot_foretell_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "report.json"
    other.write_text(json.dumps(report_json({"command": "moefuse eval"}, [])))
    with pytest.raises(UserError, match="is no report of 'moefuse scaling'"):
        read_experience(other)
    with pytest.raises(UserError, match="does not exist"):
        read_experience(tmp_path / "none")
    few = tmp_path / SCALING
    few.write_text(json.dumps(report_json(META, [row(1, 0, 0)])))
    with pytest.raises(UserError, match="too few students"):
        read_experience(tmp_path)
    few.write_text(json.dumps(report_json(META, [r for r in grid() if not r.healed_tokens])))
    with pytest.raises(UserError, match="--heal-tokens asks for what this grid has not measured"):
        read_experience(tmp_path).forecast({}, 4, 4, 1_000_000)
