"""Students in the formats of quantisers: what is stored, what it stands for, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from students import student_of
from torch import Tensor

import moefuse
from moefuse import corpus
from moefuse.artifacts import read_json
from moefuse.checkpoint.formats.compressed_tensors import FORMAT
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.config import QuantizeConfig, build
from moefuse.distillation.predictions import SEQUENCES
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_tokenizer
from moefuse.export.quantized.compressed import LAYOUTS, packed
from moefuse.export.quantized.layers import chosen
from moefuse.export.quantized.result import QuantizeResult, render_quantized
from moefuse.export.student_reader import StudentReader
from moefuse.mathematics.divergence import forward_kl
from moefuse.mathematics.integers import Grid, nearest, with_feedback
from moefuse.mathematics.lowrank import expected_error
from moefuse.modeling.modeling_moefuse import FACTORS, CodedLowRankDelta
from moefuse.planning import plan_checkpoint
from moefuse.quantize import quantize

Make = Callable[[str], Path]
BASE = "model.layers.1.mlp.experts.bases.0.gate_up_proj"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    student_of(folder, "deepseek_v2", groups=3, rank=2).rename(folder / "student")
    return folder


def settings(home: Path, scheme: str, **more: Any) -> dict[str, Any]:
    group = {"group_size": 16} if LAYOUTS[scheme].grouped else {}
    text = {"data": str(home / "text.txt"), "tokens": 512, "sequence_length": 64, "steps": 3}
    return {"scheme": scheme, **group, **text, **more}


@pytest.mark.parametrize("scheme", sorted(LAYOUTS.keys() - {"awq"}))
def test_stored_numbers_stand_for_the_bases(home: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"

    result = quantize(home / "student", out, settings(home, scheme))

    tensors, config = load_file(out / "model.safetensors"), read_json(out / "config.json")
    plain = load_file(home / "student" / "model.safetensors")
    for name in [name for name in plain if ".bases." in name]:
        stem = name.removesuffix(".weight")
        parts = {k.removeprefix(stem): t for k, t in tensors.items() if k.startswith(stem + ".")}
        read = FORMAT.unpack(parts, config["quantization_config"], tuple(plain[name].shape))
        error = (read.float() - plain[name].float()).norm() / plain[name].float().norm()
        assert error < (0.2 if LAYOUTS[scheme].bits == 4 else 0.04), name
    assert result.base_bits > LAYOUTS[scheme].bits


def test_what_is_not_asked_for_stays(home: Path, tmp_path: Path) -> None:
    values = settings(home, "w8a8", refit=False, delta_bits="16")
    quantize(home / "student", tmp_path / "out", values)

    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(home / "student" / "model.safetensors").items():
        if ".bases." not in name:
            assert torch.equal(made[name], tensor), name


def with_factors(tensors: dict[str, Tensor], student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a quantised student's tensors with deltas' factors, by the student's names."""
    told = {name: t for name, t in tensors.items() if ".delta." not in name}
    for stem in {name.rpartition(".")[0] for name in student if ".delta." in name}:
        parts = {n.removeprefix(f"{stem}."): t for n, t in tensors.items() if n.startswith(stem)}
        experts, rank, hidden = student[f"{stem}.gate_up_a"].shape
        entries, _ = parts["gate_up_in.codebook"].shape
        per_code = parts["gate_up_in.codebook"].shape[1]
        bits = str((entries - 1).bit_length() // per_code)
        width = student[f"{stem}.down_a"].shape[2]
        delta = CodedLowRankDelta(experts, hidden, width, rank, bits=bits).to(torch.bfloat16)
        delta.requires_grad_(False).load_state_dict(parts)
        for name in FACTORS:
            told[f"{stem}.{name}"] = getattr(delta, name)
    return told


@pytest.mark.parametrize(
    ("asked", "bits", "most"), [(None, 8, 0.015), ("8", 8, 0.015), ("4", 4, 0.2)]
)
def test_deltas_at_few_bits(
    home: Path, tmp_path: Path, asked: str | None, bits: int, most: float
) -> None:
    values = settings(home, "w4a16", refit=False, delta_bits=asked)

    result = quantize(home / "student", tmp_path / "out", values)

    assert result.delta_bits == str(bits)
    for words in told(result):
        assert f"Deltas take {bits} bits a number" in words
    config = read_json(tmp_path / "out" / "config.json")
    kinds = {layer["delta"] for layer in config["moefuse"]["layers"].values()}
    assert kinds == {f"low_rank_{bits}_bits"}
    student = load_file(home / "student" / "model.safetensors")
    made = load_file(tmp_path / "out" / "model.safetensors")
    codes = sum(t.numel() for n, t in made.items() if ".delta." in n and n.endswith(".codes"))
    factors = [name for name in student if ".delta." in name]
    assert codes == sum(student[name].numel() for name in factors) * bits // 8
    read = with_factors(made, student)
    for stem in {name[:-2] for name in factors}:
        wanted, got = (t[f"{stem}_b"].float() @ t[f"{stem}_a"].float() for t in (student, read))
        assert float((got - wanted).norm() / wanted.norm()) < most, stem


@pytest.mark.parametrize(("asked", "kind"), [(None, "low_rank"), ("16", "low_rank"), ("8", None)])
def test_students_without_deltas(
    home: Path, tmp_path: Path, asked: str | None, kind: str | None
) -> None:
    plain = student_of(tmp_path, "deepseek_v2", groups=3, rank=0)
    values = {"scheme": "w8a8", "delta_bits": asked}

    if kind is None:
        with pytest.raises(UserError, match="--delta-bits 8 is for deltas of low rank"):
            quantize(plain, tmp_path / "out", values)
        assert not (tmp_path / "out").exists()
        return
    result = quantize(plain, tmp_path / "out", values)

    assert result.delta_bits is None and "Deltas" not in " ".join(told(result))
    config = read_json(tmp_path / "out" / "config.json")
    assert {layer["delta"] for layer in config["moefuse"]["layers"].values()} == {kind}


def test_attention_and_shared_experts_by_choice(home: Path, tmp_path: Path) -> None:
    what = "bases,shared,attention,dense"

    quantize(home / "student", tmp_path / "out", settings(home, "w8a8", what=what))

    made = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("self_attn.o_proj", "mlp.shared_experts.up_proj"):
        assert made[f"model.layers.1.{part}.weight"].dtype == torch.int8
    assert made["model.layers.1.mlp.gate.weight"].is_floating_point()
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    assert BASE not in ignored


def test_feedback_beats_the_nearest_code() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(32, 64, generator=generator)
    x_NI = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    moment_II, grid = x_NI.T @ x_NI / 256, Grid(4, 32)

    plain = nearest(weight_OI, grid, torch.float32, search=True, energy_I=None).weight()
    fed_back = with_feedback(weight_OI, grid, torch.float32, moment_II).weight()

    errors = [expected_error(weight_OI - read, moment_II) for read in (plain, fed_back)]
    assert errors[1] < 0.7 * errors[0]


def test_packed_words_hold_codes_from_the_lowest_bits() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 2, 3, 4, 7]])

    word = packed(codes, 4).item() & 0xFFFFFFFF

    assert [(word >> (4 * place)) & 15 for place in range(8)] == [0, 1, 8, 9, 10, 11, 12, 15]


