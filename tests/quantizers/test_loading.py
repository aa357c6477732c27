"""Quantised students loaded by the libraries that read them, in a process without moefuse."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from students import student_of

from moefuse.quantize import quantize

LOADS = """
import json, sys, torch
sys.modules["moefuse"] = None
from transformers import AutoModelForCausalLM
made = json.loads(sys.argv[2])
options = {}
if made:
    import transformers
    if made[0] == "TorchAoConfig":
        import torchao.quantization
        options["quantization_config"] = transformers.TorchAoConfig(
            torchao.quantization.Int8WeightOnlyConfig())
    else:
        options["quantization_config"] = getattr(transformers, made[0])(**made[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()
base = model.model.layers[1].mlp.experts.bases[0].gate_up_proj
ids = torch.tensor([[5, 6, 7, 8]])
tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(json.dumps({"base": type(base).__name__, "weight": type(base.weight).__name__,
                  "count": tokens.shape[1]}))
"""


GROUPED = ("w4a16", "gptq", "awq", "int4-torchao", "hqq4")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizers")
    student_of(folder, "deepseek_v2", groups=3, rank=2).rename(folder / "student")
    return folder


def loaded(path: Path, *made: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", LOADS, str(path), json.dumps(made)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("scheme", [*GROUPED, "w8a16", "w8a8", "fp8", "nf4"])
def test_a_quantised_student_loads_without_moefuse(home: Path, tmp_path: Path, scheme: str) -> None:
    group = {"group_size": 16} if scheme in GROUPED else {}
    text = {"data": str(home / "text.txt"), "tokens": 512, "sequence_length": 64, "steps": 3}

    quantize(home / "student", tmp_path / "out", {"scheme": scheme, **text, **group})

    assert loaded(tmp_path / "out")["count"] == 8


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (
            ("BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
            "Linear4bit",
        ),
        (("TorchAoConfig", {}), "Int8Tensor"),
        (("QuantoConfig", {"weights": "int8"}), "QLinear"),
    ],
)
def test_a_user_s_own_route_touches_the_bases(home: Path, made: Any, kind: str) -> None:
    found = loaded(home / "student", *made)

    assert kind in (found["base"], found["weight"])


def test_the_packed_form_is_read_as_it_was_written(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from moefuse.checkpoint.formats.compressed_tensors import FORMAT

    values = {"scheme": "w4a16", "group_size": 16}
    quantize(home / "student", tmp_path / "out", values)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        model(torch.tensor([[5, 6]]))  # compressed-tensors unpacks on the first call
    stem = "model.layers.1.mlp.experts.bases.0.gate_up_proj"
    base = model.get_submodule(stem)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    parts = {k.removeprefix(stem): t for k, t in stored.items() if k.startswith(stem + ".")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    assert torch.equal(
        base.weight.float(), FORMAT.unpack(parts, config, (32, 32)).to(base.weight.dtype).float()
    )
