"""The teacher's data: which texts it learns from, how they are arranged, and their tokens.

The corpus is the Python standard library. Whole modules, with their tests, are held out; the rest
becomes plain code, fill-in-the-middle arrangements and chats made from docstrings. `prepare` writes
the tokenizer, the token arrays and the shipped texts; `Corpus` and `batches` give the arrays back
as training rows.
"""

from __future__ import annotations

import argparse
import ast
import json
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096

# DeepSeek-Coder-V2's own spellings: U+FF5C for the bars and U+2581 between the words.
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
FIM_BEGIN = "<\uff5cfim\u2581begin\uff5c>"
FIM_HOLE = "<\uff5cfim\u2581hole\uff5c>"
FIM_END = "<\uff5cfim\u2581end\uff5c>"
SPECIAL_TOKENS = [BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END]  # their ids are 0 to 4, in this order

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# Letters take one leading non-letter, digits stand alone, newlines end a piece: close to what
# DeepSeek's tokenizer does, with indentation kept as one piece.
PRE_TOKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Modules whose sources and tests are kept away from training: containers, parsers, numerics,
# file formats, text and scheduling, each with a test suite of its own.
# fmt: off
HELDOUT_MODULES = frozenset([
    "bisect", "configparser", "csv", "difflib", "fractions", "graphlib", "heapq", "html",
    "ipaddress", "json", "queue", "sched", "shlex", "statistics", "textwrap", "tomllib", "wave",
    "zipfile",
])
# fmt: on


# --- which files, and on which side of the split ----------------------------------------------


def module_of(path: str) -> str:
    """Module that a stdlib-relative path belongs to; a test belongs to the module it tests.

    `json/decoder.py`, `test/test_json/test_dump.py` and `test/json_tests.py` are all `json`.
    """
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "test" and len(parts) > 1:
        parts = parts[1:]
    name = parts[0].lstrip("_")
    for affix in ("test_", "pickletester_"):
        name = name.removeprefix(affix)
    for affix in ("_tests", "_test", "tester"):
        name = name.removesuffix(affix)
    return name.lstrip("_")


def is_heldout(path: str) -> bool:
    """Whether the file at this stdlib-relative path is kept away from training.

    A test such as `test_zipfile64.py` counts for `zipfile`.
    """
    name = module_of(path)
    return name in HELDOUT_MODULES or name.rstrip("0123456789") in HELDOUT_MODULES


def wanted_source(path: str) -> bool:
    """Whether a stdlib-relative path is ordinary source code worth learning from.

    Left out: installed packages; build configuration, which names folders of the machine; the
    codec tables, which are long lists of numbers.
    """
    top = Path(path).parts[0]
    return (
        "site-packages" not in path
        and not top.startswith(("_sysconfigdata", "config-"))
        and not (top == "encodings" and path != "encodings/__init__.py")
    )


def read_sources(root: Path) -> dict[str, str]:
    """Text of each wanted UTF-8 `.py` file under `root`, by relative path, without duplicates."""
    sources: dict[str, str] = {}
    seen: set[str] = set()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not wanted_source(name):
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:  # a few test files are deliberately in other encodings
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            sources[name] = text
    return sources


# --- documents --------------------------------------------------------------------------------


def split_source(text: str, max_chars: int) -> list[str]:
    """Cut a source file into pieces of about `max_chars` or fewer; joined, they are `text`.

    Cuts fall before a top-level statement if there is one, else before a method, else between
    lines; a single longer line stays whole.
    """
    pieces = [""]
    for unit in _units(text, ("def ", "class ", "@", "async def ", "if "), max_chars):
        if pieces[-1] and len(pieces[-1]) + len(unit) > max_chars:
            pieces.append("")
        pieces[-1] += unit
    return pieces


def _units(text: str, starts: tuple[str, ...], max_chars: int) -> Iterator[str]:
    """Runs of lines that begin at one of `starts`; a run over `max_chars` is cut further."""
    unit, previous = "", ""
    for line in [*text.splitlines(keepends=True), ""]:
        boundary = line.startswith(starts) and not previous.lstrip().startswith("@")
        if unit and (boundary or not line):
            if len(unit) <= max_chars:
                yield unit
            elif starts[0].startswith(" "):
                yield from unit.splitlines(keepends=True)
            else:
                yield from _units(unit, ("    def ", "    @", "    async def "), max_chars)
            unit = ""
        unit, previous = unit + line, line


