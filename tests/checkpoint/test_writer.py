import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from moefuse.checkpoint.headers import read_headers
from moefuse.checkpoint.writer import ShardedWriter


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _write(directory: Path, count: int = 5, max_shard_bytes: int = 100) -> dict[str, torch.Tensor]:
    """Tensors of 40 bytes each, so that two fit into a shard of 100."""
    tensors = {f"t{at}": torch.arange(10.0) + at for at in range(count)}
    with ShardedWriter(directory, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = _write(tmp_path)

    assert _files(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 200}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00002-of-00003.safetensors",
        "t4": "model-00003-of-00003.safetensors",
    }
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    _write(tmp_path, max_shard_bytes=1000)

    assert _files(tmp_path) == ["model.safetensors"]


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, max_shard_bytes=10) as writer:
        writer.add("large", torch.zeros(100))
        writer.add("small", torch.zeros(2))

    assert len(_files(tmp_path)) == 3


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name)

    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")


def test_what_an_earlier_checkpoint_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter.safetensors").write_text("the user's own")
    _write(tmp_path, count=10)
    _write(tmp_path, count=4)
    assert len(_files(tmp_path)) == 2 + 1 + 2

    _write(tmp_path, count=1)

    assert _files(tmp_path) == ["adapter.safetensors", "config.json", "model.safetensors"]


def test_duplicates_raise_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' was added twice"), ShardedWriter(tmp_path, 8) as w:
        w.add("a", torch.zeros(4))
        w.add("b", torch.zeros(4))
        w.add("a", torch.zeros(4))

    assert _files(tmp_path) == []


def test_an_exception_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    _write(tmp_path)
    before = _bytes(tmp_path)

    with pytest.raises(RuntimeError), ShardedWriter(tmp_path, 8) as writer:
        writer.add("a", torch.zeros(4))
        writer.add("b", torch.zeros(4))
        raise RuntimeError

    assert _bytes(tmp_path) == before


def test_until_the_end_there_are_only_temporary_files(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, max_shard_bytes=8) as writer:
        for at in range(3):
            writer.add(f"t{at}", torch.zeros(4))
        assert _files(tmp_path) == [
            "model-00001.safetensors.partial",
            "model-00002.safetensors.partial",
        ]
        assert list(writer._held) == ["t2"]


def test_views_transposes_and_shared_weights_are_stored_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    parts = {"view": whole[1], "transposed": whole[0].T, "same": whole[1], "scalar": whole[0, 0, 1]}

    with ShardedWriter(tmp_path) as writer:
        for name, part in parts.items():
            writer.add(name, part)
        held = writer._held["view"].untyped_storage().nbytes()
        expected = {name: part.clone() for name, part in parts.items()}
        whole.zero_()

    assert held == 3 * 4 * 4
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)

    with ShardedWriter(tmp_path) as writer:
        writer.add("x", tensor)

    stored = load_file(tmp_path / "model.safetensors")["x"]
    assert stored.dtype == dtype
    assert torch.equal(stored.float(), tensor.float())


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2")
    model.config.save_pretrained(tmp_path)

    with ShardedWriter(tmp_path, max_shard_bytes=20_000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert len(read_headers(tmp_path).tensors) == len(loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
