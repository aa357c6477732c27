"""Killed at any instant, the same command goes on and gives the same bytes."""

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import SIZE, SMALL, changes, contents, run_elsewhere, write_text
from tiny import save_tiny

SEED = 5
STAGES = ("calibration-", "groups-", "factors-", "distilled-", "student.partial", "removal")


@dataclass(frozen=True)
class Job:
    """A job that ran uninterrupted: its command but for OUT, what it wrote and did in order."""

    command: tuple[str | Path, ...]
    student: dict[str, bytes]
    changes: list[list[str]]

    def fuse(self, folder: Path, *more: str | Path, die_at: int | None = None) -> int:
        checkpoint, *settings = self.command
        log, out = folder / "log", folder / "student"
        return run_elsewhere(log, "fuse", checkpoint, out, *settings, *more, die_at=die_at)

    def instants(self, stage: str) -> list[int]:
        """Return which changes belong to a stage, counted from 1."""
        of_stage = [at for at, (_, path) in enumerate(self.changes, start=1) if stage in path]
        if stage != "removal":
            return of_stage
        out_appears = max(
            at for at, (_, path) in enumerate(self.changes, start=1) if "student.partial" in path
        )
        return list(range(out_appears + 1, len(self.changes) + 1))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_tiny(folder / "teacher")
    data = write_text(folder / "text.txt")
    command = (folder / "teacher", *SIZE, *SMALL, "--data", data)
    unknown = Job(command, {}, [])
    assert unknown.fuse(folder) == 0, (folder / "log").read_text()
    return Job(command, contents(folder / "student"), changes(folder / "log"))


def assert_finished(job: Job, folder: Path) -> None:
    assert contents(folder / "student") == job.student
    left = {path.name for path in folder.iterdir()} - {"log", "log.changes"}
    assert left == {"student"}


def sample(job: Job, stage: str, count: int = 4) -> list[int]:
    """Choose a stage's first and last instant and some between, the same ones every time."""
    instants = job.instants(stage)
    between = random.Random(SEED).sample(instants[1:-1], min(count - 2, len(instants) - 2))
    return sorted({instants[0], instants[-1], *between})


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage(job: Job, stage: str, tmp_path: Path) -> None:
    for at in sample(job, stage):
        folder = tmp_path / str(at)
        folder.mkdir()

        assert job.fuse(folder, die_at=at) == -signal.SIGKILL
        assert (folder / "student").exists() == (stage == "removal")

        assert job.fuse(folder) == 0, (at, (folder / "log").read_text())
        assert_finished(job, folder)


def test_killed_between_two_renames(job: Job, tmp_path: Path) -> None:
    renames = [at for at, (kind, _) in enumerate(job.changes, start=1) if kind == "os.rename"]
    for at in random.Random(SEED).sample(renames, 6):
        folder = tmp_path / str(at)
        folder.mkdir()

        # The change after a rename: the renamed file is there and nothing that follows from it.
        assert job.fuse(folder, die_at=at + 1) == -signal.SIGKILL
        assert job.fuse(folder) == 0, (at, (folder / "log").read_text())
        assert_finished(job, folder)


def test_killed_again_and_again(job: Job, tmp_path: Path) -> None:
    kills = 0
    while job.fuse(tmp_path, die_at=41) == -signal.SIGKILL:
        kills += 1
        assert kills < 20
    assert kills > 2
    assert_finished(job, tmp_path)