def test_every_base_sees_more_tokens_than_an_expert(home: Path, tmp_path: Path) -> None:
    seen = quantize(home / "student", tmp_path / "out", settings(home, "gptq")).seen

    assert seen is not None
    assert seen.base_median > seen.expert_median


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"scheme": "awq"}, "--data"),
        ({"scheme": "w4a16", "refit": True}, "--data"),
        ({"scheme": "w4a16", "prediction_steps": 3}, "--data"),
        ({"scheme": "w3"}, "choose from"),
        ({"scheme": "w4a16", "delta_bits": "5"}, "--delta-bits is '5'; choose from 16, 8, 4"),
        ({"scheme": "w4a16", "group_size": 16, "device": "disc"}, "--device is 'disc'"),
        ({"scheme": "gptq"}, "--data"),
        ({"scheme": "w4a16", "what": "router"}, "--what"),
        ({"scheme": "w4a16", "group_size": 128}, "--group-size"),
        ({"scheme": "w8a8", "group_size": 16}, "--group-size is for w4a16, gptq, awq,"),
        ({"scheme": "nf4", "group_size": 64}, "--group-size is for"),
        ({"scheme": "nf4"}, "Rows of 16 numbers are not whole blocks of 32"),
        ({"scheme": "gptq", "what": "attention", "data": "text"}, "--scheme gptq .* add bases"),
        (
            {"scheme": "w8a8", "what": "dense", "refit": True, "data": "text"},
            "--refit .*add bases",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    home: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        quantize(home / "student", tmp_path / "out", values)
    assert not (tmp_path / "out").exists()


def test_a_quantised_student_is_not_rounded_twice(home: Path, tmp_path: Path) -> None:
    quantize(home / "student", tmp_path / "once", {"scheme": "w8a8"})

    with pytest.raises(UserError, match=r"is quantised already \(compressed-tensors\)"):
        quantize(tmp_path / "once", tmp_path / "twice", {"scheme": "w8a16"})


def test_kinds_of_layers_that_a_student_lacks_are_refused() -> None:
    kinds: dict[str, str | None] = {"a": "bases", "b": "attention", "lm_head": None}

    assert chosen(kinds, "attention, bases") == ["a", "b"]
    with pytest.raises(UserError, match=r"'shared', of which .* it has bases, attention"):
        chosen(kinds, "bases,shared")


def test_bases_alone_have_nothing_to_learn(home: Path, tmp_path: Path) -> None:
    bare = student_of(home, "deepseek_v2", groups=3, rank=0, scale=False, bias=False)

    with pytest.raises(UserError, match="this student has none"):
        quantize(bare, tmp_path / "out", settings(home, "w4a16", prediction_steps=1))
    with pytest.raises(UserError, match="--refit has nothing to teach"):
        quantize(bare, tmp_path / "out", settings(home, "fp8", refit=True))
    result = quantize(bare, tmp_path / "out", settings(home, "w4a16"))
    assert result.refit is not None
    assert result.refit.learnt == "which way each number is rounded"


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        ("w8a16", "bases"),
        ("w8a8", "bases,attention,dense"),
        ("w4a16", "shared,bases"),
        ("w8a16", "attention"),
    ],
)
def test_the_card_tells_the_true_bits(home: Path, tmp_path: Path, scheme: str, what: str) -> None:
    result = quantize(home / "student", tmp_path / "out", settings(home, scheme, what=what))

    files = load_file(tmp_path / "out" / "model.safetensors")
    routed = [t for name, t in files.items() if ".experts." in name and "shared" not in name]
    reader = StudentReader.of(home / "student")
    numbers = sum(t.numel for n, t in reader.tensors.items() if ".mlp.experts." in n)
    taken = 8 * sum(t.nbytes for t in routed)
    assert result.bits == pytest.approx(taken / numbers)
    assert f"{result.bits:.2f} bits" in (tmp_path / "out" / "README.md").read_text()
    teacher = CheckpointReader.open(home / "deepseek_v2-teacher")
    whole = [t.numel for n, t in teacher.tensors.items() if ".mlp.experts." in n]
    assert result.teacher_bits == pytest.approx(taken / sum(whole))
    kept = load_file(home / "student" / "model.safetensors")
    stems = {n.rpartition(".")[0] for n in files if n.endswith("weight_scale")}
    rounded = sum(t.nbytes for n, t in files.items() if n.rpartition(".")[0] in stems)
    assert result.base_bits == pytest.approx(
        8 * rounded / sum(kept[f"{stem}.weight"].numel() for stem in stems)
    )


