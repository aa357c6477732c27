"""The third stage of a comparison: every contender healed alike, and measured as it is stored."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Ran, run_here, write_text
from tiny import save_tiny
from torch import Tensor

from moefuse.arena import healing as arena_healing
from moefuse.arena import students as arena_students
from moefuse.arena.bench import LIKE_OURS, Bench
from moefuse.arena.cells import Cell, Wishes
from moefuse.arena.healing import healing_of
from moefuse.arena.run import Comparison, compare
from moefuse.arena.students import make_contenders
from moefuse.baselines._native import KeptExperts
from moefuse.baselines._quantized import GROUP, TrainedScales
from moefuse.comparison import (
    DISTILLED,
    HEALED,
    ONE_SHOT,
    Contender,
    measure_models,
    model_of,
    read_held_out_for,
    routed_part,
)
from moefuse.errors import UserError
from moefuse.evaluation.report import read_report
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.tables import short
from moefuse.mathematics.quantization import WORDS
from moefuse.modeling.modeling_moefuse import NeuronExperts
from moefuse.pipeline import Job

VALUES: dict[str, Any] = {
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 3,
    "batch_tokens": 64,
}
HEALING: dict[str, Any] = {
    "tokens": "4K",
    "sequence_length": 64,
    "batch_size": 4,
    "expert_rate": 2e-4,
    "code_rate": 5e-3,
    "rate": 2e-4,
    "router_rate": 2e-4,
}
FLAGS = (
    *("--tokens", "512", "--sequence-length", "64", "--batch-size", "4"),
    *("--steps", "3", "--batch-tokens", "64", "--data", "text.txt"),
    *("--held-out", "held.txt", "--held-out-tokens", "192"),
    *("--methods", "reap", "--fractions", "0.25", "--seeds", "1", "--bits", "2"),
)
KINDS = (
    *("fused", "fused-bf16", "reap", "m-smoe", "mobe", "d2-moe", "signs"),
    "multiplex-mixture-of-lora",
)
"""A method for every kind of student that there is."""
CELLS = {
    "fused": Cell("fused", None, 0.125, 0),
    "fused-bf16": Cell("fused-bf16", 16, 0.25, 0),
    "pruned": Cell("reap", 16, 0.5, 0),
    "pruned 2-bit": Cell("reap", 2, 0.25, 0),
    "merged 4-bit": Cell("hc-smoe", 4, 0.25, 0),
    "quantised": Cell("gptq", 2, None, 0),
    "coded": Cell("qmoe", 1, None, 0),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 teacher with two MoE layers, and beside it two texts."""
    directory = tmp_path_factory.mktemp("arena")
    save_tiny(directory / "teacher", num_hidden_layers=3, dtype=torch.bfloat16)
    write_text(directory / "text.txt")
    write_text(directory / "held.txt", lines=20)
    return directory / "teacher"


def compared(teacher: Path, out: Path, wishes: Wishes, **more: Any) -> Comparison:
    values = {**VALUES, "data": str(teacher.parent / "text.txt")}
    held_out = str(teacher.parent / "held.txt")
    return compare(teacher, out, values, wishes, held_out=held_out, held_out_tokens=192, **more)


def timeless(rows: list[Row]) -> list[Row]:
    return [replace(row, seconds=None, peak_bytes=None) for row in rows]


def bench_of(teacher: Path, quantise: str = "inside") -> Bench:
    def job_for(values: dict[str, Any]) -> Job:
        text = str(teacher.parent / "text.txt")
        return Job(teacher, teacher.parent / "work", {**VALUES, "data": text, **values})

    job = job_for(LIKE_OURS)
    job.calibrate()
    return Bench(job, job_for, quantise, healing=healing_of(job, HEALING))


@pytest.fixture(scope="module")
def bench(teacher: Path) -> Bench:
    return bench_of(teacher)


@pytest.fixture(scope="module")
def made(bench: Bench) -> Callable[[str], list[Contender]]:
    """``made(name)`` returns a cell's contenders, made once for all tests."""
    found: dict[str, list[Contender]] = {}

    def make(name: str) -> list[Contender]:
        if name not in found:
            found[name] = make_contenders(bench, CELLS[name])
        return found[name]

    return make


