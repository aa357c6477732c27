"""Where work and results may lie: checked before any work, so that nothing is lost in the end."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from moefuse.errors import UserError


def existing_parent(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest directory above it that does."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def check_place(path: Path) -> None:
    """Refuse a path where no directory can be made or filled; raises ``UserError``."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(
            f"{path} reads like a URL; give a directory, on a file system that is mounted."
        )
    parent = existing_parent(path)
    if not parent.is_dir():
        raise UserError(f"{path} cannot be a directory: {parent} is a file; choose another path.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: {parent} is read-only; choose another path.")


def check_new(path: Path) -> None:
    """Refuse a path that cannot be the name of a new directory; raises ``UserError``."""
    if path.name in ("", ".."):
        raise UserError(f"{path} is no name for a new directory; give one, such as ./student.")
    check_place(path)


def check_output(
    out: Path, *, overwrite: bool, mark: str = "config.json", what: str = "checkpoint"
) -> None:
    """Refuse an output that exists, unless it may be replaced; raises ``UserError``.

    Only a ``what``, known by its file ``mark``, may be replaced.
    """
    check_new(out)
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; choose another name or pass --overwrite.")
    if any(out.iterdir()) and not (out / mark).is_file():
        raise UserError(
            f"{out} holds something that is no {what}, so --overwrite does not replace it; "
            "choose another name or remove it."
        )


def check_outside(path: Path, checkpoint: Path, what: str) -> None:
    """Refuse ``path``, which is to be ``what``, within a checkpoint; raises ``UserError``."""
    if path.resolve().is_relative_to(checkpoint.resolve()):
        raise UserError(f"The {what} {path} lies in the checkpoint {checkpoint}; choose another.")


def check_own(work: Path, starts: Iterable[str]) -> None:
    """Refuse to take for our own, and in the end remove, what holds something of the user's.

    ``starts`` are the beginnings of our own files' names. Raises ``UserError``.
    """
    found = sorted(path for path in work.iterdir()) if work.is_dir() else []
    strangers = [path for path in found if not path.name.startswith(tuple(starts))]
    if strangers:
        raise UserError(
            f"{strangers[0]} is none of moefuse's files, and {work} is removed in the end; choose "
            "another output or a --work directory."
        )


def size_of(directory: Path) -> int:
    """Return how many bytes the files in ``directory`` and below have; 0 where it is not there."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
