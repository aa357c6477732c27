import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import TEXT, tiny_tokenizer

from moefuse import corpus
from moefuse.corpus import (
    Document,
    batch_order,
    batches,
    load_documents,
    tokenize,
    tokenize_by_document,
)
from moefuse.errors import UserError

MESSAGES = [{"role": "user", "content": "print line"}]


def text(content: str) -> Document:
    return Document(content, None, "here")


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Loading


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\f\ntwo ä".encode())
    assert load_documents(path) == [Document("one\r\n\f\ntwo ä", None, str(path))]
    assert load_documents(str(path)) == load_documents(path)


def test_a_folder_gives_its_readable_files_in_order(tmp_path: Path) -> None:
    for name, content in {
        "b/z.py": b"last",
        "b.md": b"middle",
        "a.txt": b"first",
        "picture.png": b"\x89PNG\0\0",
        "latin.txt": b"caf\xe9",
        "empty.txt": b"",
        ".git/config": b"hidden",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_lines(tmp_path / "c.jsonl", {"text": "line"})
    found = [document.text for document in load_documents(tmp_path)]
    assert found == ["first", "last", "middle", "line"]


def test_jsonl_keeps_text_and_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "one", "kind": 1}, {"messages": MESSAGES})
    path.write_text(path.read_text() + "\n  \n")
    assert load_documents(path) == [
        Document("one", None, f"{path}, line 1"),
        Document(None, MESSAGES, f"{path}, line 2"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"other": 1}', "needs `text`"),
        ('{"text": null}', "needs `text`"),
        ('{"messages": []}', "needs `text`"),
        ('{"messages": [{"role": "user"}]}', "needs `text`"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {reason}"):
        load_documents(path)


def test_a_line_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load_documents(path)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_has_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt has no text"):
        load_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"\x7fELF\0", b"caf\xe9", b"cut \xc3"])
def test_a_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.bin is not UTF-8 text"):
        load_documents(tmp_path / "a.bin")


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match="no readable text file"):
        load_documents(tmp_path)


@pytest.mark.parametrize("source", ["nothing", "no/such.txt", "/no/such", "a/b/c", "a/b:c:d:e:f"])
def test_what_does_not_exist_is_told(source: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_documents(source)


@pytest.mark.parametrize("limit", [1, 4, 5, 7, 1000])
def test_a_limit_in_bytes(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcäöü", encoding="utf-8")
    whole = path.read_bytes()
    (document,) = load_documents(path, limit_bytes=limit)
    assert document.text == whole[:limit].decode(errors="ignore")


def test_a_limit_in_bytes_spans_documents(tmp_path: Path) -> None:
    lines = [{"text": "abc"}, {"messages": MESSAGES}, {"text": "never read"}]
    path = write_lines(tmp_path / "a.jsonl", *lines)
    first, second = load_documents(path, limit_bytes=4)
    assert (first.text, second.messages) == ("abc", MESSAGES)
    with pytest.raises(UserError, match="at least 1"):
        load_documents(path, limit_bytes=0)


def test_a_hub_data_set_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "moefuse\[datasets\]"'):
        load_documents("some/corpus")


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        if not rows:
            raise ConnectionError("no such thing.\nlong story")
        return rows

    module = ModuleType("datasets")
    module.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_a_hub_data_set_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, [{"code": "x = 1", "talk": MESSAGES, "text": "plain"}])
    sources = ["some/corpus", "some/corpus:py:test:code", "some/corpus:::talk"]
    found = [load_documents(source)[0] for source in sources]
    assert [(document.text, document.messages) for document in found] == [
        ("plain", None),
        ("x = 1", None),
        (None, MESSAGES),
    ]
    assert asked[1] == (("some/corpus", "py"), {"split": "test", "streaming": True})
    assert asked[2] == (("some/corpus", None), {"split": "train", "streaming": True})


def test_hub_trouble_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, [])
    with pytest.raises(UserError, match=r"neither a file.*\(ConnectionError: no such thing\)\.$"):
        load_documents("some/corpus")
    fake_hub(monkeypatch, [{"b": "", "a": ""}])
    with pytest.raises(UserError, match="no column 'c'; it has a, b"):
        load_documents("some/corpus:::c")


# Tokens


def test_windows_hold_every_token_in_order() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    windows = tokenize([text(TEXT)], tokenizer, 7)
    assert all(window.dtype == torch.int64 and window.ndim == 1 for window in windows)
    assert all(len(window) == 7 for window in windows[:-1])
    kept = len(ids) - (len(ids) % 7 == 1)
    assert torch.cat(windows).tolist() == ids[:kept]