def test_every_kind_of_student_is_healed(teacher: Path, tmp_path: Path) -> None:
    names = KINDS
    healing = {**HEALING, "tokens": "512"}

    found = compared(
        teacher, tmp_path / "out", Wishes(names, (0.5,), 1, bits=(4,)), healing=healing
    )

    assert not found.impossible
    healed = [row for row in found.rows if row.stage == HEALED]
    assert {row.method for row in healed} == set(names)
    assert {row.healed_tokens for row in healed} == {512}
    for row in healed:
        (before,) = (
            other
            for other in found.rows
            if other.stage == DISTILLED and (other.method, other.bits) == (row.method, row.bits)
        )
        assert before.healed_tokens is None
        assert row.kl is not None
        assert row.kl != before.kl
        for size in ("parameters", "active_parameters", "expert_bytes", "total_bytes", "bpw"):
            assert getattr(row, size) == getattr(before, size)
    meta, rows = read_report(tmp_path / "out" / "compare.json")
    assert rows == found.rows
    assert meta["healing"]["tokens"] == 512
    report = (tmp_path / "out" / "compare.md").read_text()
    assert "| one-shot | distilled | healed |" in report
    ratios = report.split("## At equal true bytes")[1]
    ours = next(row for row in healed if row.method == "fused")
    assert ours.kl is not None
    assert short(ours.kl) in ratios.split("##")[0], "ratios are those of the last stage"


@pytest.mark.parametrize("name", list(CELLS))
def test_healing_lowers_the_distance_on_the_text_healed_on(
    name: str, bench: Bench, teacher: Path, made: Callable[[str], list[Contender]]
) -> None:
    contenders = made(name)
    assert [contender.stage for contender in contenders] == [ONE_SHOT, DISTILLED, HEALED]
    text = read_held_out_for(bench.job, teacher.parent / "text.txt", 1024)
    family = bench.job.reader.family
    models = {c.stage: model_of(bench.teacher, family, c) for c in contenders}

    found = measure_models(bench.job, models, text, teacher=bench.teacher, description=None)

    assert found[HEALED].kl < 0.95 * found[DISTILLED].kl
    assert found[TEACHER].kl == pytest.approx(0, abs=1e-5), "the teacher learns nothing"


@pytest.mark.parametrize("name", list(CELLS))
def test_a_healed_model_shares_nothing(
    name: str, bench: Bench, made: Callable[[str], list[Contender]]
) -> None:
    *_, distilled, healed = made(name)
    assert healed.model is not None
    places = {parameter.data_ptr() for parameter in bench.teacher.parameters()}
    others = model_of(bench.teacher, bench.job.reader.family, distilled).parameters()
    places |= {parameter.data_ptr() for parameter in others}

    parameters = dict(healed.model.named_parameters())

    assert not [name for name, p in parameters.items() if p.data_ptr() in places and p.numel()]
    for path, parameter in bench.teacher.named_parameters():
        # Norms are around 1, where 16 bits are too few for so small steps.
        if path in parameters and parameter.ndim == 2:
            assert not parameter.equal(parameters[path]), "all of a model is healed"


@pytest.mark.parametrize("name", list(CELLS))
def test_what_is_measured_is_what_is_stored(
    name: str, made: Callable[[str], list[Contender]]
) -> None:
    healed, cell = made(name)[-1], CELLS[name]
    assert healed.model is not None
    few = set()
    for student in healed.students.values():
        if cell.bits in WORDS and cell.fraction is not None:
            for parameter in routed_part(student).parameters():
                few.add(id(parameter))
                assert most_values(parameter) <= 2**cell.bits
        for scales in (m for m in student.modules() if isinstance(m, TrainedScales)):
            few |= {id(scales.factor)}
            assert scales.start.equal(scales.start.half().float())
            assert scales.factor.eq(1).all()
        assert isinstance(student, NeuronExperts) == name.startswith("fused")
    for parameter in healed.model.parameters():
        assert not parameter.requires_grad
        if id(parameter) not in few:
            assert parameter.equal(parameter.bfloat16().float())


def most_values(matrix: Tensor) -> int:
    """Return how many different numbers a group has at most, along the better dimension."""

    def most(rows: Tensor) -> int:
        groups = itertools.chain.from_iterable(
            row.split(GROUP) for row in rows.reshape(-1, rows.shape[-1])
        )
        return max(len(group.unique()) for group in groups)

    return min(most(matrix), most(matrix.mT))


