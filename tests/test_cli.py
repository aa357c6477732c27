"""The command line: one job however it is told, and standard output for results alone."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import CALIBRATION, SIZE, SMALL, Ran, contents, run_here, write_text

from moefuse import cli
from moefuse.config import fields_of

Tiny = Callable[..., Path]
Run = Callable[..., Ran]


@pytest.fixture
def run(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """``run(*arguments)`` runs a command where ``teacher-deepseek_v2`` and ``text.txt`` lie."""
    tiny_checkpoint()
    write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(capfd, *arguments)


TEACHER = "teacher-deepseek_v2"
FLAGS = (*SIZE, *SMALL, "--data", "text.txt")


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"JSON has no {name}")

    return json.loads(text, parse_constant=refuse)


def test_json_is_all_there_is_on_standard_output(run: Run, tmp_path: Path) -> None:
    ran = run("fuse", TEACHER, "student", *FLAGS, "--json")

    assert ran.status == 0, ran.err
    result = strict(ran.out)
    assert result["out"] == "student"
    assert result["plan"]["layers"].keys() == {"1", "2"}
    assert result["plan"]["layers"]["1"]["groups"] == 3
    assert result["plan"]["layers"]["2"]["rank"] == 2
    stored = sum(path.stat().st_size for path in (tmp_path / "student").glob("*.safetensors"))
    assert 0 <= stored - result["plan"]["bytes"] < 20_000
    assert result["errors"].keys() == {"1", "2"}
    for error in result["errors"].values():
        assert 0 < error["after"] <= error["before"] < 2
    assert result["seconds"] > 0
    assert result["peak_bytes"] > 10_000_000
    assert "Calibrate layer 2: 2/2" in ran.err


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", TEACHER),
        ("plan", TEACHER, "--groups", "3"),
        ("plan", TEACHER, "--params", "45K"),
        ("plan", TEACHER, "--bytes", "200KB", "--groups", "2"),
    ],
)
def test_json_of_what_only_looks(run: Run, command: tuple[str, ...], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    ran = run(*command, "--json")

    assert (ran.status, ran.err) == (0, "")
    assert isinstance(strict(ran.out), dict)
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_keeps_the_budget(run: Run) -> None:
    for flags, measure, limit in (
        (("--params", "45K"), "parameters", 45_000),
        (("--bytes", "200KB"), "bytes", 200_000),
    ):
        planned = strict(run("plan", TEACHER, *flags, "--form", "low-rank", "--json").out)
        assert planned[measure] <= limit
        layer = planned["layers"]["1"]
        more = ("--groups", str(layer["groups"]), "--rank", str(layer["rank"] + 1))
        assert strict(run("plan", TEACHER, *more, "--json").out)[measure] > limit


def test_tables_for_people(run: Run) -> None:
    planned = run("plan", TEACHER, *SIZE)
    fused = run("fuse", TEACHER, "student", *FLAGS)

    assert "3 fused experts, deltas of rank 2" in planned.out
    assert "peak memory, estimated" in planned.out
    assert "Fused: student" in fused.out
    assert re.search(r"relative error, layer 2 .* one-shot, .* distilled", fused.out)
    assert run("inspect", TEACHER).out.count("routed experts") == 1


def test_a_file_and_flags_tell_the_same_job(run: Run, tmp_path: Path) -> None:
    settings = {
        "groups": 3,
        "rank": 2,
        "tokens": 512,
        "sequence-length": 64,
        "batch_size": 4,
        "steps": 5,
        "batch-tokens": 64,
        "data": "text.txt",
        "damping": 1,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))

    assert run("fuse", TEACHER, "flags/student", *FLAGS, "--damping", "1").status == 0
    assert run("fuse", TEACHER, "file/student", "--config", "job.yaml").status == 0

    assert contents(tmp_path / "file") == contents(tmp_path / "flags")


def test_flags_win_over_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("groups: 2\nrank: 3\n")

    planned = run("plan", TEACHER, "--config", "job.yaml", "--groups", "4", "--json")

    layer = strict(planned.out)["layers"]["1"]
    assert (layer["groups"], layer["rank"]) == (4, 3)


def test_stages_one_by_one_write_what_fuse_writes(run: Run, tmp_path: Path) -> None:
    assert run("fuse", TEACHER, "whole/student", *FLAGS).status == 0

    data = ("--data", "text.txt")
    for stage, flags in (
        ("calibrate", CALIBRATION),
        ("group", (*CALIBRATION, *SIZE)),
        ("factor", (*CALIBRATION, *SIZE)),
        ("distill", (*SMALL, *SIZE)),
    ):
        ran = run(stage, TEACHER, "work", *flags, *data)
        assert (ran.status, ran.out) == (0, ""), ran.err
    ran = run("assemble", TEACHER, "work", "single/student", *SMALL, *SIZE, *data)

    assert ran.status == 0, ran.err
    assert contents(tmp_path / "single") == contents(tmp_path / "whole")


def test_assemble_does_not_replace_unasked(run: Run, tmp_path: Path) -> None:
    flags = ("work", "student", *SMALL, *SIZE, "--data", "text.txt")
    assert run("fuse", TEACHER, "student", "--work", "work", *FLAGS).status == 0
    made = contents(tmp_path / "student")
    (tmp_path / "student" / "stray.txt").write_text("x")

    refused = run("assemble", TEACHER, *flags)
    assert refused.status == 2
    assert "student exists already; choose another name or pass --overwrite" in refused.err
    assert run("assemble", TEACHER, *flags, "--overwrite").status == 0
    assert contents(tmp_path / "student") == made


def test_help_tells_every_setting_and_its_default(run: Run) -> None:
    told = " ".join(run("fuse", "--help").out.split())

    for name, field in fields_of(cli.ALL_STAGES).items():
        assert f"--{name.replace('_', '-')}" in told
        if field.default is not None:
            assert f"[default: {field.default}]" in told
    overview = run("--help").out
    for command in ("inspect", "plan", "fuse", "calibrate", "group", "factor", "distill"):
        assert command in overview


def test_nothing_at_all_is_an_overview(run: Run) -> None:
    ran = run()

    assert ran.status == 2
    assert "Usage: " in ran.err
    assert "Do the whole job" in ran.err


def test_a_switch_has_both_sides(run: Run, tmp_path: Path) -> None:
    """``--no-align`` says false; leaving it out says nothing, and the file's word holds."""
    (tmp_path / "job.yaml").write_text("scale: false\nbias: true\ngroups: 2\nrank: 1\n")

    def layer(*flags: str) -> dict[str, Any]:
        planned = run("plan", TEACHER, "--config", "job.yaml", "--json", *flags)
        return strict(planned.out)["layers"]["1"]

    assert (layer()["scale"], layer()["bias"]) == (False, True)
    assert (layer("--scale")["scale"], layer("--no-bias")["bias"]) == (True, False)


def test_the_version_is_told_by_both_names_of_the_command(run: Run) -> None:
    ran = run("--version")
    as_module = subprocess.run(
        [sys.executable, "-m", "moefuse", "--version"], capture_output=True, text=True, check=True
    )

    assert (ran.status, ran.out) == (0, f"moefuse {version('moefuse')}\n")
    assert as_module.stdout == ran.out
