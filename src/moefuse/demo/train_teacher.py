"""Make the bundled teacher: prepare the corpus, train the model, evaluate it.

    python -m moefuse.demo.train_teacher prepare  --work DIR
    python -m moefuse.demo.train_teacher train    --work DIR --out DIR --minutes 8
    python -m moefuse.demo.train_teacher evaluate --work DIR --model DIR

The corpus is the Python standard library of the interpreter that runs `prepare`. The model is a
Transformers `DeepseekV2ForCausalLM`; `train` runs its own forward pass over that module's
parameters, because it needs the router's probabilities for the load-balancing loss and a batched
expert product that compiles, and a test holds the two forward passes equal.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 1024
DEMO = Path(__file__).resolve().parent

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


# --- prepare: which files, and on which side of the split -------------------------------------


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


# --- prepare: documents -----------------------------------------------------------------------


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
    save_numpy(arrays, args.work / "corpus.safetensors")
    summary = {k: len(v) for k, v in arrays.items()}
    summary["train_bytes"] = sum(len(t.encode()) for t in train.values())
    summary["heldout_bytes"] = sum(len(t.encode()) for t in heldout.values())
    summary["train_files"], summary["heldout_files"] = len(train), len(heldout)
    (args.work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


# --- train: batches ---------------------------------------------------------------------------


class Corpus:
    """Token arrays that `prepare` stored, and the streams made from them."""

    def __init__(self, work: Path) -> None:
        arrays = load_numpy(work / "corpus.safetensors")
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


# --- train: the forward pass ------------------------------------------------------------------
#
# Layers are typed Any: to a type checker every attribute of an nn.Module is Tensor or Module.


class GatherRows(torch.autograd.Function):
    """Row i of the result is row `order[i] // repeat` of x; `order` is a permutation.

    The gradient is a gather and a sum over the repeats, not a scatter with atomics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, repeat: int) -> Tensor:
        """x: [rows, width]; order, inverse: int64 [rows * repeat], each other's inverse."""
        ctx.save_for_backward(inverse)
        ctx.repeat = repeat
        return x[order // repeat]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of x: [rows, width]."""
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].unflatten(0, (-1, ctx.repeat)).sum(1), None, None, None


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over the last dimension, computed in fp32 and returned in x's dtype."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.variance_epsilon)
    return normed.to(x.dtype)


def linear(layer: Any, x: Tensor) -> Tensor:
    """Product with a linear layer's weight, in x's dtype (the weight is kept in fp32)."""
    return F.linear(x, layer.weight.to(x.dtype))


