"""Quantised checkpoints: each format against its own library or definition, and through fusing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from quantized import FORMATS, FP8_SETTINGS, GROUP, in_gptq, quantize
from running import write_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moefuse.checkpoint.formats import all_formats, as_plain, format_of
from moefuse.checkpoint.formats.base import Format
from moefuse.checkpoint.inspection import inspect_checkpoint
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model
from moefuse.heal import heal
from moefuse.healing.teach import teach
from moefuse.pipeline import fuse
from moefuse.planning import plan_checkpoint

Tiny = Callable[..., Path]
TWINS = ("plain", "packed")
REFERENCES = Path(__file__).with_name("data") / "compressed_tensors.safetensors"
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def the(config: dict[str, Any]) -> Format:
    found = format_of(config)
    assert found is not None
    return found


def unpacked(settings: dict[str, Any], stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the one weight that is stored under ``layer.``, by its headers and its parts."""
    config = {"quantization_config": settings, "dtype": "float32"}
    headers = {
        f"layer{end}": TensorInfo(f"layer{end}", DTYPES[t.dtype], tuple(t.shape), "one")
        for end, t in stored.items()
    }
    ((_, info),) = as_plain("here", config, headers).items()
    weight = the(config).unpack(stored, settings, info.shape)
    assert tuple(weight.shape) == info.shape
    return weight


def references() -> dict[str, dict[str, Any]]:
    with safe_open(REFERENCES, framework="pt") as file:
        return json.loads(file.metadata()["settings"])


@pytest.mark.parametrize("case", sorted(references()))
def test_compressed_tensors_are_what_their_own_library_reads(case: str) -> None:
    tensors = {
        n.removeprefix(f"{case}/"): t for n, t in load_file(REFERENCES).items() if f"{case}/" in n
    }
    plain = tensors.pop("plain")

    weight = unpacked(references()[case], {f".{name}": t for name, t in tensors.items()})

    assert torch.equal(weight, plain)


@pytest.mark.parametrize("shape", [(32, 16), (40, 24), (3, 50)])
def test_fp8_is_what_transformers_reads(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored, plain = FORMATS["fp8"][1](weight)

    assert torch.equal(unpacked(FP8_SETTINGS, stored), plain)
    if all(size % block == 0 for size, block in zip(shape, (16, 8), strict=True)):
        theirs = Fp8Dequantize(None)._dequantize_one(stored[".weight"], stored[".weight_scale_inv"])
        assert torch.equal(theirs.float(), plain.to(theirs.dtype).float())


def test_mxfp4_is_what_transformers_reads() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8, generator=generator)

    weight = unpacked({"quant_method": "mxfp4"}, {"_blocks": blocks, "_scales": scales})

    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_of_all_widths_and_versions(bits: int, version: int) -> None:
    weight = torch.randn(32, 3 * GROUP + 8, generator=torch.Generator().manual_seed(bits))
    stored, plain = in_gptq(weight, bits=bits, version=version)
    settings = {"quant_method": "gptq", "bits": bits}
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"

    assert torch.equal(unpacked(settings, stored), plain)


