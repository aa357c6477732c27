"""Killed at any instant, the same command goes on and gives the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import SIZE, SMALL, changes, contents, run_elsewhere, write_jsonl, write_text
from tiny import save_tiny

SEED = 5
STAGES = (
    "calibration-",
    "groups-",
    "factors-",
    "distilled-",
    "measured-",
    "held-out-",
    "student.partial",
    "removal",
)
INTERRUPTED = "moefuse: interrupted; the same command goes on from here."


@dataclass(frozen=True)
class Job:
    """A job that ran uninterrupted: its command but for OUT, what it wrote and did in order."""

    command: tuple[str | Path, ...]
    student: dict[str, bytes]
    changes: list[list[str]]

    def arguments(self, folder: Path) -> list[str | Path]:
        checkpoint, *settings = self.command
        return ["fuse", checkpoint, folder / "student", *settings]

    def fuse(
        self,
        folder: Path,
        *more: str | Path,
        die_at: int | None = None,
        by: signal.Signals = signal.SIGKILL,
        die_after: float | None = None,
    ) -> int:
        command = (*self.arguments(folder), *more)
        return run_elsewhere(folder / "log", *command, die_at=die_at, by=by, die_after=die_after)

    def instants(self, stage: str) -> list[int]:
        """Return which changes belong to a stage, counted from 1."""
        paths = list(enumerate((path for _, path in self.changes), start=1))
        appears = max(at for at, path in paths if "student.partial" in path)
        if stage == "removal":
            return list(range(appears + 1, len(paths) + 1))
        return [at for at, path in paths if stage in path and at <= appears]

    def sample(self, stage: str, count: int = 3) -> list[int]:
        """Choose a stage's first and last instant and some between, the same ones every time."""
        instants = self.instants(stage)
        between = random.Random(SEED).sample(instants[1:-1], min(count - 2, len(instants) - 2))
        return sorted({instants[0], instants[-1], *between})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_tiny(folder / "teacher")
    data = write_text(folder / "text.txt")
    held_out = write_jsonl(folder / "held.jsonl")
    command = (folder / "teacher", *SIZE, *SMALL, "--data", data, "--held-out", held_out)
    unknown = Job(command, {}, [])
    assert unknown.fuse(folder) == 0, (folder / "log").read_text()
    return Job(command, contents(folder / "student"), changes(folder / "log"))


def assert_finished(job: Job, folder: Path) -> None:
    assert contents(folder / "student") == job.student
    left = {path.name for path in folder.iterdir()} - {"log", "log.changes"}
    assert left == {"student"}


def new_folder(parent: Path, name: int | str) -> Path:
    folder = parent / str(name)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage(job: Job, stage: str, tmp_path: Path) -> None:
    for at in job.sample(stage):
        folder = new_folder(tmp_path, at)

        assert job.fuse(folder, die_at=at) == -signal.SIGKILL
        assert (folder / "student").exists() == (stage == "removal")

        assert job.fuse(folder) == 0, (at, (folder / "log").read_text())
        assert_finished(job, folder)


def test_killed_between_two_renames(job: Job, tmp_path: Path) -> None:
    renames = [at for at, (kind, _) in enumerate(job.changes, start=1) if kind == "os.rename"]
    for at in random.Random(SEED).sample(renames, 4):
        folder = new_folder(tmp_path, at)

        # Before the change that follows a rename: the renamed is there, nothing else of it is.
        assert job.fuse(folder, die_at=at + 1) == -signal.SIGKILL
        assert job.fuse(folder) == 0, (at, (folder / "log").read_text())
        assert_finished(job, folder)


def test_killed_at_any_time(job: Job, tmp_path: Path) -> None:
    """While it computes, too, and not only around its changes to files."""
    begin = time.monotonic()
    assert job.fuse(new_folder(tmp_path, "whole")) == 0
    whole = time.monotonic() - begin
    kills = 0
    for at, share in enumerate(random.Random(SEED).random() for _ in range(4)):
        folder = new_folder(tmp_path, at)
        kills += job.fuse(folder, die_after=share * whole) == -signal.SIGKILL
        if not (folder / "student").exists() or (folder / "student.work").exists():
            assert job.fuse(folder) == 0, (folder / "log").read_text()
        assert_finished(job, folder)
    assert kills > 0