def test_a_tail_of_one_token_is_dropped() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    assert [len(window) for window in tokenize([text(TEXT)], tokenizer, len(ids) - 1)] == [
        len(ids) - 1
    ]


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    (window,) = tokenize([Document(None, MESSAGES, "here")], tokenizer, 512)
    assert tokenizer.decode(window) == "<s>user: print line\n"


def test_trouble_with_chat_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, document = tiny_tokenizer(), Document(None, MESSAGES, "talk.jsonl, line 1")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no users') }}")
    with pytest.raises(UserError, match=r"talk\.jsonl, line 1: .*no users"):
        tokenize([document], tokenizer, 8)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template"):
        tokenize([document], tokenizer, 8)


@given(st.lists(st.sampled_from([TEXT, "", " ", TEXT * 3, "add(line)"])), st.integers(2, 90))
def test_a_limit_in_tokens(texts: list[str], limit: int) -> None:
    tokenizer = tiny_tokenizer()
    documents = [text(content) for content in [*texts, TEXT * 2]]
    everything = torch.cat(tokenize(documents, tokenizer, 16))
    found = torch.cat(tokenize(documents, tokenizer, 16, limit_tokens=limit))
    assert limit - 1 <= len(found) <= limit
    assert found.tolist() == everything[: len(found)].tolist()


def test_a_limit_reads_no_more_of_a_long_text_than_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, long = tiny_tokenizer(), TEXT * 200
    expected = tokenize([text(long)], tokenizer, 8)[:4]
    seen: list[int] = []
    real = corpus._encode
    monkeypatch.setattr(corpus, "_encode", lambda t, k: seen.append(len(t)) or real(t, k))
    found = tokenize([text(long)], tokenizer, 8, limit_tokens=32)
    assert [window.tolist() for window in found] == [window.tolist() for window in expected]
    assert seen == [corpus.CHARACTERS_PER_TOKEN * (32 + corpus.TOKENS_NEAR_A_CUT)]


def test_a_limit_is_met_by_a_text_of_very_long_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    words = SimpleNamespace()
    monkeypatch.setattr(corpus, "_encode", lambda t, _: list(range(len(t) // 1000)))
    (window,) = tokenize([text("x" * 100_000)], words, 50, limit_tokens=50)  # type: ignore[arg-type]
    assert len(window) == 50


def test_windows_by_document_leave_out_what_is_too_short() -> None:
    tokenizer = tiny_tokenizer()
    windows = tokenize_by_document([text(TEXT), text(""), text("add(line)")], tokenizer, 16)
    assert [len(document) for document in windows] == [-(-len(tokenizer(TEXT).input_ids) // 16), 1]


def test_too_little_text_is_told() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="here has no text"):
        tokenize([text(""), text("\0")], tokenizer, 8)
    with pytest.raises(UserError, match="The data has no text"):
        tokenize([], tokenizer, 8)
    with pytest.raises(UserError, match="predicts nothing"):
        tokenize([text(TEXT)], tokenizer, 1)
    with pytest.raises(UserError, match="fewer than one sequence of 4096"):
        tokenize([text(TEXT)], tokenizer, 4096, require_full=True)


def test_many_short_documents_make_up_a_sequence() -> None:
    short = [text("add(line)")] * 8
    assert len(tokenize(short, tiny_tokenizer(), 16, require_full=True)) == 8


# Batches


@given(st.lists(st.integers(2, 12), max_size=20), st.integers(1, 6))
def test_batches_hold_every_sequence_once(lengths: list[int], batch_size: int) -> None:
    order = batch_order(lengths, batch_size)
    assert sorted(position for batch in order for position in batch) == list(range(len(lengths)))
    in_turn = [lengths[position] for batch in order for position in batch]
    assert in_turn == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in order[:-1])

    sequences = [torch.arange(length) + 100 * n for n, length in enumerate(lengths)]
    rows = []
    for ids_BS, mask_BS in batches(sequences, batch_size, pad_id=-7):
        assert ids_BS.dtype == mask_BS.dtype == torch.int64
        assert bool((ids_BS[mask_BS == 0] == -7).all())
        rows += [row[mask == 1].tolist() for row, mask in zip(ids_BS, mask_BS, strict=True)]
    assert sorted(rows) == sorted(sequence.tolist() for sequence in sequences)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(UserError, match="batch size of 0"):
        next(batches([torch.arange(3)], 0, 0))
