"""Healing as a command: what it writes, that a kill costs nothing, and what it refuses."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import changes, contents, run_elsewhere, run_here, write_jsonl, write_text
from safetensors.torch import load_file
from strangers import IDS_BS, TO_MANY, see
from test_resume import INTERRUPTED
from tiny import save_tiny

from moefuse.cards import read_record
from moefuse.evaluation.loading import load_model
from moefuse.export.record import PLOT, RECORD
from moefuse.families import all_families
from moefuse.heal import HEALING, heal
from moefuse.healing.teach import teach
from moefuse.modeling import load_fused
from moefuse.pipeline import fuse
from moefuse.quantize import quantize

SEED = 11
FUSED: dict[str, Any] = {
    "groups": 3,
    "rank": 2,
    "tokens": 256,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 2,
    "batch_tokens": 64,
    "sensitivity_tokens": 0,
}
NEURONS = {**FUSED, "groups": None, "rank": None, "expert_bits": 3.0, "sensitivity_tokens": 256}
FORMS = {"deltas": FUSED, "neurons": NEURONS}
HEAL: dict[str, Any] = {
    "tokens": "2400",
    "sequence_length": 32,
    "batch_size": 8,
    "save_steps": 3,
    "logging_steps": 2,
    "eval_steps": 4,
}
FLAGS = [
    part for name, value in HEAL.items() for part in (f"--{name.replace('_', '-')}", str(value))
]
STEPS = 9


@dataclass(frozen=True)
class Desk:
    """A teacher, its students by form, a text to heal on and one that is held out."""

    folder: Path

    def at(self, name: str) -> Path:
        return self.folder / name

    @property
    def given(self) -> dict[str, Any]:
        return {**HEAL, "data": str(self.at("text.txt"))}

    def heal(self, out: Path, form: str = "deltas", **values: Any) -> dict[str, Any]:
        """Heal in this process, and return what the checkpoint says of it."""
        held_out = values.pop("held_out", None)
        teacher = self.at("teacher")
        heal(self.at(form), out, {**self.given, **values}, teacher=teacher, held_out=held_out)
        return json.loads((out / HEALING).read_text())


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    save_tiny(folder / "teacher", dtype=torch.bfloat16)
    write_text(folder / "text.txt")
    write_jsonl(folder / "held.jsonl", documents=6)
    for form, values in FORMS.items():
        fuse(folder / "teacher", folder / form, {**values, "data": str(folder / "text.txt")})
    quantize(folder / "deltas", folder / "int8", {"scheme": "w8a8"})
    return Desk(folder)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


def layout_of(directory: Path) -> dict[str, Any]:
    return {name: (t.dtype, t.shape) for name, t in tensors_of(directory).items()}


# What is written.


@pytest.mark.parametrize("model_type", sorted(all_families()))
def test_every_family_heals_and_keeps_its_form(
    model_type: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    teacher, data = tiny_checkpoint(model_type), str(write_text(tmp_path / "text.txt"))
    student, out = tmp_path / "student", tmp_path / "healed"
    fuse(teacher, student, {**FUSED, "steps": 0, "rank": 0, "data": data, "max_shard": "40KB"})

    slowly = {"expert_rate": 5e-4, "rate": 1e-4}
    result = heal(student, out, {**HEAL, **slowly, "data": data}, teacher=teacher, held_out=data)

    losses = [line["eval_loss"] for line in result.log if "eval_loss" in line]
    assert result.steps == STEPS
    assert losses[-1] < losses[0]
    assert layout_of(out) == layout_of(student)
    weights = "model*.safetensors*"
    sizes = [{p.name: p.stat().st_size for p in d.glob(weights)} for d in (student, out)]
    assert len(sizes[0]) > 2
    assert sizes[0] == sizes[1]
    before, after = tensors_of(student), tensors_of(out)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_healed_low_bit_rows_stay_codes(desk: Desk, tmp_path: Path) -> None:
    told = desk.heal(tmp_path / "out", "neurons", code_rate=0.05)

    assert layout_of(tmp_path / "out") == layout_of(desk.at("neurons"))
    before, after = tensors_of(desk.at("neurons")), tensors_of(tmp_path / "out")
    codes = [name for name in before if name.endswith(".codes")]
    assert codes
    assert any(not torch.equal(before[name], after[name]) for name in codes)
    assert all(torch.isfinite(t.float()).all() for t in after.values())
    assert told["log"][-1]["step"] == STEPS


def test_a_stranger_loads_what_was_healed(desk: Desk, tmp_path: Path) -> None:
    healed = [tmp_path / form for form in FORMS]
    for form, out in zip(FORMS, healed, strict=True):
        desk.heal(out, form)
    (tmp_path / "seen").mkdir()

    see(TO_MANY, tmp_path / "seen", *healed)

    for out in healed:
        seen = load_file(tmp_path / "seen" / f"{out.name}.safetensors")
        with torch.no_grad():
            assert torch.equal(seen["logits"], load_fused(out).eval()(IDS_BS).logits)


# The model card.


def test_the_card_tells_of_before_and_after(desk: Desk, tmp_path: Path) -> None:
    held_out = desk.at("held.jsonl")
    told = desk.heal(tmp_path / "out", held_out=held_out, cross_entropy=0.5, train="experts")

    record = read_record(tmp_path / "out")
    assert record.healed is not None
    assert record.measured is not None
    assert record.name == "out"
    assert record.healed.data.name == "text.txt"
    assert record.healed.data.tokens == pytest.approx(2400, rel=0.1)
    assert record.healed.steps == STEPS
    assert record.healed.loss == "forward KL + 0.5 x cross-entropy of the text at temperature 1"
    assert record.healed.trained == "the routed experts"
    stages = {stage.stage: stage for stage in record.measured.stages}
    assert list(stages) == ["teacher", "distilled", "healed"]
    assert all(stages[name].intervals["kl"] for name in ("distilled", "healed"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "this model, healed end to end" in card
    assert "It was then healed; trained: the routed experts." in " ".join(card.split())
    assert (tmp_path / "out" / PLOT).read_bytes() != b""
    assert [line["step"] for line in told["log"] if "eval_loss" in line] == [0, 4, 8, STEPS]


def test_the_card_has_the_figures_of_what_was_written(desk: Desk, tmp_path: Path) -> None:
    from moefuse.corpus import load_tokenizer
    from moefuse.evaluation.quality import evaluate
    from moefuse.measuring import read_held_out

    desk.heal(tmp_path / "out", held_out=desk.at("held.jsonl"))
    tokenizer = load_tokenizer(tmp_path / "out", "out")
    held_out = read_held_out(desk.at("held.jsonl"), tokenizer, HEAL["sequence_length"], 12_288)
    models = {
        name: load_model(desk.at(name) if name != "healed" else tmp_path / "out", dtype="float32")
        for name in ("teacher", "deltas", "healed")
    }
    found = evaluate(
        {name: model for name, (model, _) in models.items()},
        held_out.sequences,
        teacher=models["teacher"][0],
        documents=held_out.documents,
        pad_id=0,
        description=None,
    )

    measured = read_record(tmp_path / "out").measured
    assert measured is not None
    of_stage = {stage.stage: stage for stage in measured.stages}
    for stage, name in (("distilled", "deltas"), ("healed", "healed")):
        assert of_stage[stage].kl == pytest.approx(found[name].kl, rel=1e-4)
        assert of_stage[stage].intervals["kl"] == pytest.approx(
            found[name].intervals["kl"], rel=1e-4
        )


def test_figures_on_the_same_text_are_taken_over(desk: Desk, tmp_path: Path) -> None:
    """Healed twice: what was measured of the stages before stays beside the new figures."""
    desk.heal(tmp_path / "once", held_out=desk.at("held.jsonl"))
    first = read_record(tmp_path / "once").measured
    heal(
        tmp_path / "once",
        tmp_path / "twice",
        {**desk.given, "seed": 1},
        teacher=desk.at("teacher"),
        held_out=desk.at("held.jsonl"),
    )
    second = read_record(tmp_path / "twice").measured
    assert first is not None
    assert second is not None
    assert second.stages[:2] == first.stages[:2]
    assert [stage.stage for stage in second.stages] == ["teacher", "distilled", "healed"]
    assert second.stages[2] != first.stages[2]


def test_without_held_out_text_the_card_says_so(desk: Desk, tmp_path: Path) -> None:
    desk.heal(tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert record.measured == read_record(desk.at("deltas")).measured
    assert record.healed is not None


def test_from_a_cache_the_divergence_is_said_not_to_be_known(desk: Desk, tmp_path: Path) -> None:
    settings = {**desk.given, "top": 16, "tail": 4}
    teach(desk.at("teacher"), tmp_path / "cache", {k: settings[k] for k in settings if k in TAUGHT})

    heal(
        desk.at("deltas"),
        tmp_path / "out",
        HEAL,
        teacher_cache=tmp_path / "cache",
        held_out=desk.at("held.jsonl"),
    )

    record = read_record(tmp_path / "out")
    assert record.healed is not None
    assert record.measured is not None
    assert record.healed.data.name == "text.txt"
    assert "16 likeliest words and 4 drawn ones" in record.healed.loss
    healed = record.measured.stages[-1]
    assert (healed.stage, healed.kl) == ("healed", None)
    assert healed.cross_entropy > 0
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "KL not measured, because a teacher cache stood for the original" in card


TAUGHT = ("data", "tokens", "sequence_length", "batch_size", "top", "tail")


def test_a_student_without_a_record_heals_too(
    desk: Desk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(desk.at("deltas"), tmp_path / "old")
    (tmp_path / "old" / RECORD).unlink()

    heal(tmp_path / "old", tmp_path / "out", desk.given, teacher=desk.at("teacher"))

    assert "has no model card, because" in capfd.readouterr().err
    assert not (tmp_path / "out" / "README.md").exists()
    assert layout_of(tmp_path / "out") == layout_of(desk.at("deltas"))


# Killed at any instant.


@dataclass(frozen=True)
class Job:
    """A healing that ran uninterrupted: its command, what it wrote and changed in order."""

    command: tuple[str | Path, ...]
    healed: dict[str, bytes]
    changes: list[list[str]]

    def heal(self, folder: Path, *more: str, **how: Any) -> int:
        student, *rest = self.command
        command = ("heal", student, folder / "out", *rest, *more)
        return run_elsewhere(folder / "log", *command, **how)

    def instants(self, part: str, count: int = 2) -> list[int]:
        """Return some of the changes that belong to a part of the work, counted from 1."""
        found = [at for at, (_, path) in enumerate(self.changes, start=1) if part in path]
        return sorted(random.Random(SEED).sample(found, min(count, len(found))))


def _job(desk: Desk, form: str, folder: Path) -> Job:
    command = (
        desk.at(form),
        "--teacher",
        desk.at("teacher"),
        "--data",
        desk.at("text.txt"),
        "--held-out",
        desk.at("held.jsonl"),
        "--code-rate",
        "0.02",
        *FLAGS,
    )
    unknown = Job(command, {}, [])
    assert unknown.heal(folder) == 0, (folder / "log").read_text()
    return Job(command, contents(folder / "out"), changes(folder / "log"))


@pytest.fixture(scope="module")
def job(desk: Desk, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Of low-bit rows, whose codes follow what is trained: there is most to lose."""
    return _job(desk, "neurons", tmp_path_factory.mktemp("uninterrupted"))