# What the card and the last words say of learning.


def told(result: QuantizeResult) -> tuple[str, str]:
    """Return the card, on one line, and what is printed at the end."""
    card = (result.out / "README.md").read_text().partition("## Loading")[0]
    return " ".join(card.split()), " ".join(render_quantized(result).split())


def test_what_was_learnt_is_told(home: Path, tmp_path: Path) -> None:
    values = settings(home, "w4a16", prediction_steps=2)
    result = quantize(home / "student", tmp_path / "out", values)

    assert result.refit is not None and result.predictions is not None
    layers = len(StudentReader.of(home / "student").shape.layers)
    assert (result.refit.steps, result.refit.layers, result.tokens) == (3, layers, 512)
    for words in told(result):
        assert "learnt for 3 steps to return on the text what it returned" in words
        assert "deltas and scales, and which way each number is rounded" in words
        assert f"from {result.refit.before:.5f} to {result.refit.after:.5f}" in words
        assert (
            "deltas and scales and the codes of bases and their scales learnt to predict" in words
        )
        assert f"from {result.predictions.before:.5f} to {result.predictions.after:.5f}" in words
        assert "512 tokens" in words
    assert "Errors of bases were weighed on it." in told(result)[0]


@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_on_a_cpu_the_same_call_writes_the_same_bytes(
    home: Path, tmp_path: Path, bits: str
) -> None:
    values = settings(home, "w4a16", prediction_steps=2, delta_bits=bits, device="cpu")

    files = [
        quantize(home / "student", tmp_path / name, values).out / "model.safetensors"
        for name in ("once", "again")
    ]

    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_learning_did_not_gain_is_told(home: Path, tmp_path: Path) -> None:
    values = settings(home, "w8a8", refit=True, prediction_steps=1)
    result = quantize(home / "student", tmp_path / "out", values)

    assert result.refit is not None and result.predictions is not None
    worse = replace(
        result,
        refit=replace(result.refit, improved=0, layers=2),
        predictions=replace(result.predictions, before=0.1, after=0.2),
    )
    printed = " ".join(render_quantized(worse).split())
    assert "2 of these layers did not improve and stayed as they were rounded" in printed
    assert "sequences of the text that they learnt from, no gain by this measure" in printed


