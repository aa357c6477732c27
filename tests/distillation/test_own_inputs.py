"""What a layer receives above the students of lower layers: against hooks in the whole model."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import SMALL, changes, contents, run_elsewhere, write_text
from tiny import save_tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefuse.checkpoint.passed import OnDisk
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.distillation.own_inputs import CORRECTED, InMemory, OwnInputs
from moefuse.families import all_families
from moefuse.mathematics.experts import ExpertsCall

FAMILIES = sorted(all_families())
LENGTHS = ((9, 7, 2), (16, 16), (5, 12, 1))
Batch = tuple[Tensor, Tensor]


def padded() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for lengths in LENGTHS:
        mask_BS = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids_BS = torch.randint(2, 64, mask_BS.shape, generator=generator) * mask_BS
        batches.append((ids_BS, mask_BS))
    return batches


class Weakened(nn.Module):
    """A student: the teacher's own experts, all they return times a factor."""

    def __init__(self, experts: nn.Module, factor: float) -> None:
        super().__init__()
        self.experts, self.factor = experts, factor

    def forward(self, *given: Tensor) -> Tensor:
        return self.factor * self.experts(*given)


class Case:
    """A tiny teacher, whole and streamed."""

    def __init__(self, path: Path, family: str) -> None:
        self.whole: PreTrainedModel = save_tiny(path, family)
        self.teacher = StreamedTeacher(
            CheckpointReader.open(path), device="cpu", dtype=torch.float32
        )
        self.layers = list(self.teacher.reader.shape.layers)

    def block(self, model: nn.Module, layer: int) -> Any:
        return model.get_submodule(self.teacher.reader.family.moe_path(layer))

    def experts(self, layer: int) -> nn.Module:
        return self.block(self.whole, layer).experts

    @torch.no_grad()
    def heard(
        self, layer: int, factors: dict[int, float]
    ) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
        """Run the whole model with lower layers weakened; what layer's experts are called with and
        return, and what leaves their decoder layer, a batch each."""
        natives = {lower: self.experts(lower) for lower in factors}
        for lower, factor in factors.items():
            self.block(self.whole, lower).experts = Weakened(natives[lower], factor)
        calls: list[tuple[Tensor, ...]] = []
        left: list[Tensor] = []
        decoder: Any = self.whole.base_model.layers[layer]  # type: ignore[index]
        handles = [
            self.experts(layer).register_forward_hook(
                lambda _, given, y: calls.append((*given[:3], y))
            ),
            decoder.register_forward_hook(
                lambda _, __, out: left.append(out[0] if isinstance(out, tuple) else out)
            ),
        ]
        for ids_BS, mask_BS in padded():
            self.whole(ids_BS, attention_mask=mask_BS)
        for handle in handles:
            handle.remove()
        for lower, native in natives.items():
            self.block(self.whole, lower).experts = native
        return calls, left


def kept(tensors: list[Tensor]) -> Tensor:
    """Return the rows of the text's tokens."""
    masks = [mask_BS.reshape(-1).bool() for _, mask_BS in padded()]
    flat = [t.reshape(len(m), -1)[m] for t, m in zip(tensors, masks, strict=True)]
    return torch.cat(flat)


@pytest.fixture(params=FAMILIES)
def case(request: Any, tmp_path: Path) -> Case:
    return Case(tmp_path / "teacher", request.param)


def test_students_that_are_the_teacher_stay_on_its_path(case: Case) -> None:
    own = OwnInputs(case.teacher, padded(), InMemory())
    for layer in case.layers:
        call = own.call(layer)
        calls, _ = case.heard(layer, {})
        assert_close(call.x_TD, kept([x for x, *_ in calls]))
        assert_close(call.y_TD, kept([y for *_, y in calls]))
        assert torch.equal(call.index_TK.long(), kept([index for _, index, *_ in calls]).long())
        own.take(case.experts(layer))


def test_inputs_and_targets_are_those_of_the_whole_model(case: Case) -> None:
    own, factors = OwnInputs(case.teacher, padded(), InMemory()), {}
    for number, layer in enumerate(case.layers):
        call = own.call(layer)
        calls, strayed = case.heard(layer, factors)
        _, right = case.heard(layer, {})
        assert_close(call.x_TD, kept([x for x, *_ in calls]))
        assert_close(call.weight_TK, kept([weight for _, _, weight, _ in calls]))
        scale = case.teacher.reader.family.experts_scale(case.teacher.reader.config)
        missing_TD = (kept(right) - kept(strayed)) / scale
        wanted_TD = kept([y for *_, y in calls]) + CORRECTED * missing_TD
        assert_close(call.y_TD, wanted_TD)
        factors[layer] = 0.25 * number
        own.take(Weakened(case.experts(layer), factors[layer]))
    # The students do something, or nothing was tested.
    assert not torch.allclose(kept(right), kept(strayed), atol=1e-3)


def followed(case: Case, passed: InMemory | OnDisk) -> list[ExpertsCall]:
    own, calls = OwnInputs(case.teacher, padded(), passed), []
    for layer in case.layers:
        if layer >= passed.layer:
            calls.append(own.call(layer))
            own.take(Weakened(case.experts(layer), 0.5))
    return calls


def same(one: ExpertsCall, other: ExpertsCall) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_on_disk_and_in_memory_are_the_same_and_go_on(tmp_path: Path) -> None:
    case = Case(tmp_path / "teacher", "olmoe")
    in_memory = followed(case, InMemory())
    place = tmp_path / "passed"
    whole = followed(case, OnDisk(place))
    assert all(map(same, in_memory, whole))
    shutil.rmtree(place)

    first = OwnInputs(case.teacher, padded(), OnDisk(place))
    first.call(case.layers[0])
    first.take(Weakened(case.experts(case.layers[0]), 0.5))
    first.call(case.layers[1])  # interrupted before a student was made
    again = OnDisk(place)
    assert again.layer == case.layers[1]
    assert all(map(same, in_memory[1:], followed(case, again)))

    again.restart()
    assert (again.layer, place.exists()) == (0, False)


def test_killed_while_distilling_in_order(tmp_path: Path) -> None:
    """At instants spread over all that the stage does to files, the same command goes on."""
    save_tiny(tmp_path / "teacher", dtype=torch.bfloat16)
    data = write_text(tmp_path / "text.txt")

    def fuse(folder: Path, die_at: int | None = None) -> int:
        folder.mkdir(exist_ok=True)
        given = ("--expert-bits", "4", "--inputs", "student", *SMALL, "--data", data)
        command = ("fuse", tmp_path / "teacher", folder / "student", *given)
        return run_elsewhere(folder / "log", *command, die_at=die_at)

    whole = tmp_path / "whole"
    assert fuse(whole) == 0, (whole / "log").read_text()
    done = [path for _, path in changes(whole / "log")]
    instants = [at for at, path in enumerate(done, start=1) if "distilled-" in path]
    assert any("passed" in done[at - 1] for at in instants)
    for at in instants[:: max(1, len(instants) // 6)]:
        folder = tmp_path / str(at)
        assert fuse(folder, die_at=at) != 0
        assert fuse(folder) == 0, (at, (folder / "log").read_text())
        assert contents(folder / "student") == contents(whole / "student")
        assert not (folder / "student.work").exists()
