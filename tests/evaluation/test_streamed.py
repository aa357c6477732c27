"""Measured layer by layer, a student is as far from its teacher as when both are loaded whole."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.evaluation.quality import Quality, evaluate
from moefuse.evaluation.streamed import (
    LOGITS_AT_ONCE,
    HeldOut,
    measure_streamed,
    pass_through,
    remembered,
)
from moefuse.families import all_families

LENGTHS = (9, 2, 17, 5, 13, 17, 3, 17, 6, 11)


class Weakened(nn.Module):
    """A student: the teacher's own experts, all they return times a factor."""

    def __init__(self, experts: nn.Module, factor: float) -> None:
        super().__init__()
        self.experts, self.factor = experts, factor

    def forward(self, *given: Tensor) -> Tensor:
        return self.factor * self.experts(*given)


@pytest.fixture
def held_out() -> HeldOut:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(64, (length,), generator=generator) for length in LENGTHS]
    return HeldOut("held.jsonl", sequences, [0, 0, 1, 2, 2, 3, 4, 4, 4, 5], 17)


def streamed(path: Path) -> StreamedTeacher:
    return StreamedTeacher(CheckpointReader.open(path), device="cpu", dtype=torch.float32)


def weaken(model: PreTrainedModel, teacher: StreamedTeacher) -> dict[int, nn.Module]:
    """Put students into a whole model and return copies of them for the streamed one."""
    family, students = teacher.reader.family, {}
    for layer in teacher.reader.shape.layers:
        block = model.get_submodule(family.moe_path(layer))
        students[layer] = Weakened(getattr(block, family.experts_name), 0.4 - 0.1 * layer)
        setattr(block, family.experts_name, students[layer])
    return students


def assert_alike(found: Quality, wanted: Quality) -> None:
    assert (found.tokens, found.documents) == (wanted.tokens, wanted.documents)
    for name in ("cross_entropy", "perplexity", "kl", "agreement"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-4, abs=1e-6)
    assert found.intervals.keys() == wanted.intervals.keys() != set()
    for name, interval in found.intervals.items():
        assert interval == pytest.approx(wanted.intervals[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", sorted(all_families()))
def test_as_when_loaded_whole(family: str, held_out: HeldOut, tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "teacher", family)
    whole = save_tiny(tmp_path / "other", family)
    teacher = streamed(tmp_path / "teacher")
    students = weaken(whole, teacher)
    wanted = evaluate(
        {"teacher": original, "student": whole},
        held_out.sequences,
        teacher=original,
        documents=held_out.documents,
        batch_size=3,
        pad_id=0,
    )

    found = measure_streamed(
        teacher,
        lambda layer: students[layer],
        held_out,
        teacher_directory=tmp_path / "t",
        student_directory=tmp_path / "s",
    )

    assert_alike(found[0], wanted["teacher"])
    assert_alike(found[1], wanted["student"])
    kl = found[1].kl
    assert kl is not None and kl > 0.01


def test_a_loaded_student_beside_a_remembered_teacher(held_out: HeldOut, tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "teacher")
    student = save_tiny(tmp_path / "other", seed=1)
    teacher = streamed(tmp_path / "teacher")
    options = {
        "documents": held_out.documents,
        "batch_size": held_out.batch_size(64),
        "pad_id": 0,
    }
    text = held_out.sequences
    wanted = evaluate({"student": student}, text, teacher=original, **options)

    with remembered(teacher, held_out, tmp_path / "hidden") as known:
        found = evaluate({"student": student}, text, teacher=known, **options)

    assert_alike(found["student"], wanted["student"])
    assert all(tensor.is_meta for tensor in teacher.layers[0].parameters())


def test_what_was_passed_is_not_passed_again(
    held_out: HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "teacher")
    teacher = streamed(tmp_path / "teacher")
    first = pass_through(teacher, held_out, tmp_path / "hidden", "Measure").entering(0)["hidden"]
    monkeypatch.setattr(teacher, "loaded", pytest.fail)

    again = pass_through(teacher, held_out, tmp_path / "hidden", "Measure")

    assert again.layer == 3
    assert torch.equal(again.entering(0)["hidden"], first)


def test_a_students_place_is_given_back(held_out: HeldOut, tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher")
    teacher = streamed(tmp_path / "teacher")
    names = [name for name, _ in teacher.model.named_modules()]

    pass_through(teacher, held_out, tmp_path / "hidden", "Measure", lambda layer: Zero())

    assert [name for name, _ in teacher.model.named_modules()] == names


class Zero(nn.Module):
    def forward(self, x_TD: Tensor, *_: Tensor) -> Tensor:
        return torch.zeros_like(x_TD)


def test_a_large_vocabulary_makes_small_batches() -> None:
    held_out = HeldOut("x", [], [], 512)

    assert held_out.batch_size(4096) == 8
    assert held_out.batch_size(102_400) == 2
    assert held_out.batch_size(LOGITS_AT_ONCE) == 1
