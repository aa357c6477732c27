"""``moefuse scaling``: the grid whole, in parts, after a kill; and what ``plan`` makes of it."""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import Ran, changes, run_elsewhere, run_here, write_text
from tiny import save_tiny

from moefuse.errors import UserError
from moefuse.evaluation.report import read_report
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.families import MoeShape
from moefuse.pipeline import Job
from moefuse.scaling.grid import Grid, Student, cheapest_first, read_grid
from moefuse.scaling.run import Scaling, scaling

VALUES: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 3,
    "batch_tokens": 64,
}
FLAGS = (
    *("--calibration-tokens", "512", "--sequence-length", "64", "--batch-size", "4"),
    *("--steps", "3", "--batch-tokens", "64", "--data", "text.txt"),
    *("--held-out", "held.txt", "--held-out-tokens", "192"),
)
UNHEALED = Grid((1, 2, 4), (0, 2), (0,), seeds=2)
SHAPE = MoeShape(hidden=32, intermediate=16, experts=8, top_k=2, shared_experts=1, layers=(1,))
Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 teacher with one MoE layer, and beside it two texts."""
    directory = tmp_path_factory.mktemp("scaling")
    save_tiny(directory / "teacher", num_hidden_layers=2, dtype=torch.bfloat16)
    write_text(directory / "text.txt")
    write_text(directory / "held.txt", lines=20)
    return directory / "teacher"


@pytest.fixture
def run(teacher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(teacher.parent)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: run_here(capfd, *arguments)


def measured(teacher: Path, out: Path, grid: Grid, **more: Any) -> Scaling:
    values = {**VALUES, "data": str(teacher.parent / "text.txt"), **more.pop("values", {})}
    held_out = str(teacher.parent / "held.txt")
    return scaling(teacher, out, values, grid, held_out=held_out, held_out_tokens=192, **more)


def timeless(rows: list[Row]) -> list[Row]:
    return [replace(row, seconds=None, peak_bytes=None) for row in rows]


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Scaling:
    return measured(teacher, tmp_path_factory.mktemp("whole") / "out", UNHEALED)


def test_the_grid_is_measured(whole: Scaling) -> None:
    assert whole.missing == 0
    assert whole.report is not None
    first, *rows = whole.report.rows
    assert first.method == TEACHER
    assert [(r.groups, r.rank, r.seed) for r in rows] == [
        (groups, rank, seed)
        for groups, rank in ((1, 0), (1, 2), (2, 0), (4, 0), (2, 2), (4, 2))
        for seed in (0, 1)
    ], "what a token passes decides: no token passes more than two bases"
    for row in rows:
        assert (row.method, row.stage, row.healed_tokens) == ("fused", "distilled", 0)
        assert row.kl is not None
        assert row.kl > 0
    calibrations = list((whole.out / "work").glob("calibration-*"))
    assert len(calibrations) == 1, "one serves all"
    meta, stored = read_report(whole.out / "scaling.json")
    assert stored == whole.report.rows
    assert meta["command"] == "moefuse scaling"
    assert meta["teacher"]["name"] == "teacher"
    assert meta["grid"]["groups"] == [1, 2, 4]
    assert (whole.out / "scaling-groups.png").stat().st_size > 10_000
    assert "could not be judged" in (whole.out / "scaling.md").read_text(), "3 groups are few"


def test_a_row_is_what_its_own_job_gives(teacher: Path, whole: Scaling, tmp_path: Path) -> None:
    from moefuse.comparison import DISTILLED, fused, measure_contenders, read_held_out_for

    text = str(teacher.parent / "text.txt")
    job = Job(teacher, tmp_path, {**VALUES, "data": text, "groups": 2, "rank": 2, "seed": 1})
    for stage in (job.calibrate, job.group, job.factor, job.distill):
        stage()
    held_out = read_held_out_for(job, teacher.parent / "held.txt", 192)
    row = measure_contenders(job, [fused(job, DISTILLED)], held_out)[-1]

    assert whole.report is not None
    same = [r for r in whole.report.rows if (r.groups, r.rank, r.seed) == (2, 2, 1)]
    assert timeless(same) == timeless([replace(row, healed_tokens=0)])


def test_parts_make_the_whole(teacher: Path, whole: Scaling, tmp_path: Path) -> None:
    first = measured(teacher, tmp_path / "out", UNHEALED, part="0/2")
    assert (first.missing, first.report) == (6, None)
    assert not (tmp_path / "out" / "scaling.json").exists()
    second = measured(teacher, tmp_path / "out", UNHEALED, part="1/2")

    assert second.missing == 0
    assert second.report is not None
    assert whole.report is not None
    assert timeless(second.report.rows) == timeless(whole.report.rows)


def test_a_killed_grid_goes_on(run: Run, teacher: Path, tmp_path: Path) -> None:
    grid = ("--groups", "1,2", "--ranks", "0,2", "--tokens", "0")
    command = ("scaling", "teacher", tmp_path / "out", *grid, *FLAGS)
    assert run_elsewhere(tmp_path / "log", *command) == 0
    _, whole = read_report(tmp_path / "out" / "scaling.json")
    renamed = [
        number
        for number, (kind, path) in enumerate(changes(tmp_path / "log"), start=1)
        if kind == "os.rename" and "cells" in path
    ]
    (tmp_path / "out").rename(tmp_path / "whole")

    status = run_elsewhere(tmp_path / "log", *command, die_at=renamed[1])
    assert status == -signal.SIGKILL
    (done,) = (tmp_path / "out" / "cells").glob("*.json")
    before = done.stat().st_mtime_ns
    assert run_elsewhere(tmp_path / "log", *command) == 0

    _, rows = read_report(tmp_path / "out" / "scaling.json")
    assert timeless(rows) == timeless(whole)
    assert done.stat().st_mtime_ns == before


def test_other_settings_are_not_mixed_and_other_grids_are(
    teacher: Path, whole: Scaling, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="was measured with other settings"):
        measured(teacher, whole.out, UNHEALED, values={"steps": 4})
    small = Grid((1,), (0,), (0,))
    measured(teacher, tmp_path / "out", small)
    more = measured(teacher, tmp_path / "out", replace(small, ranks=(2,)))
    assert more.report is not None
    assert [(r.groups, r.rank) for r in more.report.rows[1:]] == [(1, 2), (1, 0)]


# Healing.

HEALING: dict[str, Any] = {
    **{"sequence_length": 64, "batch_size": 4, "save_steps": 2},
    **{"expert_rate": 3e-4, "rate": 1e-5, "router_rate": 1e-5},
}
HEALED = Grid((1,), (0,), (4096, 16_384))


@pytest.fixture(scope="module")
def healed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Scaling:
    out = tmp_path_factory.mktemp("healed") / "out"
    return measured(teacher, out, HEALED, healing=HEALING)


def test_students_are_healed_by_schedules_of_their_own(healed: Scaling, teacher: Path) -> None:
    assert healed.report is not None
    first, *rows = healed.report.rows
    assert [(r.stage, r.healed_tokens) for r in rows] == [
        ("distilled", 0),
        ("healed", 4096),
        ("healed", 16_384),
    ]
    kls = [row.kl or 0.0 for row in rows]
    assert kls[0] > kls[1] > kls[2] > 0
    assert first.kl == 0, "the teacher was not healed along"
    assert len({row.expert_bytes for row in rows}) == 1
    assert healed.report.meta["healing"]["expert_rate"] == 3e-4
    assert not list((healed.out / "work").glob("healing-*")), "checkpoints go when all is done"


def test_a_student_is_what_healing_it_alone_gives(
    healed: Scaling, teacher: Path, tmp_path: Path
) -> None:
    """Whatever was healed in this process before leaves no trace."""
    alone = measured(teacher, tmp_path / "out", replace(HEALED, tokens=(16_384,)), healing=HEALING)
    assert alone.report is not None
    assert healed.report is not None
    assert timeless(alone.report.rows[-1:]) == timeless(healed.report.rows[-1:])


def test_a_grid_killed_while_it_heals_goes_on(run: Run, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "heal.yaml").write_text(yaml.safe_dump(HEALING))
    grid = ("--groups", "1", "--ranks", "0", "--tokens", "4096")
    healing = ("--healing", tmp_path / "heal.yaml")
    command = ("scaling", "teacher", tmp_path / "out", *grid, *FLAGS, *healing)
    assert run_elsewhere(tmp_path / "log", *command) == 0
    _, whole = read_report(tmp_path / "out" / "scaling.json")
    whole_checkpoints = [
        number
        for number, (kind, path) in enumerate(changes(tmp_path / "log"), start=1)
        if kind == "os.rename" and path.endswith("complete.json.partial")
    ]
    (tmp_path / "out").rename(tmp_path / "whole")

    status = run_elsewhere(tmp_path / "log", *command, die_at=whole_checkpoints[3] + 1)
    assert status == -signal.SIGKILL
    assert list((tmp_path / "out" / "work").glob("healing-*/checkpoint-*/complete.json"))
    assert run_elsewhere(tmp_path / "log", *command) == 0

    _, rows = read_report(tmp_path / "out" / "scaling.json")
    assert timeless(rows) == timeless(whole)


def test_mistakes_of_healing(run: Run, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "heal.yaml").write_text("tokens: 4M\n")
    command = ("scaling", "teacher", tmp_path / "out", *FLAGS, "--tokens", "1M")
    refused = run(*command, "--healing", tmp_path / "heal.yaml")
    assert refused.status == 2
    assert "has tokens; those to heal on are given by --tokens" in refused.err
    refused = run(*command, "--heal-data", "nowhere.txt")
    assert refused.status == 2
    assert "nowhere.txt does not exist" in refused.err
    assert not list((tmp_path / "out").glob("work/calibration-*")), "before any work"


# The grid.


def test_the_cross_has_only_the_axes_through_the_middle() -> None:
    full = Grid((1, 2, 4), (0, 2, 4), (1000, 2000))
    assert len(full.students()) == 3 * 3 * 3, "each unhealed too"
    cross = replace(full, cross=True).students()
    healed = {(s.groups, s.rank, s.tokens) for s in cross if s.tokens}
    assert healed == {
        *((groups, 4, 2000) for groups in (1, 2, 4)),
        *((4, rank, 2000) for rank in (0, 2, 4)),
        (4, 4, 1000),
    }
    unhealed = {(s.groups, s.rank) for s in cross if not s.tokens}
    assert unhealed == {(groups, rank) for groups, rank, _ in healed}
    moved = replace(full, cross=True, middle=(2, 2, 1000)).students()
    assert {s.rank for s in moved if s.groups == 1} == {2}


def test_what_cannot_exist_is_left_out_with_its_reason() -> None:
    grid, left_out = Grid((1, 8, 9), (0, 32, 33), (0,)).within(SHAPE)
    assert (grid.groups, grid.ranks) == ((1, 8), (0, 32))
    assert [(item.axis, item.value) for item in left_out] == [("groups", 9), ("ranks", 33)]
    assert "only 8 experts" in left_out[0].reason
    assert "above 32" in left_out[1].reason
    assert grid.centre == (8, 32, 0)
    with pytest.raises(UserError, match=r"No value of --groups is possible\. A layer has only 8"):
        Grid((9, 16), (0,), (0,)).within(SHAPE)


def test_the_cheapest_come_first(teacher: Path, tmp_path: Path) -> None:
    job = Job(teacher, tmp_path, {"groups": 1, "rank": 0})
    students = Grid((4, 1), (2, 0), (2000, 1000)).students()
    ordered = cheapest_first(students, job)
    assert sorted(ordered, key=str) == sorted(students, key=str)
    assert [s.tokens for s in ordered[:4]] == [0] * 4
    assert ordered[4] == Student(1, 0, 1000, 0)
    assert ordered[-1] == Student(4, 2, 2000, 0)


def test_the_command_line_is_read() -> None:
    grid = read_grid("1, 2,4", "0,8", "0.5M,2M", 3, first_seed=2, cross=True, middle="2,8,2M")
    assert grid == Grid((1, 2, 4), (0, 8), (500_000, 2_000_000), 3, 2, True, (2, 8, 2_000_000))
    assert read_grid("1", "0", "0", 1).tokens == (0,)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"groups": "1,two"}, "--groups is '1,two'; give numbers"),
        ({"groups": "0,1"}, "--groups has 0; it must be at least 1"),
        ({"ranks": "-1"}, "--ranks has -1; it must be at least 0"),
        ({"tokens": "many"}, "--tokens is 'many', which is not"),
        ({"tokens": ","}, "--tokens names nothing"),
        ({"seeds": 0}, "--seeds is 0; it must be at least 1"),
        ({"middle": "1,0"}, "--middle is '1,0'; give groups, rank and tokens"),
        ({"middle": "3,0,1M"}, "--middle has 3, which is not on its axis: 1, 2"),
    ],
)
def test_mistakes_of_the_grid(grid: dict[str, Any], message: str) -> None:
    given = {"groups": "1,2", "ranks": "0", "tokens": "1M", "seeds": 1, **grid}
    with pytest.raises(UserError, match=re.escape(message)):
        read_grid(**given)


# The command line, and the plan.


def test_a_file_has_the_names_of_the_flags(run: Run, teacher: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("tokens: 512\n")
    out = tmp_path / "out"
    refused = run("scaling", "teacher", out, "--tokens", "0", "--config", config)
    assert refused.status == 2
    assert "has the key 'tokens', which is no setting of this command" in refused.err
    assert "calibration_tokens" in refused.err
    config.write_text("calibration-tokens: 1\n")
    refused = run("scaling", "teacher", out, "--tokens", "0", "--config", config)
    assert refused.status == 2
    assert "it must be at least 2" in refused.err


def test_a_plan_tells_what_quality_a_size_buys(run: Run, whole: Scaling) -> None:
    size = ("plan", "teacher", "--groups", "2", "--rank", "1")
    plain = json.loads(run(*size, "--json").out)
    assert "quality" not in plain
    assert "KL" not in run(*size).out

    planned = json.loads(run(*size, "--scaling", whole.out, "--json").out)
    quality = planned.pop("quality")
    assert planned.keys() == plain.keys()
    assert quality["is_same_teacher"]
    (expected,) = quality["expected"]
    low, high = expected["interval"]
    assert 0 < low < expected["kl"] < high
    assert (expected["tokens"], expected["beyond"]) == (0, [])
    told = run(*size, "--scaling", whole.out / "scaling.json").out
    assert "KL to the teacher, not healed" in told
    assert "extrapolated" not in told
    far = run("plan", "teacher", "--groups", "5", "--rank", "9", "--scaling", whole.out).out
    assert "extrapolated beyond the groups, rank measured" in " ".join(far.replace("│", "").split())


def test_a_plan_for_another_teacher_says_so(run: Run, whole: Scaling, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", num_hidden_layers=3)
    told = run("plan", tmp_path / "other", "--groups", "2", "--scaling", whole.out).out
    assert "another teacher, teacher" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--heal-tokens", "1M", "--groups", "2"), "--heal-tokens needs --scaling"),
        (("--scaling", "text.txt", "--groups", "2"), "text.txt is no moefuse report"),
        (("--scaling", "OUT", "--bytes", "60KB"), "a budget alone chooses own neurons"),
        (("--scaling", "OUT", "--context", "8"), "--scaling needs a size"),
        (("--scaling", "OUT", "--groups", "2", "--heal-tokens", "1M"), "has not measured"),
    ],
)
def test_mistakes_of_a_plan(run: Run, whole: Scaling, flags: tuple[str, ...], message: str) -> None:
    given = [str(whole.out) if flag == "OUT" else flag for flag in flags]
    refused = run("plan", "teacher", *given)
    assert refused.status == 2
    assert message in refused.err
