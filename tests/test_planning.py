"""``moefuse plan`` for a device's memory: one plan, the table of common sizes, mistakes."""

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from running import Ran, run_here

import moefuse
from moefuse.errors import UserError
from moefuse.planning import (
    CommonSizes,
    percent_lost,
    plan_checkpoint,
    plan_common_sizes,
    render_common_sizes,
)

Run = Callable[..., Ran]
TEACHER = "teacher-deepseek_v2"
PARTS = ("weights", "cache", "activations", "runtime")


@pytest.fixture
def run(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    tiny_checkpoint()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: run_here(capfd, *arguments)


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-Coder-V2-Lite without its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent / "checkpoint")
        from layouts import CODER_V2_LITE, published, write_layout

        directory = tmp_path_factory.mktemp("lite")
        write_layout(directory, CODER_V2_LITE, published(CODER_V2_LITE), shards=4)
    return directory


def room(run: Run, share: float) -> str:
    """Return a ``--vram`` that leaves a share of the teacher's bytes for weights."""
    memory = json.loads(run("plan", TEACHER, "--groups", "2", "--context", "64", "--json").out)
    needed = sum(memory["memory"][part] for part in PARTS[1:])
    return str(needed + round(share * memory["teacher_bytes"]))


def test_a_student_for_a_device(run: Run) -> None:
    vram = room(run, 0.8)

    wish = ("--form", "low-rank", "--vram", vram, "--context", "64")
    planned = json.loads(run("plan", TEACHER, *wish, "--json").out)

    memory = planned["memory"]
    assert memory.keys() == {"vram", *PARTS, "free"}
    assert memory["vram"] == int(vram)
    assert sum(memory[part] for part in PARTS) + memory["free"] == int(vram)
    assert memory["weights"] == planned["bytes"]
    assert planned["serving"]["context"] == 64
    assert planned["teacher_fits"] is False
    layer = planned["layers"]["1"]
    more = ("--groups", str(layer["groups"]), "--rank", str(layer["rank"] + 1))
    larger = json.loads(run("plan", TEACHER, *more, "--context", "64", "--json").out)["memory"]
    assert (larger["vram"], larger["free"]) == (None, None)
    assert sum(larger[part] for part in PARTS) > int(vram)


def test_a_student_of_own_neurons_for_a_device(run: Run) -> None:
    wish = ("--vram", room(run, 0.8), "--context", "64")

    planned = json.loads(run("plan", TEACHER, *wish, "--json").out)

    assert sum(planned["layers"]["1"]["neurons"].values()) > 0
    assert 0 <= planned["memory"]["free"] < 0.02 * planned["teacher_bytes"]


def test_what_a_size_costs_is_told(run: Run) -> None:
    wish = ("--vram", room(run, 0.8), "--context", "64")

    ran = run("plan", TEACHER, *wish)
    planned = json.loads(run("plan", TEACHER, *wish, "--json").out)
    bases = json.loads(run("plan", TEACHER, "--groups", "2", "--json").out)

    assert 0 < planned["energy_lost"] < 0.5
    assert 0.5 < planned["neurons_kept"] <= 1
    assert planned["mean_bits"] > 4
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in ran.out.splitlines()]
    assert ["in plain words", planned["advice"]] in cells
    (lost,) = [c[1] for c in cells if c[:1] == ["energy of the experts lost, forecast"]]
    assert float(lost.rstrip("%")) == pytest.approx(100 * planned["energy_lost"], abs=0.05)
    told = ("energy_lost", "neurons_kept", "mean_bits", "advice")
    assert all(bases[name] is None for name in told)
    assert "in plain words" not in run("plan", TEACHER, "--groups", "2").out


def test_groups_may_be_given_with_a_device(run: Run) -> None:
    flags = ("--vram", room(run, 0.8), "--context", "64", "--groups", "2", "--json")

    planned = json.loads(run("plan", TEACHER, *flags).out)

    assert planned["layers"]["1"]["groups"] == 2


def test_a_device_that_holds_the_teacher_needs_no_student(run: Run) -> None:
    vram = room(run, 1.0)

    ran = run("plan", TEACHER, "--vram", vram, "--context", "64")
    planned = json.loads(run("plan", TEACHER, "--vram", vram, "--context", "64", "--json").out)

    assert "none needed: the teacher fits as it is" in ran.out
    assert planned["teacher_fits"] is True
    assert planned["estimate"] is None
    assert planned["memory"]["free"] == 0


def test_memory_is_told_for_people(run: Run) -> None:
    told = run("plan", TEACHER, "--groups", "2", "--context", "64", "--batch", "2").out

    assert "memory, 2 sequences of 64 tokens in Transformers" in told
    assert "key-value cache" in told
    assert "key-value cache" not in run("plan", TEACHER, "--groups", "2").out


def test_a_longer_context_leaves_less_for_weights(lite: Path) -> None:
    def planned(**settings: Any) -> int:
        plan = plan_checkpoint(lite, {"vram": "24GB", "device": "cpu", **settings}).plan
        assert plan is not None
        return plan.bytes

    usual = planned(context=16_384)
    assert usual > planned(context=65_536) > planned(context=65_536, batch=4)
    assert usual > planned(context=16_384, engine="vllm")