def test_the_router_of_a_pruned_block_is_healed(
    made: Callable[[str], list[Contender]],
) -> None:
    *_, distilled, healed = made("pruned 2-bit")
    for layer, student in healed.students.items():
        before = distilled.students[layer]
        assert isinstance(student, KeptExperts)
        assert isinstance(before, KeptExperts)
        router = student.routed.get_parameter("gate.weight")
        assert not router.equal(before.routed.get_parameter("gate.weight"))
        assert most_values(router) > 4
        assert healed.model is not None
        block = healed.model.get_submodule(f"model.layers.{layer}.mlp")
        assert block.get_parameter("gate.weight") is router


def test_rounding_after_distillation_comes_after_healing_too(
    bench: Bench, teacher: Path, made: Callable[[str], list[Contender]]
) -> None:
    *_, healed = make_contenders(bench_of(teacher, "after"), CELLS["pruned 2-bit"])
    for student in healed.students.values():
        assert isinstance(student, KeptExperts)
        assert all(most_values(p) <= 4 for p in routed_part(student).parameters())
        assert most_values(student.routed.get_parameter("gate.weight")) > 4
    text = read_held_out_for(bench.job, teacher.parent / "text.txt", 1024)
    both = {"inside": made("pruned 2-bit")[-1].model, "after": healed.model}
    found = measure_models(bench.job, both, text, teacher=bench.teacher, description=None)  # type: ignore[arg-type]
    assert found["inside"].kl < found["after"].kl


def test_an_interrupted_healing_does_not_distil_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes(("reap", "signs"), (0.25,), 1, bits=(2,))
    whole = compared(teacher, tmp_path / "whole", wishes, healing=HEALING)
    assert not list((tmp_path / "whole").rglob("students-*/*")), "nothing is kept of what is done"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arena_healing, "heal_in_place", stop)
        with pytest.raises(KeyboardInterrupt):
            compared(teacher, tmp_path / "out", wishes, healing=HEALING)
    real = arena_students.distill_layer
    distilled: list[int] = []

    def counted(*given: Any, **named: Any) -> Any:
        distilled.append(1)
        return real(*given, **named)

    monkeypatch.setattr(arena_students, "distill_layer", counted)
    found = compared(teacher, tmp_path / "out", wishes, healing=HEALING)

    assert len(distilled) == 2, "the two layers of the cell that had not begun"
    assert timeless(found.rows) == timeless(whole.rows)
    before = next(row for row in found.rows if row.stage == DISTILLED)
    assert before.seconds is not None
    assert before.seconds > 0


def test_healed_cells_are_others(teacher: Path, tmp_path: Path) -> None:
    wishes = Wishes(("reap",), (0.25,), 1, bits=(2,))
    plain = compared(teacher, tmp_path, wishes)
    healed = compared(teacher, tmp_path, wishes, healing=HEALING)

    assert timeless(healed.rows)[:-1] == timeless(plain.rows), "the stages before are the same"
    assert timeless(compared(teacher, tmp_path, wishes).rows) == timeless(plain.rows)
    with pytest.raises(UserError, match="measured with other settings"):
        compared(teacher, tmp_path, wishes, healing={**HEALING, "tokens": "5K"})
    with pytest.raises(UserError, match="measured with other settings"):
        compared(teacher, tmp_path, wishes, healing={**HEALING, "rate": 2e-3})


def test_the_command_heals(
    teacher: Path, tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(teacher.parent)
    (tmp_path / "how.yaml").write_text("sequence_length: 64\nbatch_size: 4\n")

    def run(*arguments: Any) -> Ran:
        return run_here(capfd, "compare", "teacher", tmp_path / "out", *FLAGS, *arguments)

    more = ("--heal-data", "held.txt", "--healing", tmp_path / "how.yaml")
    done = run("--heal-tokens", "1K", *more)
    assert done.status == 0, done.err
    meta, rows = read_report(tmp_path / "out" / "compare.json")
    assert rows[-1].stage == HEALED
    assert rows[-1].healed_tokens == 1_000
    assert (meta["healing"]["sequence_length"], meta["healing"]["tokens"]) == (64, 1_000)

    refused = run(*more)
    assert refused.status == 2
    assert "--heal-data and --healing need --heal-tokens" in refused.err
    assert "--heal-tokens" in run("--heal-tokens", "few").err
    (tmp_path / "how.yaml").write_text("train: deltas\n")
    assert "Rivals have no deltas" in run("--heal-tokens", "1K", *more).err
    (tmp_path / "how.yaml").write_text("tokens: 1K\n")
    assert "are given by --heal-tokens here" in run("--heal-tokens", "1K", *more).err
