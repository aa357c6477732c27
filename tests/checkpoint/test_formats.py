"""Quantised checkpoints: each format against its own library or definition, and through fusing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import FORMATS, FP8_SETTINGS, GROUP, in_gptq, quantize
from running import write_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moefuse.checkpoint.formats import all_formats, as_plain, format_of
from moefuse.checkpoint.formats.base import Format
from moefuse.checkpoint.inspection import inspect_checkpoint
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model
from moefuse.pipeline import fuse
from moefuse.planning import plan_checkpoint

Tiny = Callable[..., Path]
REFERENCES = Path(__file__).with_name("data") / "compressed_tensors.safetensors"
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
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
        assert all(map(torch.equal, quantized.read_experts(layer), plain.read_experts(layer)))
    quantized.check_finite()


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
    with pytest.raises(UserError, match=f"quantised with hqq .* moefuse reads {titles}"):
        CheckpointReader.open(quantized)
    assert inspect_checkpoint(quantized).quantized_bits is None


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
        (
            "compressed-tensors",
            {"format": "marlin-24"},
            "the compressed-tensors format 'marlin-24'",
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
