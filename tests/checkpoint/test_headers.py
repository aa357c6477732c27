import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from moefuse.checkpoint import headers
from moefuse.checkpoint.headers import (
    INDEX,
    TensorInfo,
    read_headers,
    read_shard_header,
)
from moefuse.errors import UserError

Tiny = Callable[..., Path]


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _edit_index(directory: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def _raises(directory: Path | str, match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        read_headers(directory)
    assert "\n" not in str(raised.value)


def test_headers_say_what_the_files_hold(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()

    found = read_headers(str(directory))

    stored = {
        name: (tensor, shard.name)
        for shard in _shards(directory)
        for name, tensor in load_file(shard).items()
    }
    assert found.source == str(directory)
    assert found.config["model_type"] == "deepseek_v2"
    assert list(found.tensors) == sorted(stored)
    for name, (tensor, shard) in stored.items():
        info = found.tensors[name]
        assert info == TensorInfo(name, "F32", tuple(tensor.shape), shard)
        assert info.numel == tensor.numel()
        assert info.nbytes == tensor.numel() * 4
    assert found.total_bytes == sum(tensor.numel() * 4 for tensor, _ in stored.values())


def test_a_single_file_needs_no_index(tmp_path: Path, tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    merged = {name: t for shard in _shards(directory) for name, t in load_file(shard).items()}
    save_file(merged, tmp_path / "model.safetensors")
    shutil.copy(directory / "config.json", tmp_path)

    assert read_headers(tmp_path).tensors.keys() == read_headers(directory).tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool])
def test_rare_dtypes_and_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "scalar": torch.zeros((), dtype=torch.uint8).view(dtype),
        "empty": torch.zeros((0, 3), dtype=torch.uint8).view(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors")

    found = {t.name: t for t in read_shard_header(tmp_path / "x.safetensors", "x")}

    assert (found["scalar"].shape, found["scalar"].nbytes) == ((), 1)
    assert (found["empty"].shape, found["empty"].nbytes) == ((0, 3), 0)


def test_no_such_path(tmp_path: Path) -> None:
    _raises(tmp_path / "nowhere", "does not exist; give a directory")
    _raises("./nowhere", "does not exist; give a directory")
    _raises("a/b/c", "does not exist; give a directory")
    _raises("", "is not a checkpoint|does not exist")


def test_a_file_is_no_checkpoint(tiny_checkpoint: Tiny) -> None:
    _raises(tiny_checkpoint() / "config.json", "is a file; give the checkpoint's directory")


def test_no_config(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "config.json").unlink()

    _raises(directory, "has no config.json, so it is not a checkpoint")


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "\x00", '{"a": 1'])
def test_broken_config(tiny_checkpoint: Tiny, text: str) -> None:
    directory = tiny_checkpoint()
    (directory / "config.json").write_text(text)

    _raises(directory, "config.json is not valid JSON")


def test_config_that_is_no_object(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "config.json").write_text("[1]")

    _raises(directory, "config.json holds no JSON object")


def test_config_that_is_no_utf8(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "config.json").write_bytes(b'{"a": "\xff"}')

    _raises(directory, "config.json is not valid JSON")


def test_no_weights(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    for path in (*_shards(directory), directory / INDEX):
        path.unlink()

    _raises(directory, "no safetensors weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt"])
def test_pickles_are_never_loaded(tiny_checkpoint: Tiny, name: str) -> None:
    directory = tiny_checkpoint()
    for path in (*_shards(directory), directory / INDEX):
        path.unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")

    _raises(directory, f"pickled weights only \\({name}\\).*convert the checkpoint to safetensors")


def test_no_index(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / INDEX).unlink()

    _raises(directory, "neither model.safetensors.index.json nor model.safetensors")


def test_missing_shard(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    shard = _shards(directory)[1]
    shard.unlink()

    _raises(directory, f"lacks the shard {shard.name}.*download it again")


def test_missing_shards_are_counted(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    shards = _shards(directory)
    shards[0].unlink()
    shards[1].unlink()

    _raises(directory, f"lacks 2 of {len(shards)} shards {shards[0].name}")


def test_renamed_shard(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    shard = _shards(directory)[0]
    shard.rename(directory / "first.safetensors")

    _raises(directory, f"lacks the shard {shard.name}.*first.safetensors is there.*rename it back")


def test_swapped_shards(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    first, second = _shards(directory)[:2]
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)

    _raises(directory, "but that shard does not hold it")


@pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
def test_truncated_shard(tiny_checkpoint: Tiny, left: int) -> None:
    directory = tiny_checkpoint()
    shard = _shards(directory)[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:left])

    _raises(directory, f"{shard.name} is (truncated|not a sound safetensors file)")


def test_a_cut_is_told_in_bytes(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    shard = _shards(directory)[0]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1000])

    _raises(directory, f"describes {size:,} bytes and the file has {size - 1000:,}")


def test_index_naming_a_tensor_that_no_shard_has(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _edit_index(directory, lambda names: names.update({"model.extra": _shards(directory)[0].name}))

    _raises(directory, "'model.extra' is in .*but that shard does not hold it")


def test_tensor_that_the_index_does_not_name(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    _edit_index(directory, lambda names: names.pop("model.norm.weight") and None)

    _raises(directory, "holds the tensor 'model.norm.weight', which .* does not name")


def test_tensor_in_two_shards(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    first, second = _shards(directory)[:2]
    shutil.copy(first, second)

    _raises(directory, "twice, in ")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_a_map(tiny_checkpoint: Tiny, text: str) -> None:
    directory = tiny_checkpoint()
    (directory / INDEX).write_text(text)

    _raises(directory, "has no 'weight_map'")


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        ".safetensors",
        "x.bin",
        "",
        "x\0.safetensors",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_shard_names_that_escape(tiny_checkpoint: Tiny, shard: Any) -> None:
    directory = tiny_checkpoint()
    _edit_index(directory, lambda names: names.update({"model.norm.weight": shard}))

    _raises(directory, "shards must be .safetensors files beside the index")


def test_links_that_escape(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    directory = tiny_checkpoint()
    shard = _shards(directory)[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")

    _raises(directory, "is a link to .*outside the checkpoint")


def test_a_link_to_the_checkpoint_is_fine(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_checkpoint(), target_is_directory=True)

    assert read_headers(tmp_path / "link").tensors


def test_the_hub_cache_layout_is_fine_and_its_escapes_are_not(hub_cache: Path) -> None:
    snapshot = next((hub_cache / "models--some--model" / "snapshots").iterdir())
    assert read_headers(snapshot).tensors

    shard = _shards(snapshot)[0]
    other = hub_cache / "models--other--model" / "blobs" / "x"
    other.parent.mkdir(parents=True)
    shard.resolve().rename(other)
    shard.unlink()
    shard.symlink_to(other)

    _raises(snapshot, "outside the checkpoint")


def _write(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)


def _entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, 12, "'b' overlaps"),
        ({"a": _entry(0, 8, [2]), "b": _entry(0, 8, [2])}, 8, "overlaps"),
        ({"a": _entry(4, 12, [2])}, 12, "'a' leaves a hole before it"),
        ({"a": _entry(0, 8, [2])}, 20, "12 bytes follow its last tensor"),
        ({"a": _entry(0, 8_000_000_000, [2_000_000_000])}, 8, "is truncated"),
        ({"a": _entry(0, 8, [3])}, 8, "8 bytes for the shape"),
        ({"a": _entry(8, 0, [2])}, 8, "-8 bytes for the shape"),
        ({"a": _entry(-8, 0, [2])}, 8, "not whole numbers"),
        ({"a": _entry(0, 8, [-1, -2])}, 8, "not whole numbers"),
        ({"a": _entry(0, 8, [True, 2])}, 8, "not whole numbers"),
        ({"a": _entry(0, 8, [2.0])}, 8, "not whole numbers"),  # type: ignore[list-item]
        ({"a": _entry(0, 8, "2")}, 8, "not whole numbers"),  # type: ignore[arg-type]
        ({"a": _entry(0, 8, [2], "F31")}, 8, "unknown dtype 'F31'"),
        ({"a": _entry(0, 8, [2], [])}, 8, "unknown dtype"),  # type: ignore[arg-type]
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "lacks dtype, shape or offsets"),
        ({"a": 1}, 8, "lacks dtype, shape or offsets"),
        ({"a": {**_entry(0, 8, [2]), "data_offsets": [0]}}, 8, "lacks dtype, shape or offsets"),
        ([1], 0, "no JSON object"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: Any, data: int, match: str) -> None:
    path = tmp_path / "model.safetensors"
    _write(path, json.dumps(header).encode(), b"\0" * data)

    with pytest.raises(UserError, match=match):
        read_shard_header(path, path.name)


@pytest.mark.parametrize(
    ("header", "length", "match"),
    [
        (b"not json", None, "not valid JSON"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b"[" * 200_000, None, "not valid JSON"),
        (b'{"a": 1, "a": 1}', None, "a key appears twice"),
        (b"{}", 1 << 63, "would be 9,223,372,036,854,775,808 bytes long"),
        (b"{}", 200_000_000, "would be 200,000,000 bytes long"),
        (b"{}", 3, "is truncated"),
    ],
)
def test_headers_that_are_none(
    tmp_path: Path, header: bytes, length: int | None, match: str
) -> None:
    path = tmp_path / "model.safetensors"
    _write(path, header, length=length)

    with pytest.raises(UserError, match=match):
        read_shard_header(path, path.name)


def test_random_damage_is_told_or_harmless(tiny_checkpoint: Tiny) -> None:
    shard = _shards(tiny_checkpoint())[0]
    sound = shard.read_bytes()
    length = 8 + int.from_bytes(sound[:8], "little")
    chance = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(length)] = chance.choice(b'0123456789"[]{},:-e \\u\x00\xff')
        shard.write_bytes(damaged)
        try:
            read_shard_header(shard, shard.name)
        except UserError:
            refused += 1
    assert refused > 200


def test_hub_ids_offline_are_told() -> None:
    _raises("nobody/nothing", r"nobody/nothing .*\(LocalEntryNotFoundError\).*local directory")


def test_hub_ids_in_the_cache_are_read_offline(hub_cache: Path) -> None:
    found = read_headers("some/model")

    assert found.source == "some/model"
    assert "model.norm.weight" in found.tensors


def test_hub_headers_are_asked_for_without_weights(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint()
    local = read_headers(directory)
    monkeypatch.setattr(
        headers, "hf_hub_download", lambda _id, name, revision: str(directory / name)
    )
    monkeypatch.setattr(
        headers, "get_safetensors_metadata", lambda _id, revision: _as_the_hub_tells(local)
    )

    found = read_headers("some/model", revision="main")

    assert found.tensors == local.tensors
    assert found.config == local.config


def _as_the_hub_tells(local: headers.CheckpointHeaders) -> Any:
    files: dict[str, Any] = {}
    for tensor in local.tensors.values():
        info = huggingface_hub.utils.TensorInfo(tensor.dtype, list(tensor.shape), (0, 0))
        file = files.setdefault(
            tensor.shard, huggingface_hub.utils.SafetensorsFileMetadata(metadata={}, tensors={})
        )
        file.tensors[tensor.name] = info
    return huggingface_hub.utils.SafetensorsRepoMetadata(
        metadata=None, sharded=True, weight_map={}, files_metadata=files
    )


def _bare(kind: type[Exception]) -> Exception:
    """An error of the hub without the response that its constructor wants."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (_bare(errors.GatedRepoError), "accept its licence"),
        (_bare(errors.RepositoryNotFoundError), "the spelling"),
        (_bare(errors.RemoteEntryNotFoundError), "has no config.json, so it is not a model"),
        (errors.NotASafetensorsRepoError("x"), "never loads pickles: convert it first"),
        (errors.HFValidationError("x"), "HFValidationError"),
        (errors.HTTPError("x"), "HTTPError.*check the connection"),
        (errors.OfflineModeIsEnabled("x"), "OfflineModeIsEnabled.*HF_HUB_OFFLINE"),
        (TimeoutError("x"), "TimeoutError.*check the connection"),
    ],
)
def test_what_the_hub_refuses_is_told(
    error: Exception, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(headers, "hf_hub_download", refuse)

    _raises("some/model", match)