def assert_finished(job: Job, folder: Path) -> None:
    assert contents(folder / "out") == job.healed
    assert {path.name for path in folder.iterdir()} - {"log", "log.changes"} == {"out"}


def new_folder(parent: Path, name: int | str) -> Path:
    folder = parent / str(name)
    folder.mkdir()
    return folder


def complete(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob("out.work/*/checkpoint-*/complete.json"))


PARTS = ("checkpoint-3", "checkpoint-6", "out.partial", "/out", "checkpoint-")


@pytest.mark.parametrize("part", PARTS)
def test_killed_in_any_part(job: Job, part: str, tmp_path: Path) -> None:
    for at in job.instants(part, 1 if part.startswith("/") else 2):
        folder = new_folder(tmp_path, at)

        assert job.heal(folder, die_at=at) == -signal.SIGKILL

        assert job.heal(folder) == 0, (at, (folder / "log").read_text())
        assert_finished(job, folder)


def test_killed_with_a_checkpoint_half_written(job: Job, tmp_path: Path) -> None:
    """The half is removed and the whole one before it taken."""
    last = max(at for at, (_, p) in enumerate(job.changes, start=1) if "checkpoint-6" in p)
    inside = [at for at, (_, p) in enumerate(job.changes, start=1) if "checkpoint-6/" in p]
    assert last >= inside[-1]

    assert job.heal(tmp_path, die_at=inside[len(inside) // 2]) == -signal.SIGKILL
    assert complete(tmp_path) == ["checkpoint-3"]
    assert list(tmp_path.glob("out.work/*/checkpoint-6"))

    assert job.heal(tmp_path) == 0
    assert_finished(job, tmp_path)


def test_killed_again_and_again(desk: Desk, tmp_path: Path) -> None:
    job = _job(desk, "deltas", new_folder(tmp_path, "uninterrupted"))
    folder = new_folder(tmp_path, "killed")
    for at in (13, 20, 40):
        assert job.heal(folder, die_at=at) == -signal.SIGKILL

    assert job.heal(folder) == 0
    assert_finished(job, folder)


def test_killed_at_any_time(job: Job, tmp_path: Path) -> None:
    """While it computes, too, and not only around its changes to files."""
    begin = time.monotonic()
    assert job.heal(new_folder(tmp_path, "whole")) == 0
    whole = time.monotonic() - begin
    kills = 0
    for at, share in enumerate((0.5, 0.8)):
        folder = new_folder(tmp_path, at)
        kills += job.heal(folder, die_after=share * whole) == -signal.SIGKILL
        if not (folder / "out").exists() or (folder / "out.work").exists():
            assert job.heal(folder) == 0, (folder / "log").read_text()
        assert_finished(job, folder)
    assert kills > 0


def test_interrupted_from_the_keyboard(job: Job, tmp_path: Path) -> None:
    at = job.instants("checkpoint-6", 1)[0]

    assert job.heal(tmp_path, die_at=at, by=signal.SIGINT) == 130
    words = (tmp_path / "log").read_text().splitlines()
    assert words[-1] == INTERRUPTED
    assert not any("Traceback" in line for line in words)

    assert job.heal(tmp_path) == 0
    assert_finished(job, tmp_path)


def test_what_is_finished_is_not_done_again(job: Job, tmp_path: Path) -> None:
    assert job.heal(tmp_path) == 0
    assert job.heal(tmp_path) == 2
    assert "out exists already" in (tmp_path / "log").read_text()


# Refusals.


@pytest.fixture
def refused(desk: Desk, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command that must end in one sentence and leave nothing behind."""

    def refuse(match: str, *more: str | Path, form: str = "deltas", out: str = "out") -> None:
        before = contents(tmp_path)
        ran = run_here(capfd, "heal", desk.at(form), tmp_path / out, *FLAGS, *more)
        assert (ran.status, ran.out, len(ran.err.splitlines())) == (2, "", 1), ran.err
        assert ran.err.startswith("moefuse: ")
        assert ran.err.endswith(".\n")
        assert match in ran.err
        assert contents(tmp_path) == before
        assert not (tmp_path / "out.work").exists()

    return refuse


def test_commands_that_make_no_sense(
    desk: Desk, refused: Callable[..., None], tmp_path: Path
) -> None:
    live = ("--teacher", desk.at("teacher"))
    usual = (*live, "--data", desk.at("text.txt"))
    refused("Give one of --teacher and --teacher-cache", "--data", desk.at("text.txt"))
    refused("Say with --data what text", *live)
    refused("nowhere.txt does not exist", *live, "--data", "nowhere.txt")
    refused("nowhere/else is no local directory", *live[:1], "nowhere/else", *usual[2:])
    refused("All losses have the weight 0", *usual, "--forward-kl", "0")
    refused("its gradients vanish", *usual, "--dtype", "float16")
    refused("no teacher cache", "--teacher-cache", desk.at("teacher"))
    refused("--tokens is 'many'", *usual, "--tokens", "many")
    refused("has no moefuse block", *usual, form="teacher")
    refused("leaves nothing to train", *usual, "--train", "deltas", form="neurons")
    refused("is quantised (compressed-tensors)", *usual, form="int8")
    refused("lies in the checkpoint", *usual, out=str(desk.at("deltas") / "out"))
    (tmp_path / "out").mkdir()
    refused("out exists already; choose another name or pass --overwrite", *usual)
    (tmp_path / "out" / "letter.txt").write_text("dear")
    refused("holds something that is no checkpoint", *usual, "--overwrite")


def test_teachers_that_the_student_cannot_be_of(
    desk: Desk, refused: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("others")
    save_tiny(folder / "olmoe", "olmoe")
    save_tiny(folder / "words", vocab_size=80)
    save_tiny(folder / "deep", num_hidden_layers=4)
    data = ("--data", desk.at("text.txt"))
    refused("The model_type of the teacher", "--teacher", folder / "olmoe", *data)
    refused("The vocab_size of the teacher", "--teacher", folder / "words", *data)
    deep = ("--teacher", folder / "deep", *data, "--hidden", "0.1")
    refused("The num_hidden_layers of the teacher", *deep)


def test_what_a_cache_cannot_do(
    desk: Desk, refused: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("caches")
    save_tiny(folder / "words", vocab_size=80)
    taught = {name: value for name, value in desk.given.items() if name in TAUGHT}
    for name, teacher in (("own", desk.at("teacher")), ("other", folder / "words")):
        teach(teacher, folder / name, {**taught, "top": 8, "tail": 4})
    own = ("--teacher-cache", folder / "own")
    refused("--reverse-kl needs the teacher itself", *own, "--reverse-kl", "0.5")
    refused("--hidden needs the teacher itself", *own, "--hidden", "0.5")
    refused("holds probabilities at 1", *own, "--temperature", "2")
    refused("of a vocabulary of 80 words", "--teacher-cache", folder / "other")
    refused("Give one of --teacher and --teacher-cache", *own, "--teacher", desk.at("teacher"))
    refused("is of other text", *own, "--data", desk.at("held.jsonl"))
