"""Text for calibration and evaluation: from where it lies to batches of token ids.

Text comes as a plain file, a folder, JSONL or a data set on the hub, and leaves as windows of
token ids. A file is one document however long it is: windows are cut from it later, so what counts
as a document never depends on the sequence length. Conversations stay messages until a tokenizer
is there to apply its own chat template.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from moefuse.errors import UserError

JSONL_SUFFIXES = {".jsonl", ".ndjson"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.+ -]*){0,3}")
FILE_NAME = re.compile(r".*\.(txt|md|rst|py|c|cpp|json|jsonl|ndjson|csv|tsv|parquet|gz|zst)")

# No tokenizer packs this many characters into a token on average, so a prefix this much longer
# than the tokens wanted almost always suffices; where it does not, the whole text is used.
CHARACTERS_PER_TOKEN = 64
# Cutting a text can change the tokens next to the cut, never ones this far before it.
TOKENS_NEAR_A_CUT = 64


@dataclass(frozen=True)
class Document:
    """One piece of text or one conversation: exactly one of ``text`` and ``messages`` is set."""

    text: str | None
    messages: list[dict[str, Any]] | None
    source: str
    """Where it came from, for messages to people: a path, with its line for JSONL, or a hub id."""

    @property
    def size(self) -> int:
        """Return the UTF-8 bytes of the text, or of every message's content."""
        if self.text is not None:
            return len(self.text.encode("utf-8", errors="surrogatepass"))
        contents = [str(message["content"]) for message in self.messages or []]
        return sum(len(content.encode("utf-8", errors="surrogatepass")) for content in contents)


def source_name(source: str | Path) -> str:
    """Return how to call a text in what others read: by its file's name, or by its hub id."""
    return Path(source).name if Path(source).exists() else str(source)


def load_documents(source: str | Path, *, limit_bytes: int | None = None) -> list[Document]:
    """Read the documents at ``source``.

    ``source`` is a text file (one document), a folder (every readable text file below it in sorted
    order, hidden ones left out, one document each), a JSONL file with ``text`` or ``messages`` on
    every line, or a data set on the hub, ``org/name[:config][:split][:column]``, for which the
    ``datasets`` extra is needed. Within a folder JSONL files are read as JSONL.

    ``limit_bytes`` stops reading after so many UTF-8 bytes: a text is cut there, a conversation is
    kept whole. Raises ``UserError`` where there is no text to be had.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise UserError(f"A limit of {limit_bytes} bytes leaves no text; give at least 1.")
    documents = list(_limited(_documents(source, limit_bytes), limit_bytes))
    if not any(document.size for document in documents):
        raise UserError(f"{source} has no text; give a file, folder or data set with some.")
    return documents


def _documents(source: str | Path, limit_bytes: int | None) -> Iterator[Document]:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, limit_bytes)
    if path.exists():
        return _read_file(path, limit_bytes)
    if HUB_ID.fullmatch(str(source)) and not FILE_NAME.fullmatch(str(source)):
        return _read_hub(str(source))
    raise UserError(
        f"{source} does not exist; give a text file, a folder, a JSONL file "
        "or a data set on the hub as org/name[:config][:split][:column]."
    )


def _limited(documents: Iterator[Document], limit_bytes: int | None) -> Iterator[Document]:
    if limit_bytes is None:
        yield from documents
        return
    left = limit_bytes
    for document in documents:
        if document.text is not None and document.size > left:
            kept = document.text.encode("utf-8", errors="surrogatepass")[:left]
            document = Document(kept.decode("utf-8", errors="ignore"), None, document.source)  # noqa: PLW2901
        yield document
        left -= document.size
        if left <= 0:
            return


def _read_file(path: Path, limit_bytes: int | None) -> Iterator[Document]:
    if path.suffix.lower() in JSONL_SUFFIXES:
        yield from _read_jsonl(path)
        return
    text = _read_text(path, limit_bytes)
    if text is None:
        raise UserError(
            f"{path} is not UTF-8 text; give plain text, JSONL or a folder of text files."
        )
    yield Document(text, None, str(path))


def _read_text(path: Path, limit_bytes: int | None) -> str | None:
    """Return the file's text, up to ``limit_bytes`` of it, or None where it holds no text."""
    try:
        with path.open("rb") as handle:
            content = handle.read(-1 if limit_bytes is None else limit_bytes)
            is_whole = not handle.read(1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if b"\0" in content:
        return None
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=is_whole)
    except UnicodeDecodeError:
        return None


