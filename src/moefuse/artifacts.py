"""What passes between stages: files that are either whole or absent.

Every file is written under a temporary name in the same directory, flushed to the disk and then
renamed, so that a kill at any instant leaves either the old file or the new one. Stages decide what
is left to do by looking at which files exist.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open

from moefuse.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_SUFFIX = ".partial"
REPLACED_SUFFIX = ".replaced" + TEMPORARY_SUFFIX
# No space, a quota that is used up, a file larger than the file system or the shell allows.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Return the user's umask, which can only be read by setting it."""
    current = os.umask(0o077)
    os.umask(current)
    return current


def give_usual_mode(path: Path) -> None:
    """Let others read the file ``path`` as the user's umask has it; safetensors lets nobody."""
    path.chmod(0o666 & ~_umask())


def disk_full(error: BaseException, path: Path | None = None) -> UserError | None:
    """Return what to tell where ``error`` is that of a full disk; None where it is another one.

    ``path`` is what was written, where the error does not say.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError):  # which has the number in its text alone
        number = next((n for n in FULL if f"(os error {n})" in str(error)), None)
    if number not in FULL:
        return None
    place = path or getattr(error, "filename", None)
    return UserError(
        f"The disk that holds {place or 'the output'} is full ({os.strerror(number)}); what is "
        "finished is kept: free space there and run the same command again."
    )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Run ``write(temporary)`` and rename the finished, flushed file to ``path``.

    Raises ``UserError`` where the disk is full, and takes back what was written of this file.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        give_usual_mode(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        full = disk_full(error, path)
        if full is None:
            raise
        temporary.unlink(missing_ok=True)
        raise full from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, keys in the order given; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write tensors as one safetensors file; the same tensors give the same bytes."""
    # torch takes seconds to import, and what only reads headers needs none of it.
    from safetensors.torch import save_file  # noqa: PLC0415

    ordered = {name: tensors[name].detach().contiguous().cpu() for name in sorted(tensors)}
    # Not more than this one entry: safetensors writes several in an order that changes.
    details = {"format": "pt"}
    write_atomically(path, lambda temporary: save_file(ordered, temporary, metadata=details))


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read every tensor of a safetensors file into memory (CPU)."""
    with safe_open(path, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def partial_directory(path: Path) -> Path:
    """Return an empty directory to fill; ``finish_directory`` then gives it the name ``path``."""
    partial = path.with_name(path.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_directory(partial: Path, path: Path) -> None:
    """Let the filled directory ``partial`` appear as ``path``, in the place of an older one.

    The older one is moved aside before it is removed: no half of it is ever there under its name.
    """
    remove_replaced(path)
    if path.exists():
        path.replace(path.with_name(path.name + REPLACED_SUFFIX))
    partial.replace(path)
    _flush(path.parent)
    remove_replaced(path)


@contextmanager
def filled_apart(path: Path) -> Iterator[Path]:
    """Give an empty directory that nobody else has; its files then appear beside ``path``.

    They are moved in the order of their names, so that a ``.json`` is there before the
    ``.safetensors`` that it tells of. Should filling it fail, nothing appears.
    """
    apart = path.with_name(f"{path.name}-{uuid4().hex}{TEMPORARY_SUFFIX}")
    apart.mkdir(parents=True)
    try:
        yield apart
        for made in sorted(apart.iterdir()):
            made.replace(path.with_name(made.name))
        _flush(path.parent)
    finally:
        shutil.rmtree(apart, ignore_errors=True)


def remove_replaced(path: Path) -> None:
    """Remove what ``finish_directory`` moved aside, should an interruption have left it there."""
    older = path.with_name(path.name + REPLACED_SUFFIX)
    older.unlink() if older.is_symlink() else shutil.rmtree(older, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what an interrupted write left behind in ``directory`` and below."""
    for leftover in directory.rglob("*" + TEMPORARY_SUFFIX):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that tell one JSON value from another."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