def test_gptq_in_groups_that_do_not_come_out_even() -> None:
    """40 columns in groups of 16: the last is half a group, and no ``g_idx`` says so."""
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    stored, plain = in_gptq(weight, group_I=[at // 16 for at in range(40)])
    del stored[".g_idx"]

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    assert torch.equal(unpacked(settings, stored), plain)


def test_fp8_with_scales_that_are_powers_of_two() -> None:
    """Newer checkpoints store scales as exponents alone (e8m0)."""
    stored = {
        ".weight": torch.tensor([[1.5, -448.0], [0.25, 2.0]]).to(torch.float8_e4m3fn),
        ".weight_scale_inv": torch.tensor([[0.5, 4.0]]).to(torch.float8_e8m0fnu),
    }
    settings = {"quant_method": "fp8", "weight_block_size": [2, 1]}

    assert unpacked(settings, stored).tolist() == [[0.75, -1792.0], [0.125, 8.0]]


@pytest.mark.parametrize("block", [[16, 8], "16x8"])
def test_compressed_tensors_in_blocks_however_they_are_written(block: Any) -> None:
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    stored, plain = FORMATS["fp8"][1](weight)
    stored[".weight_scale"] = stored.pop(".weight_scale_inv")
    settings = _eight_bits(strategy="block", block_structure=block)

    assert torch.equal(unpacked(settings, stored), plain)


def test_compressed_tensors_in_groups_of_several_widths() -> None:
    """Which of the settings a weight belongs to is told by its scales."""
    kinds = {str(size): {"weights": {"num_bits": 4, "group_size": size}} for size in (8, 16)}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": kinds,
    }
    for groups in (3, 5):  # of 40 columns; the third group of 16 is half a one
        stored = {
            ".weight_packed": torch.full((8, 5), 0x11111111, dtype=torch.int32),
            ".weight_scale": torch.arange(1.0, groups + 1).expand(8, groups).contiguous(),
            ".weight_shape": torch.tensor([8, 40]),
        }
        size = {3: 16, 5: 8}[groups]
        expected = -7.0 * torch.arange(1.0, groups + 1).repeat_interleave(size)[:40]
        assert torch.equal(unpacked(settings, stored), expected.expand(8, 40))


def _eight_bits(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


# A whole checkpoint.


@pytest.fixture
def twins(tiny_checkpoint: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``twins(format, model_type)`` are a plain checkpoint and the quantised one it came from."""

    def made(name: str, model_type: str = "deepseek_v2") -> tuple[Path, Path]:
        plain, quantized = tiny_checkpoint(model_type), tmp_path / "quantized"
        quantize(plain, quantized, name)
        return plain, quantized

    return made


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("model_type", ["deepseek_v2", "qwen3_moe"])
def test_read_as_the_plain_checkpoint(name: str, model_type: str, twins: Any) -> None:
    plain, quantized = (CheckpointReader.open(path) for path in twins(name, model_type))

    assert quantized.tensors.keys() == plain.tensors.keys()
    for tensor_name in plain.tensors:
        assert torch.equal(quantized.read(tensor_name), plain.read(tensor_name)), tensor_name
    for layer in plain.shape.layers:
        found, wanted = quantized.read_experts(layer)[:2], plain.read_experts(layer)[:2]
        assert all(map(torch.equal, found, wanted))
    quantized.check_finite()


@torch.no_grad()
def test_gpt_oss_in_mxfp4_is_fused_as_the_plain_one(tmp_path: Path) -> None:
    """As it is published: experts in MXFP4, all else, biases among them, in bf16."""
    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=32).bfloat16()
    generator = torch.Generator().manual_seed(0)
    state = dict(model.state_dict())
    for name, tensor in list(state.items()):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
            state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
            del state[name]
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "packed").mkdir()
    save_file(state, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(tmp_path / "packed").quantization == "mxfp4"
    plans = [plan_checkpoint(tmp_path / n, {"groups": 3, "rank": 2}).plan for n in TWINS]
    assert plans[0] is not None and plans[1] is not None
    assert plans[0].layers == plans[1].layers and plans[0].parameters == plans[1].parameters
    assert plans[1].teacher_bytes < plans[0].teacher_bytes / 2
    ids_BS = torch.randint(2, 64, (2, 23), generator=generator)

    data = str(write_text(tmp_path / "text.txt"))
    values = {"groups": 8, "rank": 0, "steps": 0, "tokens": 512, "data": data}
    logits = []
    for name in TWINS:
        tiny_tokenizer().save_pretrained(tmp_path / name)
        fuse(tmp_path / name, tmp_path / f"{name}-student", values)
        student, _ = load_model(tmp_path / f"{name}-student", dtype="float32")
        logits.append(student(ids_BS).logits)

    assert torch.equal(*logits)
    teacher, _ = load_model(tmp_path / "plain", dtype="float32")
    assert_close(logits[0], teacher(ids_BS).logits)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_inspected_with_its_true_bytes(name: str, twins: Any) -> None:
    plain, quantized = map(inspect_checkpoint, twins(name))

    assert quantized.quantization == name
    assert quantized.parameters == plain.parameters
    assert quantized.bytes < plain.bytes
    on_disk = sum(
        load.nbytes for load in load_file(Path(quantized.source) / "model.safetensors").values()
    )
    assert sum(part.bytes for part in quantized.parts) == on_disk
    assert quantized.quantized_bits is not None and 4 < quantized.quantized_bits < 16
    plan = plan_checkpoint(quantized.source, {"groups": 3, "rank": 2}).plan
    assert plan is not None and plan.teacher_bytes == quantized.bytes


@pytest.mark.parametrize("name", ["fp8", "gptq"])
def test_fused_to_the_same_student(name: str, twins: Any, tmp_path: Path) -> None:
    data = str(write_text(tmp_path / "text.txt"))
    values = {
        "groups": 3,
        "rank": 2,
        "steps": 2,
        "sensitivity_tokens": 0,
        "tokens": 512,
        "data": data,
    }
    students = []
    for path in twins(name):
        out = tmp_path / f"{path.name}-student"
        fuse(path, out, values)
        students.append(
            {n: t for shard in out.glob("*.safetensors") for n, t in load_file(shard).items()}
        )
        assert "quantization_config" not in json.loads((out / "config.json").read_text())

    assert students[0].keys() == students[1].keys()
    assert all(torch.equal(students[1][tensor], students[0][tensor]) for tensor in students[0])


def test_taught_and_healed_like_the_plain_one(twins: Any, tmp_path: Path) -> None:
    """What a teacher is read for after fusing: its predictions, streamed and whole."""
    data = str(write_text(tmp_path / "text.txt"))
    text = {"data": data, "tokens": "256", "sequence_length": 32, "batch_size": 4}
    made = []
    for path in twins("fp8"):
        student = tmp_path / "student"
        if not student.exists():
            fused = {"groups": 3, "rank": 2, "steps": 0, "tokens": 512, "data": data}
            fuse(path, student, {**fused, "sensitivity_tokens": 0})
        cache, healed = tmp_path / f"{path.name}-cache", tmp_path / f"{path.name}-healed"
        teach(path, cache, {**text, "top": 8, "tail": 4})
        heal(student, healed, text, teacher=path)
        made.append([cache / "wave-00000.safetensors", healed / "model.safetensors"])

    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_loaded_whole_it_is_the_plain_model(name: str, twins: Any) -> None:
    ids = torch.arange(10).view(2, 5)
    plain, quantized = (load_model(path)[0] for path in twins(name))

    assert torch.equal(quantized(ids).logits, plain(ids).logits)
    assert quantized.dtype == plain.dtype
    assert not hasattr(quantized.config, "quantization_config")


# What is refused.


def _edited(quantized: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    config = json.loads((quantized / "config.json").read_text())
    edit(config["quantization_config"])
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized


def _without(quantized: Path, end: str) -> Path:
    tensors = load_file(quantized / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(end))]
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
    return quantized


def test_an_unknown_format_is_refused_by_name(twins: Any) -> None:
    _, quantized = twins("gptq")
    _edited(quantized, lambda settings: settings.update(quant_method="hqq"))

    titles = ", ".join(known.title for known in all_formats())
    with pytest.raises(UserError, match=f"quantised with hqq, .* moefuse reads: {titles}"):
        CheckpointReader.open(quantized)
    with pytest.raises(UserError, match="quantised with hqq, "):
        plan_checkpoint(quantized, {"groups": 3, "rank": 2})
    assert inspect_checkpoint(quantized).quantized_bits is None


def test_numbers_of_an_unknown_format_are_not_taken_for_weights(twins: Any) -> None:
    """Transformers only warns of a method that it does not know, and loads what is stored."""
    _, quantized = twins("fp8")
    _edited(quantized, lambda settings: settings.update(quant_method="modelopt"))

    for read in (CheckpointReader.open, load_model):
        with pytest.raises(UserError, match=r"quantised with modelopt, .*fp8 in blocks"):
            read(quantized)


def test_a_name_is_known_where_the_stored_shapes_are_strange(twins: Any) -> None:
    """bitsandbytes keeps 4-bit weights as a column of bytes under the plain weight's name."""
    plain, _ = twins("fp8")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (plain / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match="quantised with bitsandbytes, "):
        CheckpointReader.open(plain)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("fp8", ".weight_scale_inv"),
        ("gptq", ".qzeros"),
        ("awq", ".scales"),
        ("compressed-tensors", ".weight_shape"),
    ],
)
def test_a_missing_part_is_told(name: str, end: str, twins: Any) -> None:
    _, quantized = twins(name)
    _without(quantized, end)

    with pytest.raises(UserError, match=f"but not .*{end}.*download the checkpoint again"):
        CheckpointReader.open(quantized)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8", {"weight_block_size": [16, 16]}, "where .* belongs to its weight"),
        ("fp8", {"weight_block_size": 128}, "two positive numbers"),
        ("gptq", {"bits": 3}, "has 3 under 'bits'"),
        ("gptq", {"bits": 8}, "where .* belongs to its weight"),
        ("awq", {"version": "gemv"}, "in the layout 'gemv'"),
        ("gptq", {"checkpoint_format": "marlin"}, "the GPTQ layout 'marlin'"),
        ("awq", {"group_size": 16}, "where .* belongs to its weight"),
        (
            "compressed-tensors",
            {"format": "marlin-24"},
            "the compressed-tensors format 'marlin-24'",
        ),
        ("compressed-tensors", {"config_groups": [1]}, "with weights of no bits"),
        ("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 3}}}}, "of 3 bits"),
        ("compressed-tensors", {"transform_config": {"R1": {}}}, "weights with rotations"),
        ("compressed-tensors", {"sparsity_config": {"format": "sparse-24"}}, "packed sparsity"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "token"}}}},
            "the strategy 'token'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_told(
    name: str, change: dict[str, Any], message: str, twins: Any
) -> None:
    _, quantized = twins(name)
    _edited(quantized, lambda settings: settings.update(change))

    with pytest.raises(UserError, match=message) as raised:
        CheckpointReader.open(quantized)
    assert "\n" not in str(raised.value)


