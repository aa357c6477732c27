"""A tokenizer as GGUF files hold it: tokens, their kinds, merges, special tokens, chat template.

llama.cpp knows how text is cut before merging by a name, the *pre-tokenizer*. It is found by the
expressions in ``tokenizer.json``; one that nobody named must be declared by the user, because a
wrong one changes tokens without a word.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moefuse.artifacts import read_json
from moefuse.errors import UserError
from moefuse.infill import INFILL_STYLES

TOKENIZER = "tokenizer.json"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TOKEN = 1, 2, 3, 4, 5, 6

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_HAN = "[一-龥ࠀ-一가-퟿]+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}",): "qwen2",
    (rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, "digits"): "deepseek-coder",
}
"""Names by what cuts text, in order: expressions, ``digits`` one by one, ``bytes`` as GPT-2
does."""


@dataclass(frozen=True)
class Vocabulary:
    """``model`` is the engine's kind (``gpt2``: byte-level pairs; ``llama``: pieces with scores).

    ``special`` are token ids and switches by key, without ``tokenizer.``.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None


def read_vocabulary(
    directory: Path, tokenizer: PreTrainedTokenizerBase, size: int, pre: str | None
) -> Vocabulary:
    """Read the tokenizer of a checkpoint for a model that knows ``size`` words.

    ``pre`` is the pre-tokenizer that the user declares. Raises ``UserError`` for a tokenizer that
    GGUF files cannot hold, and where nothing says how text is cut.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{directory} has no {TOKENIZER}, from which a GGUF file's vocabulary is made; save "
            "its tokenizer with Transformers, which writes one."
        )
    stored = read_json(path)
    model = stored.get("model") or {}
    if model.get("type") != "BPE":
        raise UserError(
            f"The tokenizer of {directory} is of the kind {model.get('type')!r}; GGUF files are "
            "written for byte pair encodings (BPE) only."
        )
    pieces = bool(model.get("byte_fallback"))
    named = pre or ("default" if pieces else _pre_tokenizer(stored, directory))
    tokens, kinds = _tokens(stored, size, directory, pieces=pieces)
    template = tokenizer.chat_template
    return Vocabulary(
        "llama" if pieces else "gpt2",
        named,
        tokens,
        kinds,
        merges=[] if pieces else _merges(model),
        # Pieces merged first have the lowest number; the engine merges the highest score first.
        scores=[-float(number) for number in range(size)] if pieces else [],
        special={**_special(tokenizer), **(_prefix(stored) if pieces else {})},
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _pre_tokenizer(stored: Mapping[str, Any], directory: Path) -> str:
    """Return the engine's name for how text is cut; raises ``UserError`` where it has none."""
    cuts = tuple(_cuts(stored.get("pre_tokenizer") or {}))
    if stored.get("normalizer") is None and cuts in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[cuts]
    raise UserError(
        f"How the tokenizer of {directory} cuts text is none of the ways known here "
        f"({', '.join(PRE_TOKENIZERS.values())}); say with --pre-tokenizer which of llama.cpp's "
        "names is right, or nearest (a wrong one changes tokens)."
    )


def _cuts(step: Mapping[str, Any]) -> list[str]:
    """List what cuts text in a pre-tokenizer of ``tokenizer.json``, in order."""
    kind = step.get("type")
    if kind == "Sequence":
        return [cut for inner in step.get("pretokenizers", []) for cut in _cuts(inner)]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str((step.get("pattern") or {}).get("Regex"))]
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["bytes"] if step.get("use_regex", True) else []
    return [f"unknown {kind}"]


def _tokens(
    stored: Mapping[str, Any], size: int, directory: Path, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Return every token in order and its kind; words that no token has are unused."""
    by_number = {number: token for token, number in stored["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in stored.get("added_tokens", [])}
    by_number |= {number: entry["content"] for number, entry in added.items()}
    if max(by_number) >= size:
        raise UserError(
            f"The tokenizer of {directory} has the token {max(by_number)}, but the model knows "
            f"{size} words (vocab_size); take both from the same place."
        )
    unknown = stored["model"].get("unk_token")
    tokens, kinds = [], []
    for number in range(size):
        token = by_number.get(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(_kind(token, added.get(number), unknown, pieces=pieces))
    return tokens, kinds


def _kind(
    token: str | None, added: Mapping[str, Any] | None, unknown: str | None, *, pieces: bool
) -> int:
    if token is None:
        return UNUSED
    if pieces and token == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return BYTE_TOKEN if pieces and BYTE.fullmatch(token) else NORMAL


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Return merges as the engine writes them, two tokens with a space between."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return [str(merge) for merge in merges]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return ids of special tokens, those for filling in the middle too, and what is added."""
    known = tokenizer.get_vocab()
    named = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    style = next((s for s in INFILL_STYLES if all(t in known for t in s.tokens)), None)
    if style is not None:
        keys = ("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id")
        named |= {key: known[token] for key, token in zip(keys, style.tokens, strict=True)}
    ids = {f"ggml.{key}": number for key, number in named.items() if isinstance(number, int)}
    around: Any = tokenizer("a")["input_ids"]
    return {
        **ids,
        "ggml.add_bos_token": bool(around) and around[0] == tokenizer.bos_token_id,
        "ggml.add_eos_token": bool(around) and around[-1] == tokenizer.eos_token_id,
    }


def _prefix(stored: Mapping[str, Any]) -> dict[str, bool]:
    """Say whether a space is put before the text, as tokenizers of pieces often do."""
    steps = [stored.get("normalizer") or {}, stored.get("pre_tokenizer") or {}]
    steps += [inner for step in list(steps) for inner in step.get("normalizers", [])]
    prepends = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )
    return {"ggml.add_space_prefix": prepends}
