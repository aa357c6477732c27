"""The student as people use it: loaded, generated with, saved, compiled, trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from one_student import YARN, Stranger, Students
from safetensors.torch import load_file
from strangers import IDS_BS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse.errors import UserError
from moefuse.modeling import TRAVELLING_FILE, FusedExperts, load_fused

NEW = 9


@pytest.fixture(scope="module")
def student(students: Students) -> PreTrainedModel:
    return load_fused(students.student).eval()


@pytest.fixture
def trainee(students: Students) -> PreTrainedModel:
    return load_fused(students.student)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


# Where moefuse is not installed.


def test_the_stranger_truly_has_no_moefuse(stranger: Stranger) -> None:
    assert stranger.facts["import moefuse"] == "ModuleNotFoundError: No module named 'moefuse'"
    assert stranger.facts["moefuse modules"] == []


def test_the_student_loads_without_moefuse(stranger: Stranger) -> None:
    assert stranger.facts["config"] == {
        "class": "MoefuseDeepseekV2Config",
        "model_type": "moefuse_deepseek_v2",
    }
    for name, cls in (
        ("base", "MoefuseDeepseekV2Model"),
        ("causal", "MoefuseDeepseekV2ForCausalLM"),
    ):
        assert stranger.facts[name] == {
            "class": cls,
            "from": "transformers_modules",
            "fused": ["transformers_modules"] * 2,
            "dtype": "torch.float32",
            "training": False,
        }
    assert stranger.facts["found"] == {}, "no weight is missing, unexpected or of another shape"


@torch.no_grad()
def test_without_moefuse_it_computes_the_same_bits(
    stranger: Stranger, student: PreTrainedModel
) -> None:
    assert torch.equal(stranger.tensors["logits"], student(IDS_BS).logits)
    hidden_BSD = student.base_model(IDS_BS).last_hidden_state
    assert torch.equal(stranger.tensors["hidden"], hidden_BSD)


@torch.no_grad()
def test_without_moefuse_it_computes_the_same_bits_in_bf16(
    stranger: Stranger, students: Students
) -> None:
    model = load_fused(students.student, dtype=torch.bfloat16)
    logits_BSV = model(IDS_BS).logits

    assert logits_BSV.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(stranger.tensors["logits, bf16"], logits_BSV)


def test_without_moefuse_it_generates_the_same(
    stranger: Stranger, student: PreTrainedModel
) -> None:
    greedy = student.generate(IDS_BS, max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    beams = student.generate(  # type: ignore[operator]
        IDS_BS, max_new_tokens=NEW, num_beams=3, do_sample=False
    )

    assert torch.equal(stranger.tensors["greedy"], greedy)
    assert torch.equal(stranger.tensors["beams"], beams)


def test_without_consent_it_is_refused(stranger: Stranger) -> None:
    refusals = stranger.facts["refusals"]

    assert len(refusals) == 6
    for told in refusals.values():
        assert told is not None and "trust_remote_code=True" in told


def test_without_consent_the_tokenizer_loads(stranger: Stranger) -> None:
    """It runs no code of the checkpoint's."""
    assert stranger.facts["tokenizer"] is None


# Saving.


@pytest.mark.parametrize("name", ["saved", "saved again"])
def test_saved_again_it_computes_the_same_bits_without_moefuse(
    stranger: Stranger, name: str
) -> None:
    """``saved``: by the remote-code class; ``saved again``: by moefuse's own."""
    assert torch.equal(stranger.tensors[f"logits, {name}"], stranger.tensors["logits"])
    assert torch.equal(stranger.tensors[f"hidden, {name}"], stranger.tensors["hidden"])


def test_saved_again_it_holds_the_same_weights_and_code(
    stranger: Stranger, students: Students
) -> None:
    original = tensors_of(students.student)
    for directory in (stranger.saved, students.saved_again):
        saved = tensors_of(directory)
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[name], original[name]) for name in original)
        assert (directory / TRAVELLING_FILE.name).read_bytes() == TRAVELLING_FILE.read_bytes()
        config, first = (
            json.loads((d / "config.json").read_text()) for d in (directory, students.student)
        )
        for key in ("auto_map", "architectures", "model_type", "moefuse", "dtype"):
            assert config[key] == first[key]


@torch.no_grad()
def test_what_was_saved_again_moefuse_loads(
    stranger: Stranger, students: Students, student: PreTrainedModel
) -> None:
    for directory in (stranger.saved, students.saved_again):
        assert torch.equal(load_fused(directory)(IDS_BS).logits, student(IDS_BS).logits)


# Generating.


def generated(model: PreTrainedModel, ids_BS: Tensor, **options: Any) -> Tensor:
    """Return ``NEW`` new tokens for every row."""
    fixed = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids_BS, **{**fixed, **options})[:, ids_BS.shape[1] :]  # type: ignore[operator, index]


