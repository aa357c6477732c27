"""Tokenizers, models and the engine, for tests that run llama.cpp."""

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from tiny import tiny_model
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PYTHON = Path(__file__).parents[2] / "src/moefuse"
VOCABULARY = 400


def cutting_tokenizer(cuts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows all bytes, trained on this library's own source."""
    steps: list[Any] = []
    for cut in cuts:
        if cut == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut != "bytes":
            steps.append(pre_tokenizers.Split(Regex(cut), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cuts == ("bytes",)))
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    trained.decoder = decoders.ByteLevel()
    return _trained(trained, ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet())


def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer like Mixtral's: pieces with a mark for spaces, bytes for what has no piece."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return _trained(trained, ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))], [])


def _trained(
    tokenizer: Tokenizer, special: list[str], alphabet: list[str]
) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    lines = [line for path in sorted(PYTHON.glob("*.py")) for line in path.read_text().splitlines()]
    tokenizer.train_from_iterator(lines, trainer)
    stored = json.loads(tokenizer.to_str())
    bytes_ = [entry for entry in stored["added_tokens"] if entry["content"].startswith("<0x")]
    # Bytes are plain tokens there, which no text spells.
    stored["added_tokens"] = [e for e in stored["added_tokens"] if e not in bytes_]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), bos_token="<s>", eos_token="</s>"
    )


def save(path: Path, family: str, tokenizer: Any, **changes: Any) -> Any:
    """Save a tiny random model of a family, D 64, with this tokenizer and return it."""
    usual = {"vocab_size": len(tokenizer), "hidden_size": 64, "max_position_embeddings": 256}
    model = tiny_model(family, **{**usual, **changes})
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Return token ids to begin with, 3 to 12 each."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    return [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@contextmanager
def loaded(path: Path, *, verbose: bool = False) -> Iterator[llama_cpp.Llama]:
    """Load a file in the engine, on one CPU thread, caches in f32."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=verbose,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
    )
    try:
        yield model
    finally:
        model.close()


def logits(model: llama_cpp.Llama, ids: Sequence[int]) -> Tensor:
    """Return the logits of every token, (T, V) fp32."""
    model.reset()
    model.eval(list(ids))
    count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model.model))
    pointer = llama_cpp.llama_get_logits(model.ctx)
    flat = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (len(ids) * count))).contents
    return torch.tensor(flat[:]).view(len(ids), count)


def greedy(model: llama_cpp.Llama, ids: Sequence[int], new: int) -> list[int]:
    """Return the likeliest tokens one after another, decoded one at a time."""
    model.reset()
    model.eval(list(ids))
    made: list[int] = []
    for _ in range(new):
        row = model.scores[model.n_tokens - 1]
        made.append(int(row.argmax()))
        model.eval(made[-1:])
    return made


@torch.no_grad()
def expected(model: Any, ids: Sequence[int], new: int) -> list[int]:
    """Return what Transformers chooses greedily, whatever ends a text."""
    given = torch.tensor([list(ids)])
    for _ in range(new):
        token = model(given, use_cache=False).logits[0, -1].argmax()
        given = torch.cat([given, token.view(1, 1)], 1)
    return given[0, len(ids) :].tolist()
