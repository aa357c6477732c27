"""What comes next is read while something else goes on, into the system's cache and no further."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefuse.checkpoint import read_ahead as module
from moefuse.checkpoint.read_ahead import Range, ReadAhead
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher

linux = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
SIZE = 5_000_000


def bytes_read() -> int:
    """Return how many bytes this process has read from files so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def eventually(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while time.monotonic() < end and not true():
        time.sleep(0.01)
    return true()


def threads() -> int:
    return sum(thread.name == "read ahead" for thread in threading.enumerate())


def parts(path: Path, count: int = 4) -> list[Range]:
    """Cut a new file into ranges called 0, 1, ..."""
    path.write_bytes(os.urandom(count * SIZE))
    return [Range(str(n), path, n * SIZE, SIZE) for n in range(count)]


@linux
def test_all_is_read_once_while_nobody_waits(tmp_path: Path) -> None:
    ranges = parts(tmp_path / "file")
    before, ahead = bytes_read(), ReadAhead()

    ahead.start(ranges)

    assert eventually(lambda: bytes_read() - before >= 4 * SIZE)
    for entry in ranges:
        ahead.wait_for([entry.name])
    assert bytes_read() - before < 4.5 * SIZE
    assert eventually(lambda: not threads())
    assert 0 <= ahead.waited_seconds < 5


@linux
def test_without_room_it_reads_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPARE_SHARE", 0.0)
    ranges = parts(tmp_path / "file")
    before, ahead = bytes_read(), ReadAhead()

    ahead.start(ranges)
    time.sleep(0.1)
    assert bytes_read() - before < SIZE
    ahead.wait_for(["1"])
    time.sleep(0.1)

    assert 2 * SIZE <= bytes_read() - before < 3 * SIZE
    ahead.wait_for(["3"])
    assert bytes_read() - before >= 4 * SIZE


@linux
def test_nothing_of_it_stays_in_the_process(tmp_path: Path) -> None:
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    ranges = parts(tmp_path / "file", 20)
    ahead, before = ReadAhead(), anonymous()

    ahead.start(ranges)
    ahead.wait_for([entry.name for entry in ranges])

    assert anonymous() - before < 3 * module.PIECE_BYTES


def test_what_is_begun_anew_ends_what_was_begun_before(tmp_path: Path) -> None:
    ahead = ReadAhead()
    for number in range(5):
        ahead.start(parts(tmp_path / f"{number}"))
        assert threads() <= 1
    ahead.wait_for(["0", "1", "2", "3"])


def test_names_that_are_not_read_ahead_are_not_waited_for(tmp_path: Path) -> None:
    ahead = ReadAhead()
    ahead.wait_for(["something"])
    ahead.start(parts(tmp_path / "file"))

    ahead.wait_for(["something else"])


def test_errors_reach_who_waits_and_who_goes_on(tmp_path: Path) -> None:
    ranges = parts(tmp_path / "file")
    ahead = ReadAhead()
    os.truncate(tmp_path / "file", 2 * SIZE + 1)

    ahead.start(ranges)
    ahead.wait_for(["1"])
    with pytest.raises(OSError, match="became shorter while it was read"):
        ahead.wait_for(["2"])

    missing = [Range("0", tmp_path / "missing", 0, 1)]
    ahead.start(missing)
    assert eventually(lambda: not threads())
    with pytest.raises(FileNotFoundError):
        ahead.start(ranges)


@linux
def test_the_next_layer_is_read_while_one_is_held(tiny_checkpoint: Callable[..., Path]) -> None:
    reader = CheckpointReader.open(tiny_checkpoint())
    teacher = StreamedTeacher(reader, device="cpu", dtype=torch.float32)
    names = [name for name in reader.tensors if name.startswith("model.layers.1.")]
    following = sum(reader.tensors[name].nbytes for name in names)

    with teacher.loaded(0):
        assert eventually(lambda: reader._ahead._reading is not None and not threads())
        reading = reader._ahead._reading
        assert reading is not None
        assert sum(entry.size for entry in reading._ranges) == following
    with teacher.loaded(1):
        pass
    assert reader.waited_seconds < 5


HANGING = """
import signal
import sys
from pathlib import Path
from moefuse.checkpoint.read_ahead import Range, ReadAhead

# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ahead = ReadAhead()
ahead.start([Range("never", Path(sys.argv[1]), 0, 1)])
print("waiting", flush=True)
if sys.argv[2] == "wait":
    ahead.wait_for(["never"])
"""


@pytest.mark.parametrize("how", ["wait", "leave"])
def test_a_disk_that_hangs_does_not_keep_a_program_from_ending(how: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs")
    command = [sys.executable, "-c", HANGING, str(tmp_path / "hangs"), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        if how == "wait":
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        try:
            _, printed = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == (-signal.SIGINT if how == "wait" else 0)
    assert (b"KeyboardInterrupt" in printed) == (how == "wait")