def _read_folder(folder: Path, limit_bytes: int | None) -> Iterator[Document]:
    found = False
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if is_hidden or not path.is_file():
            continue
        if path.suffix.lower() in JSONL_SUFFIXES:
            found = True
            yield from _read_jsonl(path)
        elif text := _read_text(path, limit_bytes):
            found = True
            yield Document(text, None, str(path))
    if not found:
        raise UserError(f"{folder} has no text: no readable text file lies below it.")


def _read_jsonl(path: Path) -> Iterator[Document]:
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _parse_line(line: bytes, source: str) -> Document:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text; mend or remove the line.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error}); mend or remove the line.") from error
    if not isinstance(record, dict):
        raise UserError(f'{source}: not a JSON object; write it as {{"text": "..."}}.')
    return _parse_record(record, source)


def _parse_record(record: dict[str, Any], source: str) -> Document:
    text, messages = record.get("text"), record.get("messages")
    if isinstance(text, str):
        return Document(text, None, source)
    if _are_messages(messages):
        return Document(None, messages, source)
    raise UserError(
        f"{source}: needs `text` (a string) or `messages` "
        "(a list of objects, each with `role` and `content`)."
    )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and {"role", "content"} <= set(message) for message in value
        )
    )


def _read_hub(source: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # noqa: PLC0415  an extra, and slow to import
    except ImportError as error:
        raise UserError(
            f"{source} is no file here, and reading data sets from the hub needs an extra: "
            'pip install "moefuse[datasets]".'
        ) from error
    name, config, split, column = [*source.split(":"), "", "", ""][:4]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _parse_record(_pick(row, column), f"{source}, row {number}")
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise many unrelated kinds
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"{source} is neither a file or folder here nor a data set that could be read "
            f"from the hub ({type(error).__name__}: {reason})."
        ) from error


def _pick(row: dict[str, Any], column: str) -> dict[str, Any]:
    if not column:
        return row
    if column not in row:
        raise UserError(f"The data set has no column {column!r}; it has {', '.join(sorted(row))}.")
    key = "text" if isinstance(row[column], str) else "messages"
    return {key: row[column]}


def load_tokenizer(
    directory: Path,
    source: str,
    *,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the checkpoint in ``directory``, which people know as ``source``.

    ``config`` stands in for the checkpoint's own, which has a say in the tokenizer's class. Raises
    ``UserError`` where there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            directory, config=config, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers fail in as many ways as there are formats
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"The tokenizer in {source} cannot be loaded ({reason}); download the "
            "checkpoint's tokenizer files again."
        ) from error


def read_batches(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    tokens: int,
    batch_size: int,
    vocabulary: int,
    source: str,
) -> list[tuple[Tensor, Tensor]]:
    """Read text into batches of at most ``tokens`` tokens (see ``tokenize`` and ``batches``).

    Raises ``UserError`` for text that cannot be read, and for tokens that the model in ``source``,
    whose ``vocabulary`` is so large, does not know.
    """
    documents = load_documents(data)
    sequences = tokenize(documents, tokenizer, sequence_length, limit_tokens=tokens)
    check_known(sequences, vocabulary, source)
    return list(batches(sequences, batch_size, 0))


def check_known(sequences: Iterable[Tensor], vocabulary: int, source: str) -> None:
    """Raise ``UserError`` for tokens beyond the vocabulary of the model in ``source``."""
    largest = max(int(ids.max()) for ids in sequences)
    if largest >= vocabulary:
        raise UserError(
            f"The tokenizer in {source} gives the token {largest}, but the model "
            f"knows only {vocabulary}; tokenizer and weights are of different models."
        )


def tokenize(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit_tokens: int | None = None,
    require_full: bool = False,
) -> list[Tensor]:
    """Return the windows of all documents, in order: 1-D int64 tensors of token ids (CPU).

    See ``tokenize_by_document`` for the arguments and the errors.
    """
    windows = tokenize_by_document(
        documents,
        tokenizer,
        sequence_length,
        limit_tokens=limit_tokens,
        require_full=require_full,
    )
    return [window for document in windows for window in document]


def tokenize_by_document(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit_tokens: int | None = None,
    require_full: bool = False,
) -> list[list[Tensor]]:
    """Cut every document into windows of 2 to ``sequence_length`` tokens.

    Special tokens are those that the tokenizer adds of itself, once a document; messages go
    through the tokenizer's own chat template. A tail of a single token predicts nothing and is
    dropped; a document without a window is left out. ``limit_tokens`` stops after so many tokens
    in all. Windows are 1-D int64 tensors of token ids (CPU).

    Raises ``UserError`` where no window results, where ``require_full`` is set and all documents
    together are shorter than one sequence, and for messages without a chat template.
    """
    numbered = cut_documents(documents, tokenizer, sequence_length, limit_tokens=limit_tokens)
    total = sum(len(window) for windows in numbered.values() for window in windows)
    check_enough(documents, total, sequence_length if require_full else 2)
    return list(numbered.values())


