"""Students written out as plain checkpoints: the same logits, in every family, without moefuse."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import Ran, run_here, write_text
from safetensors.torch import load_file, save_file
from students import student_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse.artifacts import read_json, write_json
from moefuse.checkpoint.headers import read_headers
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.errors import UserError
from moefuse.export.expand import expand
from moefuse.export.student_reader import StudentReader
from moefuse.families import all_families
from moefuse.modeling import load_fused
from moefuse.quantize import quantize

FAMILIES = sorted(all_families())
IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))
LOADS = """
import sys
sys.modules["moefuse"] = None
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    _, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), (path, found)
"""
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expand")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def student(home: Path) -> Make:
    """``student(family, **settings)`` returns a student's directory."""

    def make(family: str, **settings: Any) -> Path:
        return student_of(home, family, **settings)

    return make


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS_BS).logits


def plain(path: Path) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_students(student: Make, tmp_path: Path, family: str) -> None:
    fused = student(family, groups=3, rank=2)

    expand(fused, tmp_path / "plain")

    assert_close(logits(plain(tmp_path / "plain")), logits(load_fused(fused)))


@pytest.mark.parametrize("bits", ["8", "4"])
def test_what_a_quantiser_stored_is_written_out_too(
    student: Make, tmp_path: Path, bits: str
) -> None:
    fused = student("deepseek_v2", groups=3, rank=2)
    quantize(fused, tmp_path / "few-bits", {"scheme": "w8a8", "delta_bits": bits})
    reader, model = StudentReader.of(tmp_path / "few-bits"), load_fused(fused)
    for layer in reader.shape.layers:
        experts: Any = model.get_submodule(reader.family.experts_path(layer))
        stored = reader.module(layer)
        experts.bases.load_state_dict(stored.bases.state_dict())  # type: ignore[union-attr]
        for name, factor in reader.read_factors(layer).items():
            assert not torch.equal(getattr(experts.delta, name), factor)
            getattr(experts.delta, name).data.copy_(factor)

    expand(tmp_path / "few-bits", tmp_path / "plain")

    assert_close(logits(plain(tmp_path / "plain")), logits(model))


def test_a_library_s_own_format_is_refused(student: Make, tmp_path: Path) -> None:
    fused = student("deepseek_v2", groups=3, rank=2)
    shutil.copytree(fused, tmp_path / "nf4")
    config = read_json(fused / "config.json")
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    write_json(tmp_path / "nf4" / "config.json", config)

    with pytest.raises(UserError, match="bitsandbytes, which is no format that moefuse reads"):
        expand(tmp_path / "nf4", tmp_path / "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_own_neurons_are_written_out_too(student: Make, tmp_path: Path, family: str) -> None:
    fused = student(family, expert_bits=6.0, shared=3)

    result = expand(fused, tmp_path / "plain")

    assert_close(logits(plain(tmp_path / "plain")), logits(load_fused(fused)))
    reader = CheckpointReader.open(tmp_path / "plain")
    assert reader.shape.intermediate == result.intermediate >= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_published_checkpoints(
    student: Make, home: Path, tmp_path: Path, family: str
) -> None:
    expand(student(family, groups=3, rank=2), tmp_path / "plain")

    assert names(tmp_path / "plain") == names(home / f"{family}-teacher")


def test_experts_are_counted_by_the_published_key(
    student: Make, home: Path, tmp_path: Path
) -> None:
    """Transformers saves the number under another key, which ExLlamaV3 does not look at."""
    expand(student("qwen3_moe", groups=3, rank=2), tmp_path / "plain")

    teacher = json.loads((home / "qwen3_moe-teacher/config.json").read_text())
    assert (teacher.get("num_experts"), teacher["num_local_experts"]) == (None, 8)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert (config["num_experts"], config["num_local_experts"]) == (8, 8)


def names(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_headers(checkpoint).tensors.items()}


def test_it_loads_where_moefuse_is_not(student: Make, tmp_path: Path) -> None:
    made = [tmp_path / family for family in FAMILIES]
    for family, path in zip(FAMILIES, made, strict=True):
        expand(student(family, groups=3, rank=2), path)

    run = subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, made)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    files = {path.name for path in made[0].iterdir()}
    assert not any(name.endswith(".py") for name in files)
    assert {"config.json", "tokenizer.json", "README.md"} <= files


def test_wider_experts_widen_the_shared_ones(student: Make, tmp_path: Path) -> None:
    fused = copy_with_wider_neurons(student("deepseek_v2", expert_bits=16.0), tmp_path)

    result = expand(fused, tmp_path / "plain")

    assert result.intermediate == 32, "19 neurons, and zeros"
    assert_close(logits(plain(tmp_path / "plain")), logits(load_fused(fused)))


def copy_with_wider_neurons(fused: Path, folder: Path) -> Path:
    """Give the first expert of every layer three neurons of the second, which keeps the rest."""
    copy = folder / "wider"
    copy.mkdir()
    tensors = {n: t for path in fused.glob("*.safetensors") for n, t in load_file(path).items()}
    for name, tensor in tensors.items():
        if name.endswith("experts.widths"):
            tensor[-1, 0] += 3
            tensor[-1, 1] -= 3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for path in (*fused.glob("*.json"), *fused.glob("*.py")):
        if "index" not in path.name:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_student_streams_as_a_plain_model(student: Make) -> None:
    from moefuse.checkpoint.streaming import whole_model

    fused = student("mixtral", groups=3, rank=2)
    model = whole_model(StudentReader.of(fused), device="cpu")
    assert_close(logits(model), logits(load_fused(fused)))


def test_biases_are_refused_or_dropped_with_a_word(
    student: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fused = student("deepseek_v2", groups=3, rank=2, bias=True)

    refused = run_here(capfd, "expand", fused, tmp_path / "plain")
    assert refused.status == 2
    assert "cannot have" in refused.err
    assert not (tmp_path / "plain").exists()

    made = run_here(capfd, "expand", fused, tmp_path / "plain", "--drop-biases")
    assert made.status == 0
    assert "Biases were left out" in made.out
    assert "biases were left out" in " ".join((tmp_path / "plain/README.md").read_text().split())


def test_the_command_says_that_it_saves_nothing(
    student: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fused = student("deepseek_v2", groups=3, rank=2)

    ran: Ran = run_here(capfd, "expand", fused, tmp_path / "plain", "--dtype", "bfloat16")

    assert ran.status == 0
    assert "saves no memory" in ran.out
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "moefuse" not in config
    assert "auto_map" not in config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["TEACHER", "out"], "no moefuse block"),
        (["STUDENT", "STUDENT"], "exists already"),
        (["STUDENT", "out", "--dtype", "int8"], "--dtype is 'int8'"),
        (["STUDENT", "STUDENT/inside"], "lies in the checkpoint"),
    ],
)
def test_bad_input(
    student: Make,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    fused = str(student("deepseek_v2", groups=3, rank=2))
    places = {"TEACHER": str(home / "deepseek_v2-teacher"), "out": str(tmp_path / "out")}
    given = [places.get(a, a.replace("STUDENT", fused)) for a in arguments]

    ran = run_here(capfd, "expand", *given)

    assert ran.status == 2
    assert words in ran.err
    assert not (tmp_path / "out").exists()
