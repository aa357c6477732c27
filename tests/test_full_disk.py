"""A full disk ends a job with one sentence; once there is space, it goes on from there."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import CALIBRATION, SIZE, SMALL, contents, run_elsewhere, write_text
from tiny import save_tiny

SENTENCE = "what is finished is kept: free space there and run the same command again."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny(folder / "teacher")
    write_text(folder / "text.txt")
    return folder


def told(log: Path) -> str:
    """Return the sentence that a command ended with."""
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("moefuse: "))
    assert "Traceback" not in log.read_text()
    return line


def sizes(directory: Path) -> list[int]:
    return sorted(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_job_goes_on_with_the_same_bytes(teacher: Path, tmp_path: Path) -> None:
    """Files that grow too large are what a full disk looks like to who writes them."""
    data = ("--data", teacher / "text.txt")
    more = (*SIZE, *SMALL, *data, "--work", tmp_path / "work")
    job = ("fuse", teacher / "teacher", tmp_path / "student", *more)
    assert run_elsewhere(tmp_path / "log", *job) == 0, (tmp_path / "log").read_text()
    expected = contents(tmp_path / "student")
    written = sizes(tmp_path / "work") + sizes(tmp_path / "student")
    failed: set[str] = set()
    again = tmp_path / "again"
    job = ("fuse", teacher / "teacher", again / "student", *more[:-1], again / "work")
    again.mkdir()

    # Ever more of the job fits, from the recorded calls of the first layer to the student's shard.
    for largest in sorted({size - 1 for size in written if size > 4096}):
        assert run_elsewhere(tmp_path / "log", *job, largest=largest) == 2
        line = told(tmp_path / "log")
        assert line.startswith("moefuse: The disk that holds ")
        assert line.endswith(f"is full (File too large); {SENTENCE}")
        failed.add(line.split(" is full")[0].rpartition("/")[2].split("-")[0].split(".")[0])

    assert run_elsewhere(tmp_path / "log", *job) == 0
    assert contents(again / "student") == expected
    assert {"batch", "model"} <= failed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        made = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(teacher: Path, small_disk: Path, tmp_path: Path) -> None:
    work, log = small_disk / "work", tmp_path / "log"
    flags = (teacher / "teacher", work, *CALIBRATION, "--data", teacher / "text.txt")
    assert run_elsewhere(log, "calibrate", *flags) == 0, log.read_text()
    assert run_elsewhere(log, "group", *flags, *SIZE) == 0, log.read_text()
    before = contents(work)
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="space"), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

    assert run_elsewhere(log, "factor", *flags, *SIZE) == 2
    assert f"is full (No space left on device); {SENTENCE}" in told(log)
    assert contents(work) == before

    ballast.unlink()
    assert run_elsewhere(log, "factor", *flags, *SIZE) == 0, log.read_text()
