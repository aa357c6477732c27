"""The whole job through the library: what it gives, keeps and shares."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import contents, write_text
from safetensors import safe_open
from tiny import tiny_tokenizer

from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.errors import UserError
from moefuse.modeling import load_fused
from moefuse.pipeline import FuseResult, Job, fuse

Tiny = Callable[..., Path]
Make = Callable[..., FuseResult]
VALUES: dict[str, Any] = {
    "groups": 3,
    "rank": 2,
    "tokens": 512,
    "sequence_length": 64,
    "batch_size": 4,
    "steps": 5,
    "batch_tokens": 64,
}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return {**VALUES, "data": str(write_text(tmp_path / "text.txt"))}


@pytest.fixture
def teacher(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def times(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_result_and_directory(teacher: Path, values: dict[str, Any], tmp_path: Path) -> None:
    result = fuse(teacher, tmp_path / "student", values)

    assert result.out == tmp_path / "student"
    assert {layer.groups for layer in result.plan.layers.values()} == {3}
    assert result.errors.keys() == {1, 2}
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["out"] == str(result.out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "student",
        teacher.name,
        "text.txt",
    ]
    tensors = 0
    with safe_open(result.out / "model.safetensors", framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            tensors += stored.get_tensor(name).nbytes
    assert tensors == result.plan.bytes
    config = json.loads((result.out / "config.json").read_text())
    assert config["moefuse"]["layers"].keys() == {"1", "2"}
    assert config["dtype"] == "float32"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (result.out / name).read_bytes() == (teacher / name).read_bytes()


def test_the_student_speaks(teacher: Path, values: dict[str, Any], tmp_path: Path) -> None:
    fuse(teacher, tmp_path / "student", {**values, "groups": 8, "rank": 0, "steps": 0})

    ids = tiny_tokenizer()("def add(first, second):", return_tensors="pt")["input_ids"]
    whole = StreamedTeacher(CheckpointReader.open(teacher), device="cpu", dtype=torch.float32)
    mask = torch.ones_like(ids)
    hidden, received = whole.embed(ids, mask)
    for layer in range(3):
        with whole.loaded(layer) as module:
            hidden = whole.forward_layer(module, hidden, received[layer])
    student = load_fused(tmp_path / "student").eval()
    with torch.no_grad():
        found = student.model(ids, output_hidden_states=True)
        norm = student.model.norm(hidden)
    torch.testing.assert_close(found.last_hidden_state, norm, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_command_writes_the_same_bytes(
    count: int,
    teacher: Path,
    values: dict[str, Any],
    tmp_path: Path,
    threads: Callable[[int], None],
) -> None:
    threads(count)
    for name in ("first", "second"):
        fuse(teacher, tmp_path / name / "student", values)

    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_another_seed_writes_other_bytes(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    for seed in (0, 1):
        fuse(teacher, tmp_path / str(seed) / "student", {**values, "seed": seed})

    assert contents(tmp_path / "0") != contents(tmp_path / "1")


def test_two_sizes_share_a_calibration(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    fuse(teacher, tmp_path / "large", values, work=work)
    (calibration,) = work.glob("calibration-*")
    before, made = times(calibration), times(work)

    small = {**values, "groups": 2, "rank": 1}
    fuse(teacher, tmp_path / "shared" / "small", small, work=work)

    assert times(calibration) == before
    assert times(work).items() >= made.items()
    assert len(list(work.glob("calibration-*"))) == 1
    assert len(list(work.glob("distilled-*"))) == 2
    fuse(teacher, tmp_path / "fresh" / "small", small)
    assert contents(tmp_path / "shared") == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"steps": 6}, {"distilled"}),
        ({"seed": 1}, {"distilled"}),
        ({"damping": 0.5}, {"factors", "distilled"}),
        ({"rank": 3}, {"factors", "distilled"}),
        ({"grouping": "coactivation"}, {"groups", "factors", "distilled"}),
        ({"tokens": 448}, {"calibration", "groups", "factors", "distilled"}),
        ({"max_shard": "20KB"}, set()),
    ],
    ids=",".join,
)
def test_only_what_a_setting_changes_is_made_again(
    change: dict[str, Any], again: set[str], teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    def places(given: dict[str, Any]) -> dict[str, Path]:
        job = Job(teacher, tmp_path / "work", given)
        return {
            "calibration": job.store.directory,
            "groups": job.groups_directory,
            "factors": job.factors_directory,
            "distilled": job.distilled_directory,
        }

    before, after = places(values), places({**values, **change})

    assert {name for name, place in before.items() if after[name] != place} == again
    assert all(place.name.startswith(name) for name, place in before.items())


def test_a_checkpoint_is_known_wherever_it_lies(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    first = Job(teacher, tmp_path / "work", values).distilled_directory
    moved = teacher.rename(tmp_path / "moved")

    assert Job(moved, tmp_path / "work", values).distilled_directory == first


def test_without_resume_all_is_made_again(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    fuse(teacher, tmp_path / "student", values, work=work)
    made, student = times(work), contents(tmp_path / "student")

    fuse(teacher, tmp_path / "student", values, work=work, resume=False, overwrite=True)

    assert contents(tmp_path / "student") == student
    again = times(work)
    assert again.keys() == made.keys()
    unchanged = {path for path, time in made.items() if again[path] == time}
    assert all(path.name.startswith("checked-") for path in unchanged)


def test_no_steps_leave_the_student_one_shot(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    fuse(teacher, tmp_path / "student", {**values, "steps": 0}, work=work)

    assert not list(work.glob("distilled-*"))
    assert load_fused(tmp_path / "student") is not None


def test_shards_are_as_large_as_asked(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    fuse(teacher, tmp_path / "one" / "student", values)
    fuse(teacher, tmp_path / "many" / "student", {**values, "max_shard": "30KB"})

    shards = sorted((tmp_path / "many" / "student").glob("*.safetensors"))
    assert len(shards) > 4
    assert all(path.stat().st_size < 40_000 for path in shards)
    one, many = (load_fused(tmp_path / name / "student") for name in ("one", "many"))
    state = many.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_other_shards_are_another_output(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    work, out = tmp_path / "work", tmp_path / "student"
    fuse(teacher, out, values, work=work)

    fuse(teacher, out, {**values, "max_shard": "30KB"}, work=work, overwrite=True)

    assert len(list(out.glob("*.safetensors"))) > 4


def test_overwrite_replaces_all_of_it(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "student"
    fuse(teacher, out, {**values, "max_shard": "30KB"})
    (out / "notes.txt").write_text("of the old one")
    with pytest.raises(UserError, match="exists already"):
        fuse(teacher, out, values)

    fuse(teacher, out, values, overwrite=True)

    assert not (out / "notes.txt").exists()
    fuse(teacher, tmp_path / "fresh" / "student", values)
    assert contents(out) == contents(tmp_path / "fresh" / "student")


def test_an_older_jobs_leavings_do_not_matter(
    teacher: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    """OUT.work of a job that was never finished, with other settings, is used and removed."""
    Job(teacher, tmp_path / "student.work", {**values, "rank": 5}).calibrate()

    fuse(teacher, tmp_path / "student", values)

    assert not (tmp_path / "student.work").exists()


def test_bf16_is_kept(tiny_checkpoint: Tiny, values: dict[str, Any], tmp_path: Path) -> None:
    from tiny import save_tiny

    save_tiny(tmp_path / "half", dtype=torch.bfloat16)

    result = fuse(tmp_path / "half", tmp_path / "student", values)

    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as stored:
        dtypes = {stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    assert dtypes == {torch.bfloat16, torch.int64}
    assert result.plan.bytes < 120_000
