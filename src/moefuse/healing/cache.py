"""A teacher's logits on disk: for every token the likeliest words, the rest's mass and draws of it.

A cache is a directory with ``manifest.json`` (whose logits, of which text), ``text.safetensors``
(the packed text itself, so that healing needs neither teacher nor data) and ``wave-00000`` and so
on, each some thousand rows. A row is one run of bytes compressed on its own, so any row can be read
alone: a safetensors file holds them one after the other (``rows``, uint8) with where each begins
(``offsets``, int64). Only predictions that count are kept, in the order of the row.

Within a row words are numbers ascending, kept as differences (16 bits where the vocabulary allows),
log-probabilities are fp16, and the bytes of equal significance lie together before they are
compressed by zlib. With 64 + 8 words of a vocabulary of 4096 a token takes about 185 bytes, against
288 uncompressed and 16,384 for all logits in fp32.

Shape suffixes: T tokens of a row that count, K likeliest words, M drawn words, N = K + M, B rows.
"""

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moefuse import artifacts
from moefuse.errors import UserError
from moefuse.healing.text import PackedText
from moefuse.mathematics.truncated import TopLogits

MANIFEST, TEXT = "manifest.json", "text.safetensors"
VERSION = 1
LEVEL = 6
"""zlib's effort; 9 would save 0.2 % of the bytes in twice the time, 1 take 2 % more in half."""


@dataclass(frozen=True)
class Manifest:
    """What a cache is of."""

    version: int
    teacher: str
    """Where the teacher came from: a directory or hub id."""
    teacher_fingerprint: str
    text: str
    """Where the text came from."""
    text_fingerprint: str
    job: str
    """What tells the command that made it from others."""
    top: int
    tail: int
    vocabulary: int
    sequence_length: int
    rows: int
    tokens: int
    """Predictions that count, whose logits are kept."""
    wave_rows: int
    """Rows in every file but the last."""
    wave_bytes: list[int]
    """The size of every file of logits."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of logits per token that counts."""
        return sum(self.wave_bytes) / max(self.tokens, 1)


def wave_file(number: int) -> str:
    """Return the name of a file of logits."""
    return f"wave-{number:05d}.safetensors"


class TeacherCache:
    """A cache that ``moefuse teach`` made; get one with :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest, text: PackedText, starts: list[Tensor]):
        self.path = path
        self.manifest = manifest
        self.text = text
        self._starts = starts
        self._tokens_N = text.counted_NS.sum(1)

    @classmethod
    def open(cls, path: str | Path) -> "TeacherCache":
        """Open a cache and check all but the logits themselves, which are checked when read.

        Raises ``UserError`` for a directory that is no whole cache.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        try:
            text = PackedText(**artifacts.read_tensors(path / TEXT))
            starts = [
                _starts(path / wave_file(number), size)
                for number, size in enumerate(manifest.wave_bytes)
            ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise _damaged(path, reason) from error
        if text.fingerprint() != manifest.text_fingerprint:
            raise _damaged(path, f"{TEXT} is not the text that its {MANIFEST} names")
        if sum(len(start) - 1 for start in starts) != text.rows:
            raise _damaged(path, "some rows are missing")
        return cls(path, manifest, text, starts)

    def check(
        self, *, teacher_fingerprint: str | None = None, text_fingerprint: str | None = None
    ) -> None:
        """Raise ``UserError`` unless the cache is of this teacher and this text, where given."""
        if teacher_fingerprint not in (None, self.manifest.teacher_fingerprint):
            raise UserError(
                f"The teacher cache {self.path} was made from {self.manifest.teacher}, which is "
                "another teacher than this; make one with 'moefuse teach' from the right one."
            )
        if text_fingerprint not in (None, self.manifest.text_fingerprint):
            raise UserError(
                f"The teacher cache {self.path} is of other text (from {self.manifest.text}, or "
                "packed otherwise); make one with 'moefuse teach' from the right one."
            )

    def rows(self, row_B: Tensor | Iterable[int]) -> TopLogits:
        """Return what is kept of some rows: T = their predictions that count, row by row in order.

        So it belongs to ``logits_BSV[text.counted_NS[row_B]]``. Raises ``UserError`` where what is
        on the disk is damaged.
        """
        numbers = row_B.tolist() if isinstance(row_B, Tensor) else list(row_B)
        return TopLogits.joined([self._row(number) for number in numbers])

    def _row(self, row: int) -> TopLogits:
        wave, place = divmod(row, self.manifest.wave_rows)
        start, end = self._starts[wave][place : place + 2].tolist()
        try:
            # Opened for each row: pages of a file that stays mapped would stay in memory.
            with safe_open(self.path / wave_file(wave), framework="pt") as stored:
                packed = stored.get_slice("rows")[start:end].numpy().tobytes()
            return unpack_row(packed, int(self._tokens_N[row]), self.manifest)
        except (OSError, SafetensorError, zlib.error, ValueError) as error:
            raise _damaged(self.path, f"row {row} in {wave_file(wave)} cannot be read") from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"The teacher cache {path} is damaged ({reason}); make it again with 'moefuse teach'."
    )


