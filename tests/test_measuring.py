"""What a student is measured on for its card, and that the card tells the truth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from running import Ran, contents, run_here, write_jsonl, write_text

from moefuse import demo
from moefuse.cards import Metrics, read_record
from moefuse.errors import UserError
from moefuse.evaluation.rows import Row
from moefuse.evaluation.run import evaluate_command
from moefuse.measuring import LEAST_LEFT_OVER, LEFT_OVER
from moefuse.pipeline import Job, fuse

Tiny = Callable[..., Path]
VALUES: dict[str, Any] = {
    "groups": 3,
    "rank": 2,
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 5,
    "batch_tokens": 64,
}
OF_NEURONS = {**VALUES, "groups": None, "rank": None, "expert_bits": 3.0, "sensitivity_tokens": 256}


@pytest.fixture
def teacher(tiny_checkpoint: Tiny) -> Path:
    directory = tiny_checkpoint()
    (directory / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Tiny\n")
    (directory / "LICENSE").write_text("do as you like")
    return directory


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {**VALUES, "data": str(write_text(tmp_path / "text.txt"))}


@pytest.mark.parametrize("form", [VALUES, OF_NEURONS], ids=["deltas", "neurons"])
@pytest.mark.parametrize("steps", [0, 5])
def test_the_card_has_the_figures_of_the_written_student(
    form: dict[str, Any], steps: int, teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", documents=6)
    given = {**values, **form, "steps": steps, "held_out": str(held_out)}
    fuse(teacher, tmp_path / "student", {**given, "data": values["data"]})

    record = read_record(tmp_path / "student")
    assert record.measured is not None
    assert record.measured.data.documents == 6
    original, student = record.measured.stages
    assert student.stage == ("distilled" if steps else "one-shot")
    assert student.kl is not None and student.kl > 0.001
    out = str(tmp_path / "student")
    rows = evaluate_command(out, str(teacher), str(held_out), sequence_length=64).rows
    for metrics, size, row in zip(
        (original, student), (record.original, record.student), rows, strict=True
    ):
        assert record.measured.data.tokens == row.tokens
        assert_alike(metrics, row)
        assert (size.parameters, size.bytes) == (row.parameters, row.total_bytes)
        assert size.active_parameters == row.active_parameters
        assert size.expert_bytes == row.expert_bytes


def assert_alike(metrics: Metrics, row: Row) -> None:
    for name in ("cross_entropy", "perplexity", "kl", "agreement"):
        value = getattr(metrics, name)
        if metrics.stage == "teacher" and name in ("kl", "agreement"):
            assert value is None
            continue
        assert value == pytest.approx(getattr(row, name), rel=1e-3)
        assert row.intervals is not None
        assert metrics.intervals[name] == pytest.approx(row.intervals[name], rel=2e-3)


def test_the_licence_comes_along_and_no_path_does(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl")
    out = tmp_path / "student"
    fuse(teacher, out, {**values, "held_out": str(held_out)})

    data = ModelCard.load(out / "README.md").data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("mit", "en", teacher.name)
    assert (out / "LICENSE").read_text() == "do as you like"
    for name in ("README.md", "moefuse_card.json", "config.json"):
        assert str(tmp_path) not in (out / name).read_text()
    record = read_record(out)
    assert record.calibrated.name == "text.txt"
    assert record.calibrated.tokens == 512
    assert record.distilled.steps == 5
    assert record.distilled.errors.keys() == {"1", "2"}


def test_without_held_out_text_the_card_says_so(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    fuse(teacher, tmp_path / "student", values)

    told = " ".join((tmp_path / "student" / "README.md").read_text().split())
    assert "Not measured (no text was held out). To see how far" in told
    assert not (tmp_path / "student" / "quality.png").exists()


def test_documents_that_calibration_left_over(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "many.jsonl", documents=60)
    given = {**values, "data": str(data)}
    job = Job(teacher, tmp_path / "work", given)
    held_out = job.held_out
    assert held_out is not None
    assert sum(map(len, held_out.sequences)) >= LEAST_LEFT_OVER
    calibrated = {
        tuple(ids_S[mask_S.bool()].tolist())
        for ids_BS, mask_BS in job.batches
        for ids_S, mask_S in zip(ids_BS, mask_BS, strict=True)
    }
    assert not calibrated & {tuple(sequence.tolist()) for sequence in held_out.sequences}

    fuse(teacher, tmp_path / "student", given)

    measured = read_record(tmp_path / "student").measured
    assert measured is not None
    assert (measured.note, measured.data.name) == (LEFT_OVER, "many.jsonl")
    assert LEFT_OVER in " ".join((tmp_path / "student" / "README.md").read_text().split())


def test_too_little_left_over_is_not_measured_on(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "few.jsonl", documents=6)

    assert Job(teacher, tmp_path / "work", {**values, "data": str(data)}).held_out is None


def test_no_tokens_leave_the_student_unmeasured(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl")

    job = Job(
        teacher, tmp_path / "work", {**values, "held_out": str(held_out), "held_out_tokens": 0}
    )

    assert job.held_out is None


def test_the_bundled_teacher_has_a_text_of_its_own(tmp_path: Path) -> None:
    held_out = Job(demo.teacher_path(), tmp_path / "work", {"groups": 2, "tokens": 512}).held_out

    assert held_out is not None
    assert held_out.name == "heldout.jsonl"
    assert sum(map(len, held_out.sequences)) == 12_288


def test_two_sizes_share_the_teachers_hidden_states(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work, given = tmp_path / "work", {**values, "held_out": str(write_jsonl(tmp_path / "h.jsonl"))}
    fuse(teacher, tmp_path / "shared" / "large", {**given, "groups": 4}, work=work)
    (hidden,) = work.glob("held-out-*")
    before = {path: path.stat().st_mtime_ns for path in hidden.rglob("*")}

    fuse(teacher, tmp_path / "shared" / "small", given, work=work)

    assert {path: path.stat().st_mtime_ns for path in hidden.rglob("*")} == before
    assert len(list(work.glob("measured-*"))) == 2
    assert not list(work.glob("measured-*/passed"))
    fuse(teacher, tmp_path / "fresh" / "small", given)
    shared = contents(tmp_path / "shared" / "small")
    assert shared == contents(tmp_path / "fresh" / "small")


def test_another_held_out_text_is_another_output(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "student"
    fuse(teacher, out, values, work=work)
    held_out = str(write_jsonl(tmp_path / "held.jsonl"))
    with pytest.raises(UserError, match="exists already"):
        fuse(teacher, out, {**values, "held_out": held_out}, work=work)

    fuse(teacher, out, {**values, "held_out": held_out}, work=work, overwrite=True)

    assert read_record(out).measured is not None


@pytest.fixture
def run(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Callable[..., Ran]:
    write_text(tmp_path / "text.txt")
    write_jsonl(tmp_path / "held.jsonl")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(capfd, *arguments)


FLAGS = (
    *("--groups", "3", "--rank", "2", "--tokens", "512", "--sequence-length", "64"),
    *("--batch-size", "4", "--steps", "5", "--batch-tokens", "64", "--data", "text.txt"),
)
MEASURE = ("--held-out", "held.jsonl", "--held-out-tokens", "200")


def test_assemble_measures_what_fuse_measures(run: Callable[..., Ran], tmp_path: Path) -> None:
    fused = run("fuse", "teacher-deepseek_v2", "a/student", *FLAGS, *MEASURE, "--work", "work")
    assert fused.status == 0, fused.err

    ran = run("assemble", "teacher-deepseek_v2", "work", "b/student", *FLAGS, *MEASURE)

    assert ran.status == 0, ran.err
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    record = json.loads((tmp_path / "b/student/moefuse_card.json").read_text())
    assert 150 < record["measured"]["data"]["tokens"] < 200


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--held-out", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--held-out-tokens", "-1"), "--held-out-tokens is -1; it must be at least 0"),
    ],
)
def test_mistakes_are_told_before_any_work(
    flags: tuple[str, ...], told: str, run: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = run("fuse", "teacher-deepseek_v2", "student", *FLAGS, *flags)

    assert ran.status == 2
    (line,) = ran.err.splitlines()
    assert told in line
    assert not list(tmp_path.glob("student*"))