def cut_documents(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    limit_tokens: int | None = None,
) -> dict[int, list[Tensor]]:
    """Do as ``tokenize_by_document`` does and say by its number which document gave which windows.

    No document at all is no mistake here. Raises ``UserError`` for a sequence length below 2 and
    for messages without a chat template.
    """
    if sequence_length < 2:
        raise UserError(f"A sequence length of {sequence_length} predicts nothing; give 2 or more.")
    windows: dict[int, list[Tensor]] = {}
    total = 0
    for number, document in enumerate(documents):
        left = None if limit_tokens is None else limit_tokens - total
        if left is not None and left < 2:
            break
        cut = _windows(_token_ids(document, tokenizer, left), sequence_length)
        total += sum(len(window) for window in cut)
        if cut:
            windows[number] = cut
    return windows


def check_enough(documents: Sequence[Document], total: int, needed: int) -> None:
    """Raise ``UserError`` where all documents together give fewer tokens than are needed."""
    source = documents[0].source if documents else "The data"
    if total == 0:
        raise UserError(f"{source} has no text that gives two tokens or more; give more text.")
    if total < needed:
        raise UserError(
            f"{source} gives only {total} tokens, fewer than one sequence of {needed}; "
            f"give more text or a sequence length of at most {total}."
        )


def _windows(ids_T: Tensor, sequence_length: int) -> list[Tensor]:
    return [window for window in ids_T.split(sequence_length) if len(window) >= 2]


def _token_ids(document: Document, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Tensor:
    if document.text is None:
        ids = _chat_ids(document, tokenizer)
    else:
        ids = text_ids(document.text, tokenizer, limit)
    return torch.tensor(ids[:limit], dtype=torch.int64)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[int]:
    """Return the text's token ids: the first ``limit`` or more of them, or all where it is None."""
    if limit is not None:
        prefix = text[: CHARACTERS_PER_TOKEN * (limit + TOKENS_NEAR_A_CUT)]
        ids = _encode(prefix, tokenizer)
        if len(prefix) == len(text) or len(ids) >= limit + TOKENS_NEAR_A_CUT:
            return ids
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a text longer than the model's context is what windows are for.
    return cast(list[int], tokenizer(text, verbose=False)["input_ids"])


def _chat_ids(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return cast(list[int], apply_template(document, tokenizer)["input_ids"])


def apply_template(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """Return what the tokenizer's own chat template makes of a conversation, or of some of it.

    ``messages`` (default: all of the document's) are a prefix of them; ``options`` are those of
    ``apply_chat_template``, and what comes back is a mapping with ``input_ids`` unless they say
    otherwise. Raises ``UserError`` without a template and for messages that it refuses.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{document.source} holds messages, but the tokenizer has no chat template; "
            "give plain text instead."
        )
    given: Any = document.messages if messages is None else messages
    try:
        return tokenizer.apply_chat_template(
            given, **{"tokenize": True, "return_dict": True, **options}
        )
    except Exception as error:  # a template is a program; it raises what it likes
        raise UserError(
            f"{document.source}: the tokenizer's chat template refuses the messages ({error})."
        ) from error


def batch_order(lengths: Iterable[int], batch_size: int) -> list[list[int]]:
    """Return the positions of the sequences of each batch, sequences of like length together.

    The longest come first, so that a batch too big for the memory fails at once; equals keep their
    order, so the same lengths always give the same batches.
    """
    if batch_size < 1:
        raise UserError(f"A batch size of {batch_size} holds nothing; give 1 or more.")
    known = list(lengths)
    order = sorted(range(len(known)), key=lambda position: -known[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(sequences: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ``(input_ids_BS, attention_mask_BS)``, int64, padded on the right to the longest."""
    ids_BS = pad_sequence(list(sequences), batch_first=True, padding_value=pad_id)
    lengths_B = torch.tensor([len(sequence) for sequence in sequences])
    mask_BS = torch.arange(ids_BS.shape[1]) < lengths_B[:, None]
    return ids_BS, mask_BS.to(torch.int64)


def batches(
    sequences: Sequence[Tensor], batch_size: int, pad_id: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(input_ids_BS, attention_mask_BS)``, int64, in the order of ``batch_order``."""
    for positions in batch_order(map(len, sequences), batch_size):
        yield pad([sequences[position] for position in positions], pad_id)