UP = "model.layers.1.mlp.experts.3.up_proj"
MISSHAPEN = "where .* belongs to its weight; download"
MISKEPT = "where a .*tensor of .* belongs; download"


@pytest.mark.parametrize(
    ("name", "end", "change", "message"),
    [
        ("fp8", ".weight", torch.Tensor.flatten, MISKEPT),
        ("fp8", ".weight_scale_inv", torch.Tensor.int, MISKEPT),
        ("gptq", ".qweight", torch.Tensor.half, MISKEPT),
        ("gptq", ".g_idx", torch.Tensor.float, MISKEPT),
        ("gptq", ".g_idx", lambda t: t[:8], MISSHAPEN),
        ("awq", ".scales", lambda t: t[:1], MISSHAPEN),
        ("awq", ".scales", torch.Tensor.flatten, MISKEPT),
        ("compressed-tensors", ".weight_packed", torch.Tensor.flatten, MISKEPT),
        ("compressed-tensors", ".weight_scale", lambda t: t[:, :2], MISSHAPEN),
        ("compressed-tensors", ".weight_scale", lambda t: t[:8], MISSHAPEN),
        ("compressed-tensors", ".weight_zero_point", lambda t: t[:1], MISSHAPEN),
        ("compressed-tensors", ".weight_zero_point", lambda t: t[:, :1], MISSHAPEN),
        ("compressed-tensors", ".weight_zero_point", None, "but not .*weight_zero_point"),
        ("compressed-tensors", ".weight_g_idx", lambda t: t[:8], MISSHAPEN),
    ],
)
def test_parts_that_do_not_fit_are_told(
    name: str, end: str, change: Any, message: str, twins: Any
) -> None:
    _, quantized = twins(name)
    _changed(quantized, UP + end, change)

    with pytest.raises(UserError, match=f"{UP}.*{message}") as raised:
        CheckpointReader.open(quantized)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("scale", [(16, 1), (4, 8), (2, 2)])
