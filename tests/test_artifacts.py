"""Artifacts are whole or absent, and the same values give the same bytes."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch

from moefuse import artifacts


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": "é"}}
    artifacts.write_json(tmp_path / "x.json", value)

    assert artifacts.read_json(tmp_path / "x.json") == value
    assert (tmp_path / "x.json").read_text(encoding="utf-8").index('"b"') == 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_nan_and_leaves_nothing_behind(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "x.json", [value])
    assert not any(tmp_path.iterdir())


def test_tensors_come_back(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T,
        "a": torch.tensor([1], dtype=torch.bfloat16),
        "c": torch.zeros(0, 4, dtype=torch.int32),
    }
    artifacts.write_tensors(tmp_path / "x.safetensors", tensors)

    found = artifacts.read_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_order_does_not_change_the_bytes(tmp_path: Path) -> None:
    first = {"a": torch.ones(2), "b": torch.zeros(3)}
    artifacts.write_tensors(tmp_path / "1", first)
    artifacts.write_tensors(tmp_path / "2", dict(reversed(first.items())))

    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    artifacts.write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        artifacts.write_atomically(path, fail)
    assert path.read_text() == "old"
    artifacts.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_directories_are_made_and_permissions_are_the_users(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        artifacts.write_tensors(tmp_path / "a" / "b" / "x", {"t": torch.ones(1)})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a" / "b" / "x").stat().st_mode) == 0o640


def test_leftovers_go_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a.partial/b.json.partial", "c/d.partial/e.json", "c/f.json.partial", "c/g.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    artifacts.remove_leftovers(tmp_path)

    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"c", "c/g.json"}
    artifacts.remove_leftovers(tmp_path / "never")


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("from before")

    partial = artifacts.partial_directory(path)
    assert not any(partial.iterdir())
    (partial / "new").write_text("new")
    assert not path.exists()
    artifacts.finish_directory(partial, path)

    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_directory_takes_the_place_of_another(tmp_path: Path, linked: bool) -> None:
    path, real = tmp_path / "out", tmp_path / ("elsewhere" if linked else "out")
    real.mkdir()
    (real / "old").write_text("old")
    if linked:
        path.symlink_to(real)
    partial = artifacts.partial_directory(path)
    (partial / "new").write_text("new")

    artifacts.finish_directory(partial, path)

    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert not path.is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", real.name}


def test_fingerprints_tell_values_apart() -> None:
    one = artifacts.fingerprint({"a": 1, "b": [1, 2]})

    assert one == artifacts.fingerprint(json.loads('{"b": [1, 2], "a": 1}'))
    assert len(one) == 16
    assert one != artifacts.fingerprint({"a": 1, "b": [2, 1]})
    assert one != artifacts.fingerprint({"a": "1", "b": [1, 2]})