def mostly_numbers(text: str) -> bool:
    """Whether more than a fifth of the characters are digits (tables, encoded blobs)."""
    return sum(c.isdigit() for c in text) > 0.2 * len(text)


def chat_pairs(text: str) -> list[tuple[str, str]]:
    """(question, answer) pairs from the documented functions of a source file.

    Each function gives two: its source asked for by its docstring's summary, and the reverse.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # lib2to3's test data holds Python 2 files
        return []
    lines = text.splitlines()
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            if docstring and len(node.body) > 1 and len(source) < 2400:
                pairs += _ask_both_ways(node, docstring, source)
    return pairs


def _ask_both_ways(
    node: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str, source: str
) -> list[tuple[str, str]]:
    """The write-it and the explain-it pair of one function with a docstring."""
    summary = " ".join(docstring.split("\n\n", maxsplit=1)[0].split())
    lines = source.splitlines()
    # The docstring is the first statement, so it ends where the second one's lead-in begins.
    first, last = node.body[0].lineno - node.lineno, node.body[0].end_lineno or node.lineno
    bare = "\n".join(lines[:first] + lines[last - node.lineno + 1 :])
    code, bare_code = f"```python\n{source}\n```", f"```python\n{bare}\n```"
    ask = f"Write a Python function {node.name}({ast.unparse(node.args)}) that does this: {summary}"
    return [(ask, code), (f"What does this function do?\n\n{bare_code}", summary)]


def render_chat(question: str, answer: str) -> str:
    """One exchange as the chat template writes it, without the leading bos."""
    return f"User: {question}\n\nAssistant: {answer}{EOS}"


def arrange_fim(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reorder a document for fill-in-the-middle, at two random token boundaries.

    tokens: [n] ids. Returns [n + 3] ids: begin, prefix, hole, suffix, end, middle. Half of the
    middles are at most 64 tokens, the size an editor asks for.
    """
    start, stop = sorted(rng.integers(0, len(tokens) + 1, size=2).tolist())
    if rng.random() < 0.5:
        stop = min(stop, start + int(rng.integers(1, 65)))
    begin, hole, end = (np.array([SPECIAL_TOKENS.index(t)]) for t in (FIM_BEGIN, FIM_HOLE, FIM_END))
    prefix, middle, suffix = np.split(tokens, [start, stop])
    return np.concatenate([begin, prefix, hole, suffix, end, middle]).astype(tokens.dtype)


# --- tokens and shipped texts -----------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` entries with DeepSeek-Coder-V2's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[FIM_BEGIN, FIM_HOLE, FIM_END],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that Transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8")


def pack(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Documents as one uint16 array [total] and int64 offsets [documents + 1]."""
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return np.concatenate([np.array(d, dtype=np.uint16) for d in documents]), offsets


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without bos."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def shipped_texts(
    sources: dict[str, str], tokenizer: PreTrainedTokenizerFast, target_bytes: int, seed: int
) -> list[dict[str, str]]:
    """A shuffled mixture of plain, FIM-arranged and chat texts, of about `target_bytes` in all.

    Each text is about 200 to 1000 tokens (chat texts may be shorter) and is kept only if
    tokenising it gives back the ids it was made from.
    """
    rng = np.random.default_rng(seed)
    pools: dict[str, list[tuple[str, str]]] = {"code": [], "chat": []}
    for name, text in sources.items():
        pools["code"] += [(p, name) for p in split_source(text, 2800) if len(p) > 900]
        pools["chat"] += [(render_chat(*pair), name) for pair in chat_pairs(text)]
    for pool in pools.values():
        rng.shuffle(pool)  # pyright: ignore[reportArgumentType]
    lines: list[dict[str, str]] = []
    size = 0
    while size < target_bytes and all(pools.values()):
        kind = str(rng.choice(["plain", "fim", "chat"], p=[0.45, 0.3, 0.25]))
        text, source = pools["chat" if kind == "chat" else "code"].pop()
        ids = encode(tokenizer, [text])[0]
        if kind == "fim":
            ids = arrange_fim(np.array(ids), rng).tolist()
            text = str(tokenizer.decode(ids))
        dull = mostly_numbers(text) or "PRIVATE KEY" in text or not 60 <= len(ids) <= 1000
        if dull or encode(tokenizer, [text])[0] != ids:
            continue
        if kind == "fim":
            text += EOS
        lines.append({"text": text, "source": source, "kind": kind})
        size += len(text.encode())
    return lines


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    """Write JSON Lines in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), "utf-8")