def rotary_tables(config: Any, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding, fp32 [2, length, qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    angles = torch.outer(
        torch.arange(length, device=device, dtype=torch.float32),
        config.rope_parameters["rope_theta"] ** -exponents,
    )
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs. x: [batch, heads, length, qk_rope_head_dim]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = tables[0], tables[1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def attention(attn: Any, x: Tensor, tables: Tensor) -> Tensor:
    """Multi-head latent attention, causal. x: [batch, length, hidden]."""
    batch, length, _ = x.shape
    nope, rope, value = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.v_head_dim
    q = linear(attn.q_proj, x).view(batch, length, -1, nope + rope).transpose(1, 2)
    q_nope, q_rope = q.split([nope, rope], -1)
    latent, k_rope = linear(attn.kv_a_proj_with_mqa, x).split([attn.kv_lora_rank, rope], -1)
    kv = linear(attn.kv_b_proj, rms_norm(attn.kv_a_layernorm, latent))
    kv = kv.view(batch, length, -1, nope + value).transpose(1, 2)
    k_nope, v = kv.split([nope, value], -1)
    k_rope = rotate(k_rope[:, None], tables).expand(-1, k_nope.shape[1], -1, -1)
    out = F.scaled_dot_product_attention(
        torch.cat([q_nope, rotate(q_rope, tables)], -1),
        torch.cat([k_nope, k_rope], -1),
        v,
        is_causal=True,
        scale=attn.scaling,
    )
    return linear(attn.o_proj, out.transpose(1, 2).reshape(batch, length, -1))


def mlp(block: Any, x: Tensor) -> Tensor:
    """Gated MLP, any leading dimensions."""
    return linear(block.down_proj, F.silu(linear(block.gate_proj, x)) * linear(block.up_proj, x))


@torch.compiler.disable
def routed_experts(experts: Any, x: Tensor, index: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Weighted sum of each token's experts, by one grouped product over tokens sorted by expert.

    x: [tokens, hidden]; index: int64 [tokens, k]; weight: [tokens, k] in x's dtype; ends: int32
    [experts], how many choices fell on this expert and those before it.

    Not compiled: on an H200, torch 2.11's compiled backward of this function gave gradients
    wrong by factors of thousands where eager ones were right.
    """
    tokens, k = index.shape
    order = index.flatten().argsort()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=x.device))
    rows = GatherRows.apply(x, order, inverse, k)
    gate_up = experts.gate_up_proj.to(x.dtype).transpose(1, 2)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, -1)
    down = experts.down_proj.to(x.dtype).transpose(1, 2)
    rows = F.grouped_mm(F.silu(gate) * up, down, offs=ends)
    rows = GatherRows.apply(rows, inverse, order, 1)
    return (rows.view(tokens, k, -1) * weight[..., None]).sum(1)


def moe(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixture-of-experts layer. x: [batch, length, hidden].

    Returns the output, the load-balancing loss (1 when even; fp32 scalar), and the share of
    expert choices that fell on each expert (fp32 [experts], sums to 1).
    """
    flat = x.flatten(0, 1)
    gate = block.gate
    probabilities = F.linear(flat.float(), gate.weight.float()).softmax(-1)
    weight, index = probabilities.topk(gate.top_k, dim=-1)
    weight = (weight * gate.routed_scaling_factor).to(x.dtype)
    counts = F.one_hot(index, gate.num_experts).sum((0, 1))
    share = counts.float() / index.numel()
    balance = gate.num_experts * (share * probabilities.mean(0)).sum()
    ends = counts.cumsum(0).to(torch.int32)
    routed = routed_experts(block.experts, flat, index, weight, ends)  # pyright: ignore[reportCallIssue]
    return routed.view_as(x) + mlp(block.shared_experts, x), balance, share


def dense_layer(layer: Any, x: Tensor, tables: Tensor, dropout: float) -> Tensor:
    """Decoder layer with an ordinary MLP. x: [batch, length, hidden]."""
    x = x + F.dropout(
        attention(layer.self_attn, rms_norm(layer.input_layernorm, x), tables), dropout
    )
    return x + F.dropout(mlp(layer.mlp, rms_norm(layer.post_attention_layernorm, x)), dropout)


def moe_layer(
    layer: Any, x: Tensor, tables: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder layer with experts; also returns `moe`'s balance loss and expert shares."""
    x = x + F.dropout(
        attention(layer.self_attn, rms_norm(layer.input_layernorm, x), tables), dropout
    )
    out, balance, share = moe(layer.mlp, rms_norm(layer.post_attention_layernorm, x))
    return x + F.dropout(out, dropout), balance, share


def head_loss(model: Any, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats. x: [batch, length, hidden]; targets: int64 [batch, length]."""
    logits = linear(model.lm_head, rms_norm(model.model.norm, x))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Objective:
    """The training loss of a model; its parts are compiled once each when `compiled` is set.

    Compiling the layer rather than the model lets all layers of a kind share one compilation.
    """

    def __init__(self, model: DeepseekV2ForCausalLM, dtype: torch.dtype, compiled: bool) -> None:
        wrap: Callable[..., Any] = torch.compile if compiled else lambda function: function
        if compiled:  # one graph for each dropout rate, not one with the rate as an input
            torch._dynamo.config.specialize_float = True
        self.model, self.dtype = model, dtype
        self.dense_layer, self.moe_layer = wrap(dense_layer), wrap(moe_layer)
        self.head_loss = wrap(head_loss)

    def __call__(self, rows: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of token rows [batch, length + 1].

        Returns cross-entropy (nats), the summed balance loss of the layers, and the share of each
        expert in each sparse layer [layers, experts].
        """
        model = self.model.model
        ids, targets = rows[:, :-1], rows[:, 1:]
        tables = rotary_tables(self.model.config, ids.shape[1], ids.device)
        x = F.embedding(ids, model.embed_tokens.weight).to(self.dtype)
        balances, shares = [], []
        for index, layer in enumerate(model.layers):
            if index < self.model.config.first_k_dense_replace:
                x = self.dense_layer(layer, x, tables, dropout)
            else:
                x, balance, share = self.moe_layer(layer, x, tables, dropout)
                balances.append(balance)
                shares.append(share)
        loss = self.head_loss(self.model, x, targets)
        return loss, torch.stack(balances).sum(), torch.stack(shares)

    @torch.no_grad()
    def heldout(self, rows: Tensor, size: int) -> tuple[float, Tensor]:
        """Cross-entropy (nats) and expert shares [layers, experts] of rows, `size` at a time."""
        chunks = [chunk for chunk in rows.split(size) if len(chunk) == size]
        results = [self(chunk) for chunk in chunks]
        loss = torch.stack([r[0] for r in results]).mean().item()
        return loss, torch.stack([r[2] for r in results]).mean(0)


# --- train: optimisation ----------------------------------------------------------------------


def teacher_config(**changes: int) -> DeepseekV2Config:
    """The teacher's configuration; tests shrink it through `changes`."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 160,
        "intermediate_size": 512,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 6,
        "first_k_dense_replace": 1,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "max_position_embeddings": 2048,
    }
    return DeepseekV2Config(
        **(shape | changes),
        norm_topk_prob=False,
        topk_method="greedy",
        scoring_func="softmax",  # pyright: ignore[reportCallIssue] (unlisted, but kept)
        # Six softmax weights of 64 sum to about 0.4; this brings the routed output near that of
        # the shared experts.
        routed_scaling_factor=2.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; the norms' weights are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


@dataclass
class Progress:
    """Where a training run stands; stored beside its tensors."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_heldout: float = math.inf


class Run:
    """A training run: model, optimizer, progress, and their files under one folder."""

    def __init__(self, args: argparse.Namespace, config: DeepseekV2Config) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = DeepseekV2ForCausalLM(config)
        nn.Module.to(self.model, self.device, torch.float32)
        self.optimizer = make_optimizer(self.model, args.lr, args.weight_decay)
        self.progress = Progress()
        self.folder = Path(args.out)
        if (self.folder / "progress.json").exists():
            self.load()

    def load(self) -> None:
        """Take up the run from its folder."""
        state = load_file(self.folder / "state.safetensors", device=str(self.device))
        self.model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
        restored = self.optimizer.state_dict()
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                restored["state"].setdefault(int(index), {})[field] = value
        self.optimizer.load_state_dict(restored)
        self.progress = Progress(**json.loads((self.folder / "progress.json").read_text()))

    def save(self) -> None:
        """Write the run's state. Each file is replaced whole, the progress last."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for index, fields in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{field}": value for field, value in fields.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / "state.tmp"
        save_file(tensors, scratch)
        scratch.replace(self.folder / "state.safetensors")
        scratch.write_text(json.dumps(asdict(self.progress)))
        scratch.replace(self.folder / "progress.json")

    def learning_rate(self, done: float) -> float:
        """Rate at a share `done` of the run: 2 % warm-up, then a straight line to zero."""
        return self.args.lr * min(done / 0.02, (1 - done) / 0.98) if done < 1 else 0.0

    def share_done(self, started: float) -> float:
        """How much of the run is done, by steps if they were asked for, else by the clock."""
        if self.args.steps:
            return self.progress.step / self.args.steps
        return (time.monotonic() - started) / (60 * self.args.minutes)


def export(run: Run, folder: Path, heldout: float) -> None:
    """Write the model as a bf16 Hugging Face checkpoint with a note of how it was trained."""
    model = DeepseekV2ForCausalLM(run.model.config).bfloat16()
    model.load_state_dict(run.model.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder, max_shard_size="9MB")
    facts = asdict(run.progress) | {"packed_heldout_cross_entropy": heldout}
    del facts["best_heldout"]
    options = {
        key: getattr(run.args, key)
        for key in ("batch", "length", "lr", "weight_decay", "dropout", "balance", "seed")
    }
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU"
    note = {"training": facts | options | {"device": device}}
    (folder / "metrics.json").write_text(json.dumps(note, indent=1) + "\n")


def train_step(run: Run, objective: Objective, rows: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One update on token rows [batch, length + 1]. Returns cross-entropy and balance loss."""
    loss, balance, _ = objective(rows, run.args.dropout)
    (loss + run.args.balance * balance).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return loss.detach(), balance.detach()


def verify_gradients(run: Run, objective: Objective, rows: Tensor) -> None:
    """Stop if the objective's gradients are far from those of the same code run eagerly."""
    norms = []
    for candidate in (objective, Objective(run.model, objective.dtype, compiled=False)):
        run.model.zero_grad()
        candidate(rows)[0].backward()
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(torch.stack([grad.norm() for grad in grads]))
    worst = ((norms[0] - norms[1]).abs() / norms[1].clamp_min(1e-12)).max().item()
    if not worst < 0.2:
        raise RuntimeError(f"compiled gradients differ from eager ones by a factor of {worst:.3g}")


def check_heldout(run: Run, objective: Objective, rows: Tensor, train_loss: float) -> None:
    """Measure the held-out text, report, and export the model if it is the best so far."""
    heldout, shares = objective.heldout(rows, min(run.args.batch, len(rows)))
    p = run.progress
    least, most = (shares.min().item(), shares.max().item())
    experts = shares.shape[1]
    print(
        f"step {p.step} epoch {p.epoch} tokens {p.tokens / 1e6:.1f}M {p.seconds:.0f}s"
        f" {p.tokens / max(p.seconds, 1e-9) / 1e3:.0f}k/s train {train_loss:.4f}"
        f" heldout {heldout:.4f} load {least * experts:.2f}..{most * experts:.2f}",
        flush=True,
    )
    if heldout < p.best_heldout:
        p.best_heldout = heldout
        export(run, run.folder / "export", heldout)


def train(args: argparse.Namespace, config: DeepseekV2Config | None = None) -> Run:
    """Train until the time or the steps are used up; the best held-out model is in out/export."""
    run = Run(args, config or teacher_config())
    torch.set_float32_matmul_precision("high")
    corpus = Corpus(args.work)
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    objective = Objective(run.model, dtype, compiled=args.compile)
    heldout = to_sequences(corpus.heldout, args.length).to(run.device)
    if args.compile:
        # Before the clock starts, so that compiling does not eat the warm-up.
        verify_gradients(run, objective, heldout[: args.batch])
        objective(heldout[: args.batch], args.dropout)[0].backward()
        run.model.zero_grad()
    started = time.monotonic() - run.progress.seconds
    next_check, recent = args.check_every, torch.zeros(2, device=run.device)
    for epoch, rows in batches(corpus, run.progress.epoch, args.batch, args.length, run.device):
        done = run.share_done(started)
        if done >= 1:
            break
        losses = train_step(run, objective, rows, run.learning_rate(done))
        recent = (
            torch.stack(losses)
            if run.progress.step == 0
            else recent.lerp(torch.stack(losses), 0.05)
        )
        run.progress.step += 1
        run.progress.epoch = epoch
        run.progress.tokens += rows[:, 1:].numel()
        run.progress.seconds = time.monotonic() - started
        if run.progress.seconds > next_check:
            check_heldout(run, objective, heldout, recent[0].item())
            next_check = time.monotonic() - started + args.check_every
            run.save()
    check_heldout(run, objective, heldout, recent[0].item())
    run.save()
    return run


# --- evaluate ---------------------------------------------------------------------------------


def unigram_cross_entropy(corpus: Corpus, targets: np.ndarray) -> float:
    """Nats per token of `targets` under the training stream's token frequencies (plus one)."""
    counts = np.bincount(corpus.epoch(0), minlength=VOCAB_SIZE) + 1.0
    return float(-np.log(counts / counts.sum())[targets].mean())


class ExpertLoad:
    """Counts how often each router picks each expert, by hooks on the routers."""

    def __init__(self, model: Any) -> None:
        self.counts: dict[int, Tensor] = {}
        self.handles = []
        for index, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "gate"):
                self.counts[index] = torch.zeros(layer.mlp.gate.num_experts, dtype=torch.int64)
                hook = layer.mlp.gate.register_forward_hook(self._hook(index))
                self.handles.append(hook)

    def _hook(self, index: int) -> Callable[..., None]:
        def count(_module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
            self.counts[index] += output[2].flatten().bincount(minlength=len(self.counts[index]))

        return count

    def table(self) -> list[dict[str, float]]:
        """Per layer: least and greatest load over the even load, and entropy over its maximum."""
        rows = []
        for index, count in self.counts.items():
            share = count.double() / count.sum()
            entropy = -(share * share.clamp_min(1e-12).log()).sum() / math.log(len(share))
            least, most = share.min() * len(share), share.max() * len(share)
            row = {"min": least, "max": most, "entropy": entropy}
            rows.append({"layer": index} | {k: round(float(v), 4) for k, v in row.items()})
        return rows


@torch.no_grad()
def measure_text(model: Any, tokenizer: Any, lines: list[dict[str, str]]) -> dict[str, Any]:
    """Cross-entropy (nats per token) and top-1 accuracy, each text on its own after a bos.

    Also returns the target ids [targets] under "targets".
    """
    totals: dict[str, np.ndarray] = {}
    targets = []
    for line in lines:
        ids = tokenizer(line["text"], return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1].float()
        loss = F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        hits = (logits.argmax(-1) == ids[0, 1:]).sum().item()
        entry = np.array([loss, hits, ids.shape[1] - 1])
        for kind in (line["kind"], "all"):
            totals[kind] = totals.get(kind, np.zeros(3)) + entry
        targets.append(ids[0, 1:].numpy())
    report: dict[str, Any] = {
        kind: {
            "cross_entropy": round(t[0] / t[2], 4),
            "accuracy": round(t[1] / t[2], 4),
            "tokens": int(t[2]),
        }
        for kind, t in sorted(totals.items())
    }
    return report | {"targets": np.concatenate(targets)}


SAMPLE_PROMPTS = {
    "completion": "def read_lines(path):\n",
    "infill": (
        f"{FIM_BEGIN}class Stack:\n    def __init__(self):\n        self.items = []\n\n"
        f"    def push(self, item):\n{FIM_HOLE}\n\n    def pop(self):\n"
        f"        return self.items.pop()\n{FIM_END}"
    ),
}
SAMPLE_QUESTION = "Write a Python function add(a, b) that does this: Return the sum of a and b."


def samples(model: Any, tokenizer: Any) -> dict[str, dict[str, str]]:
    """Greedy continuations of one prompt of each kind, at most 80 new tokens."""
    message = [{"role": "user", "content": SAMPLE_QUESTION}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    prompts = SAMPLE_PROMPTS | {"chat": chat.removeprefix(BOS)}
    result = {}
    for kind, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=80,
            do_sample=False,
        )
        reply = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
        result[kind] = {"prompt": prompt, "reply": reply}
    return result


def model_card(metrics: dict[str, Any], examples: dict[str, dict[str, str]]) -> str:
    """The teacher's README.md."""
    training, heldout = metrics["training"], metrics["heldout"]
    results = "\n".join(
        f"| {kind} | {row['tokens']} | {row['cross_entropy']:.3f} | {row['accuracy']:.3f} |"
        for kind, row in heldout["by_kind"].items()
    )
    load = "\n".join(
        f"| {row['layer']} | {row['min']:.2f} | {row['max']:.2f} | {row['entropy']:.3f} |"
        for row in heldout["expert_load"]
    )
    shown = "\n\n".join(
        f"{kind}:\n\n~~~~text\n{e['prompt']}\u27e6{e['reply']}\u27e7\n~~~~"
        for kind, e in examples.items()
    )
    tokens = "\n".join(f"| {i} | `{t}` |" for i, t in enumerate(SPECIAL_TOKENS))
    return MODEL_CARD.format(
        note=training["note"],
        millions=training["tokens"] / 1e6,
        epochs=training["epoch"] + 1,
        minutes=training["seconds"] / 60,
        device=training["device"],
        unigram=heldout["unigram_cross_entropy"],
        results=results,
        load=load,
        samples=shown,
        tokens=tokens,
        fim=f"{FIM_BEGIN}PREFIX{FIM_HOLE}SUFFIX{FIM_END}",
        modules=", ".join(f"`{m}`" for m in sorted(HELDOUT_MODULES)),
        **{k: training[k] for k in ("batch", "length", "lr", "weight_decay", "dropout", "balance")},
    )


MODEL_CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
tags: [mixture-of-experts, deepseek_v2, test-bench]
---

# The bundled teacher

A small DeepSeek-V2-architecture language model of Python source code: 6 layers of width 160
(the first dense), 64 routed experts with 6 used per token and 2 shared experts in each of the
other 5, multi-head latent attention, 4096 tokens, 12.3 M parameters in bf16. It was really
trained, so its experts differ and its router means something.

**Intended use:** a test bench for compressing Mixture-of-Experts models, small enough to run in
seconds on a laptop. It is not an assistant: what it writes looks like Python and is mostly wrong.

## Data

Trained on the sources of the CPython 3.11 standard library with its tests, and nothing else:
plain text, fill-in-the-middle arrangements drawn anew in every epoch, and question-and-answer
pairs made from docstrings. The sources are under the PSF licence (see `LICENSE-PYTHON.txt`
beside the shipped texts). Kept away from training, with their tests: {modules}.

## Training

{millions:.0f} M tokens ({epochs} passes over the corpus) in {minutes:.1f} minutes on one
{device}: batches of {batch} sequences of {length} tokens, AdamW, peak learning rate {lr} falling
to zero, weight decay {weight_decay}, dropout {dropout}, load balancing weight {balance} per
layer. {note}

`python -m moefuse.demo.train_teacher` does it again: `prepare`, `train --compile`, `evaluate`. Not
bit for bit, since the schedule follows the clock unless `--steps` is given.

## Results

On the held-out modules (`heldout.jsonl`; fp32 on CPU; each text alone). A unigram model of the
training tokens has a cross-entropy of {unigram:.3f} nats per token there. The settings and the
checkpoint were chosen on these same texts, so the figures are a little better than fresh texts
would give.

| texts | tokens | cross-entropy (nats/token) | top-1 accuracy |
| --- | --- | --- | --- |
{results}

Expert load there, over an even load (1.0), and its entropy over the greatest possible:

| layer | least | greatest | entropy |
| --- | --- | --- | --- |
{load}

## Special tokens

The tokenizer puts the first one at the front. Infilling:
`{fim}`, then the middle.
Chat: `User: ...`, blank line, `Assistant:`; `tokenizer.apply_chat_template` writes it.

| id | token |
| --- | --- |
{tokens}

## Samples

Greedy, at most 80 tokens; what the model wrote stands in \u27e6 \u27e7.

{samples}
"""


def evaluate(args: argparse.Namespace) -> None:
    """Measure the held-out texts; write metrics.json and the model card into the model folder."""
    tokenizer = AutoTokenizer.from_pretrained(args.work / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, experts_implementation="grouped_mm"
    ).eval()
    load = ExpertLoad(model)
    report = measure_text(model, tokenizer, read_lines(args.data / "heldout.jsonl"))
    unigram = unigram_cross_entropy(Corpus(args.work), report.pop("targets"))
    path = args.model / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["training"]["note"] = args.note
    metrics["heldout"] = report["all"] | {
        "unigram_cross_entropy": round(unigram, 4),
        "by_kind": report,
        "expert_load": load.table(),
        "text_sha256": hashlib.sha256((args.data / "heldout.jsonl").read_bytes()).hexdigest(),
    }
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    card = model_card(metrics, samples(model, tokenizer))
    (args.model / "README.md").write_text(card, "utf-8")
    for file in (args.work / "tokenizer").iterdir():
        shutil.copy(file, args.model)
    print(card)


# --- command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of the three steps."""
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    steps = top.add_subparsers(dest="command", required=True)
    one = steps.add_parser("prepare", help="corpus, tokenizer and shipped texts")
    one.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    one.add_argument("--calibration-bytes", type=int, default=1_000_000)
    one.add_argument("--heldout-bytes", type=int, default=600_000)
    two = steps.add_parser("train", help="train; the best model lands in OUT/export")
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--minutes", type=float, default=4.3)
    two.add_argument("--steps", type=int, default=0, help="instead of --minutes")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    two.add_argument("--batch", type=int, default=64, help="sequences")
    two.add_argument("--length", type=int, default=SEQUENCE_LENGTH, help="tokens a sequence")
    two.add_argument("--lr", type=float, default=3e-3)
    two.add_argument("--weight-decay", type=float, default=0.5)
    two.add_argument("--dropout", type=float, default=0.35)
    two.add_argument("--balance", type=float, default=0.01)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--check-every", type=float, default=20.0, help="seconds")
    three = steps.add_parser("evaluate", help="measure, and write the model card")
    three.add_argument("--model", type=Path, required=True)
    three.add_argument("--note", default="", help="a sentence about the run, for the card")
    for step in (one, two, three):
        step.add_argument("--work", type=Path, required=True, help="folder `prepare` writes to")
        step.add_argument("--data", type=Path, default=DEMO / "data", help="shipped texts")
    return top


def main(argv: list[str] | None = None) -> None:
    """Run one step."""
    args = parser().parse_args(argv)
    {"prepare": prepare, "train": train, "evaluate": evaluate}[args.command](args)


if __name__ == "__main__":
    main()
