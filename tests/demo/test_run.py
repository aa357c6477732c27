"""The demonstration, at one size and with few tokens and steps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moefuse import demo
from moefuse.cards import read_record
from moefuse.demo import run
from moefuse.demo.run import DemoResult, run_demo
from moefuse.errors import UserError
from moefuse.evaluation.report import read_report
from moefuse.evaluation.run import evaluate_command
from moefuse.modeling import load_fused

SHORT: dict[str, Any] = {
    "device": "cpu",
    "sizes": (2,),
    "settings": {"tokens": 2048, "sequence_length": 256, "steps": 3, "batch_tokens": 512},
    "healing": {**run.HEALING, "tokens": "6K", "sequence_length": 128},
    "held_out_tokens": 1024,
}


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A demonstration that was interrupted when all checkpoints were written."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(run, "measure_sizes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(out, **SHORT)
    written = (out / "healed-2" / "healing.json").stat().st_mtime_ns

    result = run_demo(out, **SHORT)

    assert (out / "healed-2" / "healing.json").stat().st_mtime_ns == written, "not healed again"
    return result


def test_every_stage_is_told(shown: DemoResult) -> None:
    assert [(row.method, row.stage) for row in shown.rows] == [
        ("teacher", None),
        ("fused", "one-shot"),
        ("fused", "distilled"),
        ("reap", "one-shot"),
        ("hc-smoe", "one-shot"),
        ("fused", "healed"),
    ]
    kl = {row.stage: row.kl for row in shown.rows if row.method == "fused"}
    assert kl["healed"] < kl["distilled"]
    distilled, healed = shown.rows[2], shown.rows[5]
    assert healed.healed_tokens == pytest.approx(6_000, rel=0.1)
    assert (healed.expert_bytes, healed.total_bytes) == (
        distilled.expert_bytes,
        distilled.total_bytes,
    )
    meta, rows = read_report(shown.out)
    assert rows == shown.rows
    assert meta["healing"]["tokens"] == "6K"
    assert "fused, healed" in (shown.out / "report.md").read_text()
    assert (shown.out / "quality.png").stat().st_size > 10_000


def test_what_is_measured_is_what_is_written(shown: DemoResult) -> None:
    names = sorted(path.name for path in shown.out.iterdir())
    assert names == [
        *("fused-2", "healed-2"),
        *("quality.png", "report.json", "report.md"),
    ]
    for name, row in (("fused-2", shown.rows[2]), ("healed-2", shown.rows[5])):
        found = evaluate_command(
            str(shown.out / name),
            str(demo.teacher_path()),
            tokens=1024,
            sequence_length=256,
            dtype="float32",
        )
        assert found.rows[1].kl == pytest.approx(row.kl, rel=1e-5)
        assert (shown.out / name / "README.md").is_file()
        assert read_record(shown.out / name).base.name
    healed = load_fused(shown.out / "healed-2")
    assert {parameter.dtype for parameter in healed.parameters()} == {torch.bfloat16}


def test_what_cannot_be_done_is_told_first(shown: DemoResult, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        run_demo(tmp_path / "out", device="cuda:1")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="exists already"):
        run_demo(shown.out, **SHORT)


def test_a_finished_one_may_be_replaced(
    shown: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shown.out, tmp_path / "out")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "fuse", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "out", overwrite=True, **SHORT)
    assert not (tmp_path / "out").exists(), "begun anew"