def read_lines(path: Path) -> list[dict[str, str]]:
    """Read JSON Lines."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def prepare(args: argparse.Namespace) -> None:
    """Split the sources, train the tokenizer, store token arrays, write the shipped texts."""
    sources = read_sources(args.stdlib)
    train = {name: text for name, text in sources.items() if not is_heldout(name)}
    heldout = {name: text for name, text in sources.items() if is_heldout(name)}
    tokenizer = train_tokenizer(list(train.values()))
    save_tokenizer(tokenizer, args.work / "tokenizer")

    code = [p for text in train.values() for p in split_source(text, 3600) if p.strip()]
    code = [p for p in code if not mostly_numbers(p)]
    chat = sorted({render_chat(*pair) for text in train.values() for pair in chat_pairs(text)})
    code_tokens, code_offsets = pack(encode(tokenizer, code))
    chat_tokens, chat_offsets = pack(encode(tokenizer, chat))

    write_lines(
        args.data / "calibration.jsonl", shipped_texts(train, tokenizer, args.calibration_bytes, 1)
    )
    lines = shipped_texts(heldout, tokenizer, args.heldout_bytes, 2)
    write_lines(args.data / "heldout.jsonl", lines)
    heldout_tokens, _ = pack(tokenizer([line["text"] for line in lines])["input_ids"])
    arrays = {
        "code_tokens": code_tokens,
        "code_offsets": code_offsets,
        "chat_tokens": chat_tokens,
        "chat_offsets": chat_offsets,
        "heldout_tokens": heldout_tokens,
    }
    save_file(arrays, args.work / "corpus.safetensors")
    summary = {k: len(v) for k, v in arrays.items()}
    summary["train_bytes"] = sum(len(t.encode()) for t in train.values())
    summary["heldout_bytes"] = sum(len(t.encode()) for t in heldout.values())
    summary["train_files"], summary["heldout_files"] = len(train), len(heldout)
    (args.work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


# --- batches ----------------------------------------------------------------------------------


class Corpus:
    """Token arrays that `prepare` stored, and the streams made from them."""

    def __init__(self, work: Path) -> None:
        arrays = load_file(work / "corpus.safetensors")
        self.code = np.split(arrays["code_tokens"], arrays["code_offsets"][1:-1])
        self.chat = np.split(arrays["chat_tokens"], arrays["chat_offsets"][1:-1])
        self.heldout = arrays["heldout_tokens"]

    def epoch(self, seed: int) -> np.ndarray:
        """One pass over the corpus in a fresh order, as a uint16 stream of documents.

        Half of the code documents are arranged for fill-in-the-middle, at points drawn anew;
        half of the chat documents take part. Every document has a bos and an eos.
        """
        rng = np.random.default_rng(seed)
        bos, eos = np.array([0], np.uint16), np.array([1], np.uint16)
        pieces = []
        for index in rng.permutation(len(self.code) + len(self.chat)):
            if index >= len(self.code):
                if rng.random() < 0.5:  # chat documents end with their own eos
                    pieces += [bos, self.chat[index - len(self.code)]]
                continue
            document = self.code[index]
            if rng.random() < 0.5:
                document = arrange_fim(document, rng)
            pieces += [bos, document, eos]
        return np.concatenate(pieces)


def to_sequences(stream: np.ndarray, length: int) -> Tensor:
    """Cut a token stream into int64 rows [n, length + 1]; neighbours share one token."""
    rows = (len(stream) - 1) // length
    starts = np.arange(rows)[:, None] * length
    return torch.from_numpy(stream[starts + np.arange(length + 1)].astype(np.int64))


def batches(
    corpus: Corpus, first_epoch: int, size: int, length: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Endless (epoch, batch int64 [size, length + 1]) pairs; the next epoch is made ahead."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(corpus.epoch, first_epoch)
        epoch = first_epoch
        while True:
            rows = to_sequences(ahead.result(), length).to(device)
            ahead = pool.submit(corpus.epoch, epoch + 1)
            rows = rows[torch.randperm(len(rows), device=device)]
            for chunk in rows.split(size):
                if len(chunk) == size or len(rows) < size:
                    yield epoch, chunk
            epoch += 1