def test_scales_of_whole_numbers_must_fit(scale: tuple[int, int]) -> None:
    stored = {
        ".weight": torch.ones(32, 32).to(torch.float8_e4m3fn),
        ".weight_scale": torch.ones(scale),
    }

    with pytest.raises(UserError, match=r"where \[32, 1\] belongs to its weight"):
        unpacked(_eight_bits(strategy="channel"), stored)


@pytest.mark.parametrize(
    ("name", "end", "message"),
    [
        ("gptq", ".g_idx", "its columns belong to groups 5 to 8, and it has scales for 4"),
        ("compressed-tensors", ".weight_g_idx", "its columns belong to groups 5 to 8, and it has"),
        (
            "compressed-tensors",
            ".weight_shape",
            r"said to be \[21, 37\], and \[16, 32\] are packed",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_told(name: str, end: str, message: str, twins: Any) -> None:
    """What headers cannot tell is told when the weight is read."""
    _, quantized = twins(name)
    _changed(quantized, UP + end, lambda t: t + 5)

    reader = CheckpointReader.open(quantized)
    with pytest.raises(UserError, match=f"{UP}.weight.* is quantised, and .*{message}"):
        reader.read(f"{UP}.weight")


def _changed(quantized: Path, name: str, change: Any) -> None:
    tensors = load_file(quantized / "model.safetensors")
    changed = tensors.pop(name)
    if change is not None:
        tensors[name] = change(changed).contiguous()
    save_file(tensors, quantized / "model.safetensors", {"format": "pt"})