@pytest.mark.parametrize(
    ("scheme", "values", "use"),
    [
        ("w4a16", {"refit": False}, "Errors of bases were weighed on it."),
        ("gptq", {"refit": False}, "Errors of bases were weighed on it, by GPTQ."),
        ("w4a16", {"refit": False, "scales": "widest"}, "It was of no use"),
        ("w8a8", {}, "Errors of bases were weighed on it."),
        ("fp8", {}, "It was of no use"),
        ("w8a8", {"what": "attention"}, "It was of no use"),
        (
            "w8a8",
            {"what": "bases,attention"},
            "Errors of bases were weighed on it; rounded without it: attention.",
        ),
    ],
)
def test_what_was_not_learnt_is_not_told(
    home: Path, tmp_path: Path, scheme: str, values: dict[str, Any], use: str
) -> None:
    result = quantize(home / "student", tmp_path / "out", settings(home, scheme, **values))

    card, printed = told(result)
    for words in (card, printed):
        assert "Nothing was learnt after rounding." in words
        assert "512 tokens" in words
        assert ("It was of no use" in words) == ("no use" in use)
    assert use in card


def test_without_text_none_is_told(home: Path, tmp_path: Path) -> None:
    result = quantize(home / "student", tmp_path / "out", {"scheme": "w4a16", "group_size": 16})

    for words in told(result):
        assert "tokens" not in words
        assert "Nothing was learnt after rounding." in words


def test_predictions_leave_bases_that_were_not_rounded(home: Path, tmp_path: Path) -> None:
    values = settings(home, "w8a8", what="attention", prediction_steps=5, delta_bits="16")

    result = quantize(home / "student", tmp_path / "out", values)

    made = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(home / "student" / "model.safetensors")
    assert all(torch.equal(made[name], t) for name, t in before.items() if ".bases." in name)
    assert any(not torch.equal(made[n], t) for n, t in before.items() if ".experts.delta." in n)
    assert result.refit is None and result.seen is None


