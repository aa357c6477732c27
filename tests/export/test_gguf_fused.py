"""GGUF files of fused students read back by the gguf package: numbers, metadata, what is refused.

Whether the patched engine computes the same from them is shown by ``make test-llama-cpp``.
"""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from numeric import assert_close
from running import run_here, write_text
from students import student_of, unsettle
from tiny import save_tiny

from moefuse.artifacts import read_json, write_json
from moefuse.export.gguf.write import export_gguf, render_gguf
from moefuse.export.student_reader import StudentReader
from moefuse.modeling.modeling_moefuse import FusedExperts
from moefuse.quantize import quantize
from moefuse.sizes import layer_bytes

FORMS: dict[str, dict[str, Any]] = {
    "deltas": {"groups": 3, "rank": 2},
    "no deltas": {"groups": 2, "rank": 0},
    "biases": {"groups": 3, "rank": 2, "scale": True, "bias": True},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf-fused")
    write_text(folder / "text.txt")
    save_tiny(folder / "mixtral-teacher", "mixtral", sliding_window=None)
    for settings in FORMS.values():
        unsettle(student_of(folder, "deepseek_v2", **settings))
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a file's metadata and its tensors in fp32, shapes as torch has them."""
    found = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in found.fields.items()}
    floats = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32)
    tensors = {
        t.name: t.data if t.tensor_type in floats else gguf.quants.dequantize(t.data, t.tensor_type)
        for t in found.tensors
    }
    return facts, {name: torch.from_numpy(data.copy()) for name, data in tensors.items()}


@pytest.mark.parametrize(
    ("form", "scheme"), [*((form, None) for form in FORMS), ("biases", "w8a8")]
)
def test_tensors_are_the_students(
    form: str, scheme: str | None, home: Path, tmp_path: Path
) -> None:
    student = student_of(home, "deepseek_v2", **FORMS[form])
    if scheme is not None:
        student = quantize(student, tmp_path / scheme, {"scheme": scheme}).out
        assert any(name.endswith(".codes") for name in StudentReader.of(student).tensors)
    result = export_gguf(student, tmp_path / "out.gguf")

    facts, tensors = read(tmp_path / "out.gguf")
    reader = StudentReader.of(student)
    assert facts["moefuse.version"] == 1
    assert facts["deepseek2.expert_count"] == 8
    assert_close(
        tensors["blk.2.attn_q.weight"], reader.read("model.layers.2.self_attn.q_proj.weight")
    )
    for layer in reader.shape.layers:
        module = reader.module(layer)
        assert isinstance(module, FusedExperts)
        own = {
            "gate_up_exps.weight": torch.stack([b.gate_up_proj.weight for b in module.bases]),
            "down_exps.weight": torch.stack([b.down_proj.weight for b in module.bases]),
            "gate_up_exps.expert_scale": module.scale,
            "gate_up_exps.expert_bias": module.bias,
            "gate_up_exps.delta_a": getattr(module.delta, "gate_up_a", None),
            "gate_up_exps.delta_b": getattr(module.delta, "gate_up_b", None),
            "down_exps.delta_a": getattr(module.delta, "down_a", None),
            "down_exps.delta_b": getattr(module.delta, "down_b", None),
        }
        groups = tensors.pop(f"blk.{layer}.ffn_down_exps.group_of_expert")
        assert torch.equal(groups[:, 0].long(), module.group_of_expert)
        for name, expected in own.items():
            found = tensors.pop(f"blk.{layer}.ffn_{name}", None)
            assert (found is None) == (expected is None), name
            if found is not None:
                assert_close(found, expected.float())
    assert not any("_exps" in name for name in tensors)
    assert result.fused
    assert "make llama-cpp" in render_gguf(result)


def test_bytes_are_the_plans(home: Path, tmp_path: Path) -> None:
    student = student_of(home, "deepseek_v2", **FORMS["biases"])
    export_gguf(student, tmp_path / "out.gguf", quant="F16")

    reader = StudentReader.of(student)
    found = [t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if "_exps" in t.name]
    planned = sum(layer_bytes(reader.shape, plan, 2) for plan in reader.plans.values())
    # The map of an expert's group takes 4 bytes, where the checkpoint has 8.
    maps = 4 * reader.shape.experts * len(reader.plans)
    assert sum(int(t.n_bytes) for t in found) == planned - maps


@pytest.mark.parametrize(
    ("quant", "bases", "own"),
    [
        ("F32", "F32", "F32"),
        ("F16", "F16", "F16"),
        ("BF16", "BF16", "BF16"),
        ("Q8_0", "Q8_0", "F16"),
    ],
)
def test_bases_are_quantised_and_what_is_experts_own_is_not(
    quant: str, bases: str, own: str, home: Path, tmp_path: Path
) -> None:
    student = student_of(home, "deepseek_v2", **FORMS["biases"])
    result = export_gguf(student, tmp_path / "out.gguf", quant=quant)

    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    kinds = {t.name: t.tensor_type.name for t in tensors}
    assert kinds["blk.1.ffn_gate_up_exps.weight"] == bases
    assert kinds["blk.1.ffn_gate_up_exps.expert_bias"] == own
    assert kinds["blk.1.ffn_down_exps.delta_b"] == own
    assert kinds["blk.1.ffn_down_exps.group_of_expert"] == "I32"
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert sum(result.kinds.values()) == sum(int(t.n_bytes) for t in tensors)


def test_names_are_published_ones_first(home: Path, tmp_path: Path) -> None:
    student = student_of(home, "mixtral", groups=3, rank=2)
    export_gguf(student, tmp_path / "out.gguf")

    _, tensors = read(tmp_path / "out.gguf")
    router = StudentReader.of(student).read("model.layers.0.mlp.gate.weight")
    assert_close(tensors["blk.0.ffn_gate_inp.weight"], router)


def test_what_the_patch_cannot_run_is_refused_with_the_reason(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    neurons = student_of(home, "deepseek_v2", expert_bits=6.0)
    older = tmp_path / "older"
    older.mkdir()
    for path in student_of(home, "deepseek_v2", **FORMS["deltas"]).iterdir():
        (older / path.name).write_bytes(path.read_bytes())
    config = read_json(older / "config.json")
    for plan in config["moefuse"]["layers"].values():
        plan["delta"] = "multiplexed_mixture"
    write_json(older / "config.json", config)

    for student, words in ((neurons, "own neurons at few bits"), (older, "multiplexed experts")):
        ran = run_here(capfd, "export", "gguf", student, tmp_path / "out.gguf")
        assert ran.status == 2
        assert words in ran.err
    assert not (tmp_path / "out.gguf").exists()