def test_the_cache_of_coder_v2_lite_is_half_a_gigabyte_at_16384_tokens(lite: Path) -> None:
    sizes = plan_common_sizes(lite, {"context": 16_384})

    assert sizes.fits[0].memory.cache == 16_384 * 31_104


def test_common_sizes_of_coder_v2_lite(lite: Path) -> None:
    sizes = plan_common_sizes(lite, {"context": 16_384})

    assert [fit.memory.vram for fit in sizes.fits] == [
        size * 10**9 for size in (8, 12, 16, 24, 48, 80)
    ]
    assert [fit.runs for fit in sizes.fits] == ["student"] * 4 + ["teacher"] * 2
    for fit in sizes.fits:
        assert fit.memory.free is not None and fit.memory.free >= 0
        planned = plan_checkpoint(
            lite, {"context": 16_384, "vram": str(fit.memory.vram), "device": "cpu"}
        )
        assert (planned.plan, planned.memory) == (fit.plan, fit.memory)


def shown(sizes: CommonSizes, width: int) -> list[str]:
    console = Console(width=width, file=StringIO())
    with console.capture() as told:
        console.print(render_common_sizes(sizes))
    return told.get().splitlines()


def test_common_sizes_say_what_is_kept_and_lost_in_a_line_each(lite: Path) -> None:
    sizes = plan_common_sizes(lite, {"context": 16_384})

    lines = shown(sizes, 100)

    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) == 6
    assert any(re.search(r"┃ runs +┃ +lost ┃", line) for line in lines)
    for row, fit in zip(rows, sizes.fits, strict=True):
        if fit.plan is None:
            assert "the teacher as it is" in row
        else:
            assert re.search(r"│ ([0-9.]+% of neurons|every neuron) at [0-9.]+ bits +│", row), row
            assert re.search(r"│ +[0-9.]+% │", row), row
    lost = [fit.plan.energy_lost for fit in sizes.fits if fit.plan]
    assert lost == sorted(lost, reverse=True)
    assert sizes.to_json()["rows"][0]["plan"]["energy_lost"] == lost[0]


def test_common_sizes_of_bases_and_deltas_have_no_forecast(lite: Path) -> None:
    lines = shown(plan_common_sizes(lite, {"context": 16_384, "form": "low-rank"}), 100)

    assert any(re.search(r"│ 4 fused experts, deltas of rank 50 +│ +│", line) for line in lines)


def test_little_energy_lost_is_not_told_as_none() -> None:
    shares = (0.64, 0.0083, 0.00004, 0.0)

    assert [percent_lost(share) for share in shares] == ["64.0%", "0.83%", "<0.01%", "0%"]


def test_a_device_too_small_is_a_row_that_tells_what_is_needed(lite: Path) -> None:
    sizes = plan_common_sizes(lite, {"context": 163_840, "batch": 2})

    first = sizes.fits[0]
    assert (first.runs, first.plan) == ("nothing", None)
    assert first.memory.free is not None and first.memory.free < 0
    with pytest.raises(UserError, match=f"but {first.memory.total / 1e9:.3f} GB are needed"):
        plan_checkpoint(lite, {"vram": "8GB", "context": 163_840, "batch": 2})
    assert render_common_sizes(sizes).row_count == 6


def test_a_context_alone_shows_the_common_sizes(run: Run) -> None:
    ran = run("plan", TEACHER, "--context", "64")
    rows = json.loads(run("plan", TEACHER, "--context", "64", "--json").out)["rows"]

    assert "what runs with 64 tokens in Transformers" in ran.out
    assert "24 GB" in ran.out and "the teacher as it is" in ran.out
    assert [row["runs"] for row in rows] == ["teacher"] * 6
    assert all(row["memory"].keys() == {"vram", *PARTS, "free"} for row in rows)


def test_the_same_from_python(lite: Path) -> None:
    planned = moefuse.plan(lite, vram="24GB", context=16_384, device="cpu")

    assert planned.memory is not None
    assert planned.memory.total <= 24e9


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--vram", "24GB"), "--vram needs --context"),
        (("--groups", "2", "--batch", "2"), "--batch needs --context"),
        (("--groups", "2", "--engine", "vllm"), "--engine needs --context"),
        (("--context", "513", "--groups", "2"), "this model takes at most 512 tokens"),
        (("--context", "513"), "this model takes at most 512 tokens"),
        (("--context", "0"), "--context is 0; it must be at least 1"),
        (("--context", "64", "--batch", "0"), "--batch is 0; it must be at least 1"),
        (("--context", "64", "--engine", "tgi"), "choose from transformers, vllm"),
        (("--context", "64", "--vram", "much"), "--vram is 'much', which is not a size"),
        (("--context", "64", "--vram", "1GB", "--params", "40K"), "--vram and --params both set"),
        (("--context", "64", "--vram", "1GB", "--bytes", "1MB"), "--vram and --bytes both set"),
        (
            ("--context", "64", "--vram", "1GB", "--groups", "2", "--rank", "1"),
            "leave --vram nothing to choose",
        ),
        (("--context", "64", "--vram", "1GB"), "--vram is 1.000 GB, but 1.00"),
        (("--context", "64", "--rank", "2"), "Say how small the model should be"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run: Run, flags: tuple[str, ...], told: str) -> None:
    ran = run("plan", TEACHER, *flags)

    assert ran.status == 2
    assert told in ran.err
    assert ran.out == ""
