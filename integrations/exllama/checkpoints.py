"""Tiny teachers of every family that ExLlama knows, and what moefuse makes of them.

Weights are random, so that nothing is known of what comes out; sizes are what ExLlama's kernels
take (widths of a multiple of 128, heads of 64 and 128). The vocabulary is the bundled teacher's.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moefuse import demo
from moefuse.collapse import collapse
from moefuse.export.expand import expand
from moefuse.pipeline import fuse

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from tiny import tiny_model

FORMS = ("written out", "collapsed")
WIDTH, EXPERT, DENSE = 256, 128, 384
SOFTER = 0.4
"""What tiny models' weights are multiplied by: they are meant for an eighth of this width."""
USUAL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    # Unlike any engine's default, so that one which does not read it is found out.
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
EXPERTS = {"moe_intermediate_size": EXPERT, "intermediate_size": DENSE}
DEEPSEEK = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": EXPERT, "sliding_window": None},
    "qwen3_moe": {**EXPERTS, "norm_topk_prob": True},
    "deepseek_v3": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
    "deepseek_v3, groups": DEEPSEEK,
    "ernie4_5_moe": EXPERTS,
    "glm4_moe": {
        **EXPERTS,
        "rope_parameters": {**USUAL["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "gpt_oss": {
        "intermediate_size": EXPERT,
        "sliding_window": 32,
        "swiglu_limit": 7.0,
        # The published models' own, as ExLlama computes the factor from both lengths.
        "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3_5_moe_text": {
        **EXPERTS,
        "head_dim": 128,
        "shared_expert_intermediate_size": EXPERT,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        # The class of its tokenizers adds a token of its own.
        "vocab_size": AutoTokenizer.from_pretrained(demo.teacher_path()).vocab_size + 1,
    },
}
"""Families, with what is particular after a comma, and sizes."""
KNOWN = {"ExLlamaV3": tuple(FAMILIES), "ExLlamaV2": ("mixtral", "qwen3_moe")}
"""Those whose architecture is in an engine's list (1.6.5 and 0.3.2)."""


def save_teacher(path: Path, family: str) -> None:
    """Save a random teacher in float16 with the bundled teacher's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(demo.teacher_path())
    sizes = {**USUAL, "vocab_size": len(tokenizer), **FAMILIES[family]}
    model_type, _, _ = family.partition(",")
    model = tiny_model(
        model_type, **{name: size for name, size in sizes.items() if size is not None}
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(SOFTER)
    model.half().save_pretrained(path)
    tokenizer.save_pretrained(path)


def make(home: Path, family: str) -> dict[str, Path]:
    """Return ``{form: plain checkpoint}`` of a family, made in ``home`` unless they are there."""
    teacher, student = home / "teacher", home / "student"
    plain = {form: home / form.replace(" ", "-") for form in FORMS}
    if all((path / "config.json").is_file() for path in plain.values()):
        return plain
    home.mkdir(parents=True, exist_ok=True)
    save_teacher(teacher, family)
    text = {"data": str(demo.heldout_path()), "tokens": 4096, "sequence_length": 128}
    how = {**text, "batch_size": 8, "steps": 20, "device": "cpu", "dtype": "float32"}
    fuse(teacher, student, {**how, "groups": 4, "rank": 8})
    expand(student, plain["written out"])
    collapse(student, plain["collapsed"], how)
    return plain