def test_killed_again_and_again(job: Job, tmp_path: Path) -> None:
    kills = 0
    while job.fuse(tmp_path, die_at=41) == -signal.SIGKILL:
        kills += 1
        assert kills < 20
    assert kills > 2
    assert_finished(job, tmp_path)


def test_killed_after_the_output_appeared_with_a_kept_work_directory(
    job: Job, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    assert job.fuse(tmp_path, "--work", work) == 0
    written = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}

    assert job.fuse(tmp_path, "--work", work) == 0

    assert contents(tmp_path / "student") == job.student
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert changes(tmp_path / "log") == []


@pytest.mark.parametrize("stage", ["calibration-", "distilled-", "student.partial"])
def test_interrupted_from_the_keyboard(job: Job, stage: str, tmp_path: Path) -> None:
    instants = job.instants(stage)
    at = instants[len(instants) // 2]

    assert job.fuse(tmp_path, die_at=at, by=signal.SIGINT) == 130
    words = (tmp_path / "log").read_text().splitlines()
    assert words[-1] == INTERRUPTED
    assert not any("Traceback" in line for line in words)

    assert job.fuse(tmp_path) == 0
    assert_finished(job, tmp_path)


def test_overwriting_leaves_the_old_or_the_new_whole(job: Job, tmp_path: Path) -> None:
    old = {"config.json": b"{}", "deep/er": b"too", "model.safetensors": b"old"}

    def with_old(name: int | str) -> Path:
        folder = new_folder(tmp_path, name)
        for path, text in old.items():
            target = folder / "student" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
        return folder

    assert job.fuse(with_old("whole"), "--overwrite") == 0
    assert_finished(job, tmp_path / "whole")
    done = enumerate(changes(tmp_path / "whole" / "log"), start=1)
    aside = next(at for at, (_, path) in done if path.endswith("/student"))
    found = []
    for at in range(aside, aside + 5):
        folder = with_old(at)
        assert job.fuse(folder, "--overwrite", die_at=at) == -signal.SIGKILL
        found.append(contents(folder / "student"))
        assert job.fuse(folder, "--overwrite") == 0
        assert_finished(job, folder)
    assert found == [old, {}, job.student, job.student, job.student]


# Through the command itself, as a user would.


def start(job: Job, folder: Path, *more: str) -> subprocess.Popen[str]:
    program = Path(sys.executable).with_name("moefuse")
    # A shell's background job, as CI may be, starts its processes deaf to Ctrl-C.
    hearing = ("env", "--default-signal=INT")
    command = [str(part) for part in (*hearing, program, *job.arguments(folder), *more)]
    # One thread, as in the run to compare with: another number sums in another order.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=alone,
    )


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < end
        time.sleep(0.001)


def test_the_command_itself_is_killed_and_goes_on(job: Job, tmp_path: Path) -> None:
    with start(job, tmp_path) as process:
        wait_for(tmp_path, "student.work/calibration-*/layer-001", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "student").exists()

    with start(job, tmp_path) as process:
        _, err = process.communicate(timeout=120)

    assert process.returncode == 0, err
    assert "Checking weights" not in err
    assert "Calibrate layer 0" not in err
    assert_finished(job, tmp_path)


def test_the_command_itself_is_interrupted(job: Job, tmp_path: Path) -> None:
    with start(job, tmp_path, "--steps", "1000000") as process:
        wait_for(tmp_path, "student.work/factors-*/layer-002.safetensors", process)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == INTERRUPTED
    assert "Traceback" not in err
    shutil.rmtree(tmp_path / "student.work")
    assert not any(tmp_path.iterdir())
