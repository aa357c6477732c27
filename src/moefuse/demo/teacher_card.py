"""The teacher's measures: how well it predicts held-out text, and the card that reports it.

`evaluate` runs the exported model on the shipped held-out texts, counts how evenly its routers
spread the tokens, and writes metrics.json and the model card (README.md) beside the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefuse.demo.teacher_data import (
    BOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    HELDOUT_MODULES,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    Corpus,
    read_lines,
)

# --- what is measured -------------------------------------------------------------------------


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


# --- the card ---------------------------------------------------------------------------------


def model_card(
    model_type: str, metrics: dict[str, Any], examples: dict[str, dict[str, str]]
) -> str:
    """The README.md of the teacher of that architecture."""
    default = model_type == "deepseek_v2"
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
        model_type=model_type,
        opening=OPENINGS[model_type],
        train="train --compile" if default else f"train --architecture {model_type} --compile",
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


OPENINGS = {
    "deepseek_v2": """# The bundled teacher

A small DeepSeek-V2-architecture language model of Python source code: 6 layers of width 160
(the first dense), 64 routed experts with 6 used per token and 2 shared experts in each of the
other 5, multi-head latent attention, 4096 tokens, 12.3 M parameters in bf16. It was really
trained, so its experts differ and its router means something.""",
    "qwen3_moe": """# The second teacher

A small Qwen3-MoE-architecture language model of Python source code: 5 layers of width 192, each
with 32 routed experts of which 4 are used per token (their weights summing to 1) and no shared
expert, grouped-query attention with normalised queries and keys, 4096 tokens, tied embeddings,
7.2 M parameters in bf16. It was really trained, so its experts differ and its router means
something.""",
}  # by model_type

MODEL_CARD = """---
license: apache-2.0
language: [en]
library_name: transformers
tags: [mixture-of-experts, {model_type}, test-bench]
---

{opening}

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

`python -m moefuse.demo.train_teacher` does it again: `prepare`, `{train}`, `evaluate`. Not
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
    card = model_card(model.config.model_type, metrics, samples(model, tokenizer))
    (args.model / "README.md").write_text(card, "utf-8")
    for file in (args.work / "tokenizer").iterdir():
        shutil.copy(file, args.model)
    print(card)