def _read_manifest(path: Path) -> Manifest:
    """Read a cache's manifest; raises ``UserError`` for anything else."""
    try:
        found = artifacts.read_json(path / MANIFEST)
        version = found["version"]
        if version == VERSION:
            return _manifest(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no teacher cache: it has no sound {MANIFEST}; make one with "
            "'moefuse teach'."
        ) from error
    raise UserError(
        f"The teacher cache {path} is of version {version}, and this moefuse reads version "
        f"{VERSION}; make it again with 'moefuse teach'."
    )


def _manifest(found: dict[str, Any]) -> Manifest:
    """Make a manifest of what its file holds; raises ``TypeError`` where that is something else."""
    manifest = Manifest(**found)
    for field in fields(Manifest):
        kind = list if field.name == "wave_bytes" else field.type
        if not isinstance(getattr(manifest, field.name), kind):  # type: ignore[arg-type]
            raise TypeError(field.name)
    return manifest


def _starts(path: Path, size: int) -> Tensor:
    """Return where each row of a file begins and the last ends, int64; refuses another size."""
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has not its full size")
    with safe_open(path, framework="pt") as stored:
        return stored.get_tensor("offsets")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes a directory a cache."""
    artifacts.write_json(directory / MANIFEST, asdict(manifest))


def write_wave(path: Path, rows: list[bytes]) -> None:
    """Write packed rows as one file, whole or not at all."""
    offsets = torch.tensor([0, *map(len, rows)], dtype=torch.int64).cumsum(0)
    stored = torch.frombuffer(bytearray().join(rows), dtype=torch.uint8)
    artifacts.write_tensors(path, {"rows": stored, "offsets": offsets})


# One row to bytes and back.


def pack_row(top: TopLogits, vocabulary: int) -> bytes:
    """Turn what is kept of a row's tokens into bytes, the same for the same numbers."""
    steps_TN = np.concatenate(
        [
            np.diff(words_TX.cpu().numpy(), axis=1, prepend=0)
            for words_TX in (top.index_TK, top.tail_index_TM)
        ],
        axis=1,
    )
    log_p_TN = torch.cat([top.log_p_TK, top.tail_log_p_TM], dim=1).half().cpu().numpy()
    rest_T = top.log_rest_T.cpu().numpy()
    parts = (steps_TN.astype(_word_kind(vocabulary)), log_p_TN, rest_T[:, None])
    return zlib.compress(b"".join(_by_significance(part) for part in parts), LEVEL)


def unpack_row(packed: bytes, tokens: int, manifest: Manifest) -> TopLogits:
    """Turn bytes back into what is kept of a row's tokens (CPU).

    Log-probabilities come in fp32, shifted so that each token's mass is exactly 1 in spite of their
    rounding. Raises ``ValueError`` or ``zlib.error`` for bytes that are no such row.
    """
    raw = zlib.decompress(packed)
    kept, words = manifest.top, manifest.top + manifest.tail
    kinds = ((_word_kind(manifest.vocabulary), words), (np.float16, words), (np.float32, 1))
    sizes = [tokens * width * np.dtype(kind).itemsize for kind, width in kinds]
    if len(raw) != sum(sizes):
        raise ValueError(f"{len(raw)} bytes instead of {sum(sizes)}")
    parts, start = [], 0
    for (kind, width), size in zip(kinds, sizes, strict=True):
        parts.append(_from_significance(raw[start : start + size], kind, (tokens, width)))
        start += size
    steps_TN, log_p_TN, rest_T1 = parts
    steps_TN = torch.from_numpy(steps_TN.astype(np.int64))
    log_p_TK, tail_log_p_TM = torch.from_numpy(log_p_TN).float().tensor_split([kept], dim=1)
    rest_T1 = torch.from_numpy(rest_T1)
    sought_T1 = torch.log1p(-rest_T1.exp())
    return TopLogits(
        index_TK=steps_TN[:, :kept].cumsum(1),
        log_p_TK=log_p_TK + (sought_T1 - log_p_TK.logsumexp(1, keepdim=True)),
        log_rest_T=rest_T1[:, 0],
        tail_index_TM=steps_TN[:, kept:].cumsum(1),
        tail_log_p_TM=tail_log_p_TM,
    )


def _word_kind(vocabulary: int) -> Any:
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def _by_significance(numbers_TX: np.ndarray) -> bytes:
    """Lay out numbers by the significance of their bytes, then by column."""
    bytes_TXI = np.ascontiguousarray(numbers_TX)[..., None].view(np.uint8)
    return bytes_TXI.transpose(2, 1, 0).tobytes()


def _from_significance(raw: bytes, kind: Any, shape: tuple[int, int]) -> np.ndarray:
    tokens, width = shape
    bytes_IXT = np.frombuffer(raw, np.uint8).reshape(np.dtype(kind).itemsize, width, tokens)
    return np.ascontiguousarray(bytes_IXT.transpose(2, 1, 0)).view(kind)[..., 0]