def test_a_work_directory_that_is_not_its_own_is_refused_and_left(
    home: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "out.work" / "calibration" / "layer.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"of 'moefuse fuse'")

    with pytest.raises(UserError, match="is none of moefuse's files"):
        quantize(home / "student", tmp_path / "out", settings(home, "w4a16"))

    assert kept.read_bytes() == b"of 'moefuse fuse'"


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [*((scheme, None) for scheme in sorted(LAYOUTS)), ("fp8", "16"), ("fp8", "4")],
)
def test_a_plan_counts_what_is_then_on_disk(
    home: Path, tmp_path: Path, scheme: str, bits: str | None
) -> None:
    more = {"delta_bits": bits, **({"group_size": 16} if LAYOUTS[scheme].grouped else {})}
    wish = {"groups": 3, "rank": 2, "scheme": scheme, **more}
    planned = plan_checkpoint(home / "deepseek_v2-teacher", wish).plan
    assert planned is not None

    quantize(home / "student", tmp_path / "out", settings(home, scheme, delta_bits=bits))

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert planned.bytes == sum(tensor.nbytes for tensor in stored.values())
    file = tmp_path / "out" / "model.safetensors"
    with file.open("rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
    assert planned.bytes == file.stat().st_size - header


def test_a_budget_goes_further_with_fewer_bits(home: Path) -> None:
    teacher = home / "deepseek_v2-teacher"
    plain = plan_checkpoint(teacher, {"groups": 2, "rank": 1}).plan
    assert plain is not None
    budget = {"bytes": str(plain.bytes), "groups": 2}

    packed = plan_checkpoint(teacher, {**budget, "scheme": "w4a16", "group_size": 16})

    assert packed.plan is not None
    assert packed.plan.bytes <= plain.bytes
    assert packed.plan.layers[1].rank > 1
    assert packed.to_json()["scheme"] == "w4a16"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"groups": 2, "scheme": "nf4"}, "plan with one of"),
        ({"groups": 2, "scheme": "w3"}, "choose from"),
        ({"bytes": "1MB", "form": "neurons", "scheme": "w8a16"}, "--form neurons"),
        ({"groups": 2, "group_size": 32}, "--scheme"),
        ({"groups": 2, "delta_bits": "8"}, "--delta-bits is for a --scheme"),
        ({"groups": 2, "scheme": "w4a16", "group_size": 128}, "--group-size"),
        ({"groups": 2, "scheme": "w8a16", "group_size": 16}, "--group-size is for"),
    ],
)
def test_plans_by_schemes_that_cannot_be(home: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan_checkpoint(home / "deepseek_v2-teacher", values)


def test_deltas_learn_what_the_student_predicted(home: Path, tmp_path: Path) -> None:
    asked = settings(home, "w4a16", refit=False)
    quantize(home / "student", tmp_path / "plain", asked)
    result = quantize(home / "student", tmp_path / "taught", {**asked, "prediction_steps": 80})

    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("plain", "taught")}
    student = load_file(home / "student" / "model.safetensors")
    changed = {n for n, t in found["plain"].items() if not torch.equal(t, found["taught"][n])}
    kinds = (".experts.delta.", ".experts.scale", ".weight_packed", ".weight_scale")
    assert all(any(kind in n for n in changed) for kind in kinds)
    assert all(any(kind in n for kind in kinds) for n in changed)

    ids = load_tokenizer(home / "student")((home / "text.txt").read_text())["input_ids"][:256]
    ids = torch.tensor([ids])
    before = moefuse.load(home / "student", dtype="float32")
    options = build(QuantizeConfig, asked)
    batches = corpus.read_batches(
        str(options.data),
        load_tokenizer(home / "student"),
        sequence_length=options.sequence_length,
        tokens=options.tokens,
        batch_size=options.batch_size,
        vocabulary=before.config.vocab_size,
        source="student",
    )
    learnt_from = torch.cat([ids for ids, _ in batches])[:SEQUENCES]
    with torch.no_grad():
        wanted_SV = before(ids).logits[0]
        wanted_BSV = before(learnt_from).logits
        errors, measured = [], []
        for tensors in found.values():
            after = moefuse.load(home / "student", dtype="float32")
            config = read_json(tmp_path / "plain" / "config.json")["quantization_config"]
            told = with_factors(tensors, student)
            own = {name: t for name, t in told.items() if name in student}
            for name in student.keys() - own.keys():
                stem = name.removesuffix(".weight")
                parts = {
                    k.removeprefix(stem): t for k, t in tensors.items() if k.startswith(stem + ".")
                }
                own[name] = FORMAT.unpack(parts, config, tuple(student[name].shape))
            after.load_state_dict(own, strict=False)
            errors.append(float(forward_kl(wanted_SV, after(ids).logits[0]).mean()))
            got_BSV = after(learnt_from).logits
            measured.append(float(forward_kl(wanted_BSV, got_BSV).mean()))
    assert result.predictions is not None
    assert [result.predictions.before, result.predictions.after] == pytest.approx(
        measured, rel=1e-2
    )
    assert errors[1] < 0.8 * errors[0]
