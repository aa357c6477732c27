"""Students that are served, prompts, and what Transformers answers to them."""

import os

# Before transformers and vLLM are imported anywhere: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
# Two tests run at a time, and the models are tiny: one thread each, on whichever core is free.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = "1"

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from running import write_text
from tiny import save_tiny
from transformers import AutoTokenizer, PreTrainedModel

import moefuse
from moefuse import demo
from moefuse.export.quantized.schemes import SCHEMES
from moefuse.quantize import quantize

# Tiny matrices are faster on one thread.
torch.set_num_threads(1)

PROMPTS, NEW = 20, 64
WIDER_HEADS = {"hidden_size": 64, "head_dim": 32}
WIDER: dict[str, dict[str, int]] = {
    # Rows of down projections, of as many numbers as one scale is for at 4 bits.
    "mixtral": {**WIDER_HEADS, "intermediate_size": 32},
    "olmoe": {"hidden_size": 128},
    "deepseek_v3": {"hidden_size": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32},
}
"""vLLM's attention on CPUs takes heads of 32 and more, which are wider than tiny models have."""
TINY = {"groups": 3, "rank": 2, "tokens": 512, "steps": 5, "sequence_length": 64}
BUNDLED: dict[str, dict[str, Any]] = {
    "bundled-16": {"groups": 16, "rank": 4},
    "bundled-8": {"groups": 8, "rank": 4},
    "bundled-4": {"groups": 4, "rank": 4},
    "bundled-2": {"groups": 2, "rank": 4},
    "bundled-2-bit": {"expert_bits": 2},
    "bundled-neurons": {"expert_bits": 2, "bits": "16"},
}

Student = Callable[[str], Path]
Expected = Callable[[str], list[list[int]]]


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    """``student(name)``: a fused checkpoint, of the bundled teacher or of a tiny random one.

    A name that ends with a quantiser's scheme is that of the student before it, quantised; after
    an underscore come the bits of its deltas, if they are other than ``quantize`` chooses.
    """
    root = tmp_path_factory.mktemp("students")
    text = write_text(root / "text.txt")

    @cache
    def make(name: str) -> Path:
        out = root / name
        plain, _, how = name.rpartition("-")
        scheme, _, bits = how.partition("_")
        if scheme in SCHEMES:
            calibration = {"data": str(demo.calibration_path()), "tokens": 2048, "steps": 2}
            stored = {"scheme": scheme, "delta_bits": bits or None}
            quantize(make(plain), out, {**stored, **calibration})
        elif name in BUNDLED:
            few = {"tokens": 2048, "steps": 2, "held_out_tokens": 0}
            data = {"data": str(demo.calibration_path())}
            moefuse.fuse(
                demo.teacher_path(), out, work=root / "work", **few, **data, **BUNDLED[name]
            )
        else:
            save_tiny(root / f"{name}-teacher", name, **WIDER.get(name, WIDER_HEADS))
            moefuse.fuse(root / f"{name}-teacher", out, data=str(text), held_out_tokens=0, **TINY)
        return out

    return make


@pytest.fixture(scope="session")
def expected(student: Student) -> Expected:
    """``expected(name)``: Transformers' tokens for the prompts of that student."""

    @cache
    def make(name: str) -> list[list[int]]:
        return greedy(student(name), prompts_for(student(name)))

    return make


def prompts_for(path: Path) -> list[list[int]]:
    """Return ``PROMPTS`` prompts of mixed lengths, as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    documents = [json.loads(line)["text"] for line in demo.heldout_path().open()]
    prompts = []
    for number, text in enumerate(documents[:PROMPTS]):
        ids = tokenizer(text)["input_ids"]
        prompts.append((ids * 20)[: 8 + 9 * number])
    return prompts


def greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return Transformers' greedy tokens in fp32, one prompt at a time."""
    return greedy_of(moefuse.load(path, dtype="float32"), prompts)


@torch.no_grad()
def greedy_of(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Return the greedy tokens of a model, one prompt at a time."""
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found
