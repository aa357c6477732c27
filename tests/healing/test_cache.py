"""A teacher cache gives back what was put in, row by row, and refuses what is damaged."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close

from moefuse import artifacts
from moefuse.errors import UserError
from moefuse.healing.cache import (
    MANIFEST,
    TEXT,
    VERSION,
    Manifest,
    TeacherCache,
    pack_row,
    unpack_row,
    wave_file,
    write_manifest,
    write_wave,
)
from moefuse.healing.text import PackedText
from moefuse.mathematics.truncated import TopLogits, truncate

TOP, TAIL, ROWS, LENGTH, WAVE = 5, 3, 7, 12, 4


def some(tokens: int, seed: int, vocabulary: int = 50) -> TopLogits:
    generator = torch.Generator().manual_seed(seed)
    logits_TV = 3 * torch.randn(tokens, vocabulary, generator=generator)
    return truncate(logits_TV, TOP, torch.rand(tokens, TAIL, generator=generator))


def assert_kept(found: TopLogits, wanted: TopLogits) -> None:
    """Words are the same; log-probabilities are to what fp16 tells, and sum to a mass of 1."""
    assert torch.equal(found.index_TK, wanted.index_TK)
    assert torch.equal(found.tail_index_TM, wanted.tail_index_TM)
    assert torch.equal(found.log_rest_T, wanted.log_rest_T)
    assert_close(found.log_p_TK, wanted.log_p_TK, tolerance=2**-10)
    assert_close(found.tail_log_p_TM, wanted.tail_log_p_TM, tolerance=2**-10)
    mass_T = found.log_p_TK.exp().sum(1) + found.log_rest_T.exp()
    assert_close(mass_T, torch.ones_like(mass_T), tolerance=1e-6)


def manifest(text: PackedText, sizes: list[int], **changes: Any) -> Manifest:
    made: dict[str, Any] = {
        "version": VERSION,
        "teacher": "some/teacher",
        "teacher_fingerprint": "0123456789abcdef",
        "text": "text.jsonl",
        "text_fingerprint": text.fingerprint(),
        "job": "job",
        "top": TOP,
        "tail": TAIL,
        "vocabulary": 50,
        "sequence_length": LENGTH,
        "rows": ROWS,
        "tokens": text.tokens,
        "wave_rows": WAVE,
        "wave_bytes": sizes,
    }
    return Manifest(**{**made, **changes})


def some_text() -> PackedText:
    generator = torch.Generator().manual_seed(0)
    ids_NS = torch.randint(2, 50, (ROWS, LENGTH), generator=generator).int()
    counted_NS = torch.rand(ROWS, LENGTH, generator=generator) < 0.7
    return PackedText(ids_NS, torch.arange(LENGTH).int().repeat(ROWS, 1), counted_NS)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[TopLogits]]:
    """A cache of two files, and what was put into each row."""
    text = some_text()
    kept = [some(int(text.counted_NS[row].sum()), row) for row in range(ROWS)]
    path = tmp_path / "cache"
    artifacts.write_tensors(path / TEXT, text.tensors())
    for number, start in enumerate(range(0, ROWS, WAVE)):
        rows = [pack_row(top, 50) for top in kept[start : start + WAVE]]
        write_wave(path / wave_file(number), rows)
    sizes = [(path / wave_file(number)).stat().st_size for number in range(2)]
    write_manifest(path, manifest(text, sizes))
    return path, kept


@pytest.mark.parametrize("vocabulary", [50, 65_536, 70_000])
def test_a_row_there_and_back(vocabulary: int) -> None:
    top = some(9, 0, vocabulary)

    found = unpack_row(
        pack_row(top, vocabulary), 9, manifest(some_text(), [], vocabulary=vocabulary)
    )

    assert_kept(found, top)


def test_a_row_without_a_rest_and_with_words_ruled_out() -> None:
    logits_TV = torch.full((4, 50), -math.inf)
    logits_TV[:, 7:10] = torch.tensor([1.0, 2.0, 3.0])
    top = truncate(logits_TV, TOP, torch.rand(4, TAIL))

    found = unpack_row(pack_row(top, 50), 4, manifest(some_text(), []))

    assert (found.log_rest_T == -math.inf).all()
    assert_close(found.log_p_TK.exp(), top.log_p_TK.exp(), tolerance=1e-3)
    assert_close(found.log_p_TK.exp().sum(1), torch.ones(4), tolerance=1e-6)


def test_any_rows_in_any_order(made: tuple[Path, list[TopLogits]]) -> None:
    path, kept = made
    cache = TeacherCache.open(path)

    for rows in ([0], [6], [3, 4], [5, 0, 3], list(range(ROWS))):
        assert_kept(cache.rows(torch.tensor(rows)), TopLogits.joined([kept[row] for row in rows]))
        assert_kept(cache.rows(rows), cache.rows(torch.tensor(rows)))
    assert cache.text.fingerprint() == some_text().fingerprint()
    assert cache.manifest.teacher == "some/teacher"


def test_of_which_teacher_and_text(made: tuple[Path, list[TopLogits]]) -> None:
    cache = TeacherCache.open(made[0])
    right = {
        "teacher_fingerprint": "0123456789abcdef",
        "text_fingerprint": some_text().fingerprint(),
    }

    cache.check()
    cache.check(**right)
    with pytest.raises(UserError, match="some/teacher, which is another teacher"):
        cache.check(teacher_fingerprint="f" * 16)
    with pytest.raises(UserError, match=r"is of other text \(from text.jsonl"):
        cache.check(**{**right, "text_fingerprint": "f" * 16})


def _edit(path: Path, **changes: Any) -> None:
    found = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**found, **changes}))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Any, str]] = {
    "gone": (shutil.rmtree, "is no teacher cache: it has no sound manifest.json"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "is no teacher cache"),
    "no JSON": (lambda path: (path / MANIFEST).write_text("{"), "is no teacher cache"),
    "a list": (lambda path: (path / MANIFEST).write_text("[]"), "is no teacher cache"),
    "another's": (lambda path: (path / MANIFEST).write_text("{}"), "is no teacher cache"),
    "other keys": (lambda path: _edit(path, more=1), "is no teacher cache"),
    "other kinds": (lambda path: _edit(path, top="64"), "is no teacher cache"),
    "version": (lambda path: _edit(path, version=9), "of version 9, and this moefuse reads"),
    "no text": (lambda path: (path / TEXT).unlink(), "is damaged"),
    "other text": (lambda path: _edit(path, text_fingerprint="f" * 16), "is not the text that"),
    "no logits": (lambda path: (path / wave_file(1)).unlink(), "is damaged"),
    "cut": (lambda path: _cut(path / wave_file(1)), "wave-00001.safetensors has not its full size"),
    "too few": (lambda path: _edit(path, wave_bytes=[]), "some rows are missing"),
    "broken": (lambda path: (path / TEXT).write_bytes(b"broken"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_whole_cache_is_refused(damage: str, made: tuple[Path, list[TopLogits]]) -> None:
    path, _ = made
    spoil, match = DAMAGES[damage]
    spoil(path)

    with pytest.raises(UserError, match=match) as refusal:
        TeacherCache.open(path)

    sentence = str(refusal.value)
    assert "moefuse teach" in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_changed_row_is_refused_and_others_are_read(made: tuple[Path, list[TopLogits]]) -> None:
    path, kept = made
    file = path / wave_file(1)
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(content)
    cache = TeacherCache.open(path)

    assert_kept(cache.rows([5]), kept[5])
    with pytest.raises(UserError, match=r"row 6 in wave-00001.safetensors cannot be read"):
        cache.rows([6])
