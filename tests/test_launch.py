"""Where layers are made: mistakes are told before any work, with or without Ray."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import SIZE, SMALL, run_here, write_text

from moefuse import artifacts

Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--launch", "slurm"), "--launch is 'slurm'; choose from here, ray."),
        (("--ray-address", "10.0.0.1:6379"), "--ray-address is for Ray; add --launch ray."),
        (("--ray-retries", "5"), "--ray-retries is for Ray; add --launch ray."),
        (("--launch", "ray", "--ray-cpus", "0"), "--ray-cpus is 0; it must be at least 1."),
        (("--launch", "ray", "--ray-memory", "much"), "--ray-memory is 'much', which is not a"),
        (("--launch", "ray"), '--launch ray needs Ray, which is an extra: pip install "moefuse[r'),
        (("--work", "s3://bucket/work"), "s3:/bucket/work reads like a URL; give a directory"),
    ],
)
def test_mistakes(
    flags: tuple[str, ...],
    words: str,
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    # As if it were not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "moefuse.launch.ray", raising=False)
    data = ("--data", write_text(tmp_path / "text.txt"))

    ran = run_here(capfd, "fuse", tiny_checkpoint(), "student", *SIZE, *SMALL, *data, *flags)

    assert ran.status == 2
    assert words in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "teacher-deepseek_v2"}


def test_files_filled_apart_appear_together_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "layer-001.safetensors"
    with artifacts.filled_apart(path) as one, artifacts.filled_apart(path) as other:
        for place in (one, other):
            (place / "layer-001.json").write_text(place.name)
            (place / path.name).write_text(place.name)
        assert not path.exists()

    assert path.read_text() == path.with_suffix(".json").read_text() == one.name
    with pytest.raises(RuntimeError), artifacts.filled_apart(path) as failing:
        (failing / path.name).write_text("half")
        raise RuntimeError
    assert path.read_text() == one.name
    assert sorted(found.name for found in path.parent.iterdir()) == [
        "layer-001.json",
        "layer-001.safetensors",
    ]
