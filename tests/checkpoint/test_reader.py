import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from moefuse.checkpoint import reader as reader_module
from moefuse.checkpoint.headers import INDEX
from moefuse.checkpoint.inspection import UNUSED, inspect_checkpoint
from moefuse.checkpoint.reader import CheckpointReader, is_finite
from moefuse.errors import UserError

Tiny = Callable[..., Path]

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def _edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def _replace(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put ``tensor`` in the place of ``name``, or drop it from shard and index."""
    index = json.loads((directory / INDEX).read_text())
    shard = directory / index["weight_map"][name]
    stored = load_file(shard)
    del stored[name]
    if tensor is None:
        del index["weight_map"][name]
        (directory / INDEX).write_text(json.dumps(index))
    else:
        stored[name] = tensor
    save_file(stored, shard, metadata={"format": "pt"})


def _refused(directory: Path | str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as raised:
        CheckpointReader.open(directory, **options)
    assert "\n" not in str(raised.value)


def test_open_tells_what_it_is(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()

    reader = CheckpointReader.open(str(directory))

    assert reader.source == str(directory)
    assert reader.directory == directory
    assert reader.family.model_type == reader.config["model_type"] == "deepseek_v2"
    assert reader.shape.layers == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_tiny(tmp_path, "olmoe", dtype=dtype)
    reader = CheckpointReader.open(tmp_path)

    gate_up, down = reader.read_experts(2)

    assert gate_up.dtype == down.dtype == reader.read("lm_head.weight").dtype == dtype
    experts = model.get_submodule("model.layers.2.mlp.experts")
    assert torch.equal(gate_up, experts.gate_up_proj)
    assert torch.equal(down, experts.down_proj)


def test_a_layer_with_experts(tiny_checkpoint: Tiny) -> None:
    reader = CheckpointReader.open(tiny_checkpoint("mixtral"))

    everything, rest = reader.read_layer(1), reader.read_layer(1, experts=False)

    routed = everything.keys() - rest.keys()
    assert routed == {f"mlp.experts.{e}.w{w}.weight" for e in range(8) for w in (1, 2, 3)}
    assert "mlp.gate.weight" in rest
    disk = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    assert torch.equal(everything["mlp.experts.5.w2.weight"], reader.read(disk))


def test_nothing_read_is_tied_to_the_file(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    reader = CheckpointReader.open(directory)
    first = reader.read(EXPERT)
    kept = first.clone()

    first.zero_()
    for shard in directory.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[: -shard.stat().st_size])

    assert not first.any()
    assert kept.any()


def test_batches_hold_one_shard_and_little(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader.open(tiny_checkpoint())
    whole = reader.read_experts(1)
    monkeypatch.setattr(reader_module, "MAPPED_BYTES", 4096)

    batches = list(reader._batches(list(reader.tensors)))

    assert sorted(name for _, names in batches for name in names) == list(reader.tensors)
    for shards, names in batches:
        tensors = [reader.tensors[name] for name in names]
        assert {(tensor.shard,) for tensor in tensors} == {shards}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 4096
    assert all(map(torch.equal, reader.read_experts(1), whole))


MEASURE = """
import sys
from safetensors import safe_open
from moefuse.checkpoint.reader import CheckpointReader

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e3

reader = CheckpointReader.open(sys.argv[1])
reader.read("model.norm.weight")
before = resident()
for name in reader.tensors:
    reader.read(name)
one = resident()
reader.read_layer(0)
print(one - before, resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_reading_one_by_one_keeps_no_shard_resident(tmp_path: Path) -> None:
    megabytes = _save_wide(tmp_path)

    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    one_by_one, layer = map(float, told.stdout.split())
    print(f"{megabytes:.0f} MB: {one_by_one:.0f} MB one by one, {layer:.0f} MB for the layer")
    assert megabytes > 150
    assert one_by_one < 60
    assert layer < 1.6 * megabytes


def _save_wide(directory: Path) -> float:
    """Write one shard of about 200 MB in one layer; returns its size in MB."""
    width, hidden, experts = 1024, 2048, 8
    config = {
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    prefix = "model.layers.0.block_sparse_moe.experts"
    tensors = {"model.norm.weight": torch.ones(hidden)}
    for expert in range(experts):
        tensors[f"{prefix}.{expert}.w1.weight"] = torch.ones(width, hidden)
        tensors[f"{prefix}.{expert}.w2.weight"] = torch.ones(hidden, width)
        tensors[f"{prefix}.{expert}.w3.weight"] = torch.ones(width, hidden)
    save_file(tensors, directory / "model.safetensors")
    return (directory / "model.safetensors").stat().st_size / 1e6


def test_finite_weights_pass(tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    CheckpointReader.open(tiny_checkpoint()).check_finite()

    assert "Checking weights" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_tensor_is_named(tiny_checkpoint: Tiny, value: float) -> None:
    directory = tiny_checkpoint()
    reader = CheckpointReader.open(directory)
    damaged = reader.read(EXPERT)
    damaged[3, 5] = value
    _replace(directory, EXPERT, damaged)

    with pytest.raises(UserError, match=f"The tensor '{EXPERT}' in .* holds NaN or infinity"):
        CheckpointReader.open(directory).check_finite()


def test_is_finite_for_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "CHECKED_AT_ONCE", 7)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        bad = torch.zeros(3, 7, dtype=dtype)
        assert is_finite(bad)
        bad[2, 6] = float("inf")
        assert not is_finite(bad)
    for dtype, pattern in (
        (torch.float8_e4m3fn, 0x7F),
        (torch.float8_e5m2, 0x7C),
        (torch.float8_e8m0fnu, 0xFF),
    ):
        bits = torch.zeros(3, 7, dtype=torch.uint8)
        assert is_finite(bits.view(dtype))
        bits[1, 1] = pattern
        assert not is_finite(bits.view(dtype))
    assert is_finite(torch.full((4,), 255, dtype=torch.uint8))
    assert is_finite(torch.full((4,), 255, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    assert is_finite(torch.zeros(0))


def test_fingerprints_tell_checkpoints_apart(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    directory = tiny_checkpoint()
    first = CheckpointReader.open(directory).fingerprint()
    save_tiny(tmp_path / "sibling", seed=1)
    moved = directory.rename(tmp_path / "moved")

    assert len(first) == 16
    assert CheckpointReader.open(moved).fingerprint() == first
    assert CheckpointReader.open(tmp_path / "sibling").fingerprint() != first
    _edit_config(moved, rms_norm_eps=1e-5)
    assert CheckpointReader.open(moved).fingerprint() != first


def test_auxiliary_files(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    for name in ("LICENSE", "LICENSE-MODEL", "vocab.json", "tokenizer.model", "README.md"):
        (directory / name).write_text("x")
    for name in ("tokenizer.bin", "modeling_deepseek.py", "training_args.bin"):
        (directory / name).write_text("x")

    names = [path.name for path in CheckpointReader.open(directory).auxiliary_files()]

    assert names == [
        "LICENSE",
        "LICENSE-MODEL",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_auxiliary_links_that_escape(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    directory = tiny_checkpoint()
    (tmp_path / "secret").write_text("x")
    (directory / "LICENSE").symlink_to(tmp_path / "secret")

    with pytest.raises(UserError, match="outside the checkpoint"):
        CheckpointReader.open(directory).auxiliary_files()


def test_missing_expert(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _replace(directory, EXPERT, None)

    _refused(directory, f"lacks the tensor '{EXPERT}', which its config.json promises")


def test_fewer_experts_than_promised(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _edit_config(directory, n_routed_experts=9)

    _refused(directory, "experts.8.gate_proj.weight'.*check 'n_routed_experts'")


def test_misshapen_expert(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _replace(directory, EXPERT, torch.zeros(16, 31))

    _refused(directory, r"has the shape \[16, 31\], but its config.json means \[16, 32\]")


def _add(directory: Path, name: str) -> None:
    save_file({name: torch.zeros(16)}, directory / "added.safetensors")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = "added.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def test_what_transformers_does_not_load_is_left_out(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint("ernie4_5_moe")
    before = CheckpointReader.open(directory).outside_names()
    parts = {part.name: part for part in inspect_checkpoint(directory).parts}
    _add(directory, "model.mtp_emb_norm.0.weight")

    assert CheckpointReader.open(directory).outside_names() == before
    found = {part.name: part for part in inspect_checkpoint(directory).parts}
    assert found.pop(UNUSED).parameters == 16
    assert found == parts


def test_experts_with_biases(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _add(directory, EXPERT.removesuffix("weight") + "bias")

    _refused(directory, "have biases .*up_proj.bias")


def test_experts_of_several_dtypes(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _replace(directory, EXPERT, torch.zeros(16, 32, dtype=torch.bfloat16))

    _refused(directory, r"layer 1 .* have several dtypes \(BF16, F32\)")


def test_weights_in_8_bits_without_scales_are_refused(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _replace(directory, EXPERT, torch.zeros(16, 32, dtype=torch.float8_e4m3fn))

    _refused(directory, "have several dtypes")
    _edit_config(directory, quantization_config={"quant_method": "fp8"})
    _refused(directory, "but not .*weight_scale_inv.* its numbers mean nothing")


def test_packed_checkpoints_without_their_weights_are_told(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _replace(directory, EXPERT, None)
    _edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})

    _refused(directory, "is quantised with gptq and lacks the tensor .* moefuse reads AWQ, ")


def test_remote_code_needs_consent(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "modeling.py").write_text("raise SystemExit('was imported')")
    _edit_config(
        directory,
        model_type="strange_moe",
        num_experts=8,
        auto_map={"AutoModelForCausalLM": "modeling.Strange"},
    )

    _refused(directory, "'strange_moe' needs code .* pass --trust-remote-code")
    _refused(directory, "'strange_moe' is not supported yet", trust_remote_code=True)


def test_remote_code_of_known_families_is_ignored(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "modeling.py").write_text("raise SystemExit('was imported')")
    _edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling.Strange"})

    assert CheckpointReader.open(directory).shape.experts == 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama", "n_routed_experts": None}, "'llama' is a dense model"),
        ({"model_type": "strange_moe"}, "'strange_moe' is not supported yet"),
        ({"moefuse": {"version": 1}}, "already fused"),
        ({"moe_intermediate_size": None}, "lacks the key 'moe_intermediate_size'"),
    ],
)
def test_configurations_that_do_not_do(
    tiny_checkpoint: Tiny, changes: dict[str, Any], match: str
) -> None:
    directory = tiny_checkpoint()
    _edit_config(directory, **changes)

    _refused(directory, match)


def test_layers_beyond_the_model_are_left_alone(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint("deepseek_v3")
    _edit_config(directory, num_hidden_layers=2)

    reader = CheckpointReader.open(directory)

    assert reader.shape.layers == (1,)
    assert reader.outside_names() == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


def test_tied_embeddings(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe", tie_word_embeddings=True)

    reader = CheckpointReader.open(tmp_path)

    assert reader.outside_names() == ["model.embed_tokens.weight", "model.norm.weight"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.any()


def test_hub_ids_in_the_cache_open_offline(hub_cache: Path) -> None:
    reader = CheckpointReader.open("some/model")

    assert reader.source == "some/model"
    assert reader.directory.is_relative_to(hub_cache)
    assert reader.read("model.norm.weight").shape == (32,)
    assert "tokenizer.json" in [path.name for path in reader.auxiliary_files()]


def test_hub_ids_offline_are_told() -> None:
    _refused("nobody/nothing", r"nobody/nothing .*\(LocalEntryNotFoundError\).*local directory")


def test_downloads_want_no_pickles_and_no_weights_before_the_checks(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint()
    asked: list[dict[str, Any]] = []

    def download(_id: str, **options: Any) -> str:
        asked.append(options)
        return str(directory)

    monkeypatch.setattr(reader_module, "snapshot_download", download)

    CheckpointReader.open("some/model", revision="main")
    assert asked[0]["allow_patterns"] == ["config.json", INDEX]
    assert set(path.name for path in directory.glob("*.safetensors")) <= set(
        asked[1]["allow_patterns"]
    )
    assert "*.bin" in asked[1]["ignore_patterns"]
    assert [options["revision"] for options in asked] == ["main", "main"]

    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    _refused("some/model", "no safetensors weights on the hub.*never loads pickles")

    asked.clear()
    _edit_config(directory, model_type="llama", n_routed_experts=None)
    _refused("some/model", "dense model")
    assert len(asked) == 1