@torch.no_grad()
def test_a_cache_changes_no_logits(student: PreTrainedModel) -> None:
    whole = student(IDS_BS).logits
    step = student(IDS_BS[:, :4], use_cache=True)
    parts, cache = [step.logits], step.past_key_values
    for at in range(4, IDS_BS.shape[1]):
        step = student(IDS_BS[:, at : at + 1], past_key_values=cache, use_cache=True)
        parts.append(step.logits)

    assert cache.get_seq_length() == IDS_BS.shape[1]
    assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_equals_generating_without(
    student: PreTrainedModel, beams: int
) -> None:
    cached = generated(student, IDS_BS, num_beams=beams, use_cache=True)
    uncached = generated(student, IDS_BS, num_beams=beams, use_cache=False)

    assert cached.shape == (2, NEW)
    assert torch.equal(cached, uncached)


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return ids (B, S) and mask (B, S); what fills a row is a token that must not matter."""
    length = max(len(row) for row in rows)
    ids_BS = torch.full((len(rows), length), 5)
    mask_BS = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids_BS[number, at], mask_BS[number, at] = row, 1
    return ids_BS, mask_BS


ROWS = [IDS_BS[0], IDS_BS[1, :4], IDS_BS[0, 5:6]]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(student: PreTrainedModel, side: str) -> None:
    ids_BS, mask_BS = padded(ROWS, side)
    positions_BS = (mask_BS.cumsum(1) - 1).clamp_min(0)

    together = student(ids_BS, attention_mask=mask_BS, position_ids=positions_BS).logits

    for number, row in enumerate(ROWS):
        alone = student(row[None]).logits[0]
        assert_close(together[number][mask_BS[number].bool()], alone)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_left_padded_batch_generates_what_its_rows_do(
    student: PreTrainedModel, beams: int
) -> None:
    ids_BS, mask_BS = padded(ROWS, "left")

    together = generated(student, ids_BS, attention_mask=mask_BS, num_beams=beams)

    alone = [generated(student, row[None], num_beams=beams) for row in ROWS]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


# Compiling and training.


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_compiled_equals_eager(student: PreTrainedModel) -> None:
    """By the backend that needs no compiler; inductor adds code generation, which is torch's."""
    compiled = torch.compile(student.forward, backend="aot_eager")

    assert_close(compiled(IDS_BS, use_cache=False).logits, student(IDS_BS).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def loss_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(IDS_BS, labels=IDS_BS, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_training_mode_gives_the_gradients_of_evaluation_mode(trainee: PreTrainedModel) -> None:
    trainee.eval()
    evaluating = loss_gradients(trainee)
    trainee.train()
    training = loss_gradients(trainee)

    assert evaluating.keys() == training.keys()
    assert {n for n, _ in trainee.named_parameters()} == training.keys()
    assert all(torch.equal(training[name], evaluating[name]) for name in training)
    assert sum(bool(gradient.any()) for n, gradient in training.items() if ".delta." in n) == 8


def test_gradient_checkpointing_gives_the_same_gradients(trainee: PreTrainedModel) -> None:
    trainee.train()
    plain = loss_gradients(trainee)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    modules = [module for module in trainee.modules() if isinstance(module, FusedExperts)]
    modules[0].register_forward_hook(count)
    trainee.gradient_checkpointing_enable()
    checkpointed = loss_gradients(trainee)

    assert calls == 2, "the layer ran again in the backward pass"
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


# What of the teacher survives.


def test_the_teachers_positions_survive(students: Students, student: PreTrainedModel) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(students.teacher)
    theirs, ours = teacher.model.rotary_emb, student.model.rotary_emb  # type: ignore[union-attr]

    assert student.config.max_position_embeddings == 128
    assert student.config.rope_parameters == teacher.config.rope_parameters
    assert student.config.rope_parameters["factor"] == YARN["factor"]
    buffers = dict(theirs.named_buffers())
    assert "inv_freq" in buffers
    for name, buffer in ours.named_buffers():  # type: ignore[operator]
        assert torch.equal(buffer, buffers.pop(name))
    assert not buffers
    assert ours.attention_scaling == theirs.attention_scaling
    width = student.config.qk_rope_head_dim
    unscaled = 10000.0 ** -(torch.arange(0, width, 2) / width)
    assert not torch.allclose(theirs.inv_freq, unscaled), "YaRN must matter for this test"


def test_everything_outside_the_experts_is_the_teachers(students: Students) -> None:
    teacher = {n: t for n, t in tensors_of(students.teacher).items() if ".experts." not in n}
    student = {n: t for n, t in tensors_of(students.student).items() if ".experts." not in n}

    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)


def test_what_is_no_student_is_told(students: Students, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no moefuse block"):
        load_fused(students.teacher)
    with pytest.raises(UserError, match="not a fused checkpoint"):
        load_fused(tmp_path)
