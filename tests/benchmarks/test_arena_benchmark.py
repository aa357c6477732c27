"""The comparison in the README: all methods take part, its tables are those of the reports."""

import sys
from pathlib import Path

import pytest

from moefuse.arena.cells import OURS, contestants
from moefuse.arena.report import COMPARISON
from moefuse.evaluation.report import read_report

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import arena  # noqa: E402


def test_every_method_is_compared_once_and_the_best_with_three_seeds() -> None:
    cells = {cell for wishes in arena.rounds() for cell in wishes.cells()}

    assert {cell.method for cell in cells} == set(contestants())
    for name in OURS:
        assert {cell.seed for cell in cells if cell.method == name} == {0, 1, 2}
    whole = {cell.method for cell in cells if cell.bits == 16 and cell.fraction == 1 / 32}
    assert len(whole) == 16
    assert {cell.bits for cell in cells if cell.method == "reap"} == {16, 4, 2}


def test_the_readme_says_what_the_reports_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(arena.BEGIN)
    emptied = before + arena.BEGIN + arena.END + rest.split(arena.END)[1]
    (tmp_path / "README.md").write_text(emptied, encoding="utf-8")
    monkeypatch.setattr(arena, "ROOT", tmp_path)

    arena.write_readme()

    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    for name in arena.TEACHERS:
        meta, rows = read_report(arena.RESULTS / name / COMPARISON)
        assert meta["commit"] and len({row.method for row in rows}) > 8
