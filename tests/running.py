"""Running the command line from tests: in this process, or in one that may be killed.

Importing torch and transformers takes seconds, so processes to be killed are forked from a server
that has imported them once. They are real processes and get a real SIGKILL.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MADE_OF = [
    "def",
    "add",
    "first",
    "second",
    "return",
    "lines",
    "line",
    "while",
    "total",
    "done",
    "not",
    "for",
    "in",
    "print",
]
CALIBRATION = ("--tokens", "512", "--sequence-length", "64", "--batch-size", "4")
SMALL = (*CALIBRATION, "--steps", "5", "--batch-tokens", "64")
SIZE = ("--groups", "3", "--rank", "2")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["running", "moefuse.pipeline", "moefuse.planning", "moefuse.heal"])


def write_text(path: Path, lines: int = 120) -> Path:
    """Write words of the tiny tokenizer's alphabet to ``path`` and return it."""
    words = random.Random(0)
    path.write_text("\n".join(" ".join(words.choices(MADE_OF, k=12)) for _ in range(lines)))
    return path


def write_jsonl(path: Path, documents: int = 5, words: int = 60) -> Path:
    """Write documents of words of the tiny tokenizer's alphabet to ``path`` and return it."""
    chosen = random.Random(1)
    texts = [" ".join(chosen.choices(MADE_OF, k=words)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory by its name."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def run_here(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Ran:
    """Run the command line in this process."""
    from moefuse.cli import main

    capfd.readouterr()
    before, sys.argv = sys.argv, ["moefuse", *map(str, arguments)]
    status: Any = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = before
    printed = capfd.readouterr()
    return Ran(status, printed.out, printed.err)


# What follows runs in processes of its own.


def run_elsewhere(
    log: Path,
    *arguments: str | Path,
    die_at: int | None = None,
    by: signal.Signals = signal.SIGKILL,
    die_after: float | None = None,
    largest: int | None = None,
) -> int:
    """Run the command line in another process and return its exit status, minus a signal's.

    Its words go to ``log``. Just before it changes the file system for the ``die_at``-th time it
    sends itself the signal ``by``; without that it leaves a list of all changes in ``log`` +
    ``.changes``. After ``die_after`` seconds it is killed from outside, whatever it is doing. No
    file may get more than ``largest`` bytes.
    """
    process = _server.Process(target=_run, args=(log, [*map(str, arguments)], die_at, by, largest))
    process.start()
    process.join(die_after)
    if process.is_alive() and die_after is not None:
        process.kill()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def changes(log: Path) -> list[list[str]]:
    """Return what an uninterrupted process changed, in order: kind of change and path."""
    return json.loads(Path(f"{log}.changes").read_text())


def _run(
    log: Path,
    arguments: list[str],
    die_at: int | None,
    by: signal.Signals,
    largest: int | None,
) -> None:
    import torch

    from moefuse.cli import main

    torch.set_num_threads(1)
    # A shell's background job, as CI may be, starts its processes deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    seen: list[list[str]] = []
    sys.addaudithook(_Watch(log.parent, seen, die_at, by))
    sys.argv = ["moefuse", *arguments]
    status: Any = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    found = list(seen)
    Path(f"{log}.changes").write_text(json.dumps(found))
    os._exit(status)


class _Watch:
    """Counts changes to files below a directory; a hook that Python calls before each of them."""

    KINDS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "open")

    def __init__(
        self, below: Path, seen: list[list[str]], die_at: int | None, by: signal.Signals
    ) -> None:
        self.below, self.seen, self.die_at, self.by = str(below), seen, die_at, by

    def __call__(self, kind: str, details: tuple[Any, ...]) -> None:
        if kind not in self.KINDS or not self._counts(kind, details):
            return
        self.seen.append([kind, str(details[0])])
        if len(self.seen) == self.die_at:
            os.kill(os.getpid(), self.by)

    def _counts(self, kind: str, details: tuple[Any, ...]) -> bool:
        if kind == "open" and not details[2] & (os.O_WRONLY | os.O_RDWR):
            return False
        path = details[0]
        if not isinstance(path, str | Path):
            return False
        # Removing a tree names files relative to a descriptor of their directory.
        return str(path).startswith(self.below) or kind in ("os.remove", "os.rmdir")
