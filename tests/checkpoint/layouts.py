"""Checkpoints of famous models without their weights.

Headers are written in full and the data is a hole in a sparse file, so that 671 B parameters cost a
few megabytes of disk and every size on record is the real one.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moefuse.families import family_of

BITS = {"BF16": 16, "F8_E4M3": 8, "F32": 32}

CODER_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "vocab_size": 102400,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "vocab_size": 129280,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

Layout = dict[str, tuple[str, tuple[int, ...]]]


def published(config: dict[str, Any]) -> Layout:
    """Return every tensor (name, dtype, shape) of a bf16 checkpoint, from a meta-device model."""
    family = family_of(config)
    settings = {key: value for key, value in config.items() if key not in _NOT_FOR_THE_MODEL}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings)
        )
    layout: Layout = {}
    for name, tensor in model.state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            continue
        layout[name] = ("BF16", tuple(tensor.shape))
    shape = family.shape(config)
    for layer in shape.layers:
        for expert in range(shape.experts):
            names = family.expert_names(layer, expert)
            layout[names.gate] = layout[names.up] = ("BF16", (shape.intermediate, shape.hidden))
            layout[names.down] = ("BF16", (shape.hidden, shape.intermediate))
    return layout


_NOT_FOR_THE_MODEL = ("model_type", "auto_map", "quantization_config")


def with_prediction_layer(layout: Layout, layers: int, hidden: int) -> Layout:
    """Add DeepSeek-V3's multi-token prediction module: one more layer after the last."""
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    copied = {
        name.replace(last, extra): entry for name, entry in layout.items() if name.startswith(last)
    }
    own: Layout = {
        f"{extra}embed_tokens.weight": layout["model.embed_tokens.weight"],
        f"{extra}shared_head.head.weight": layout["lm_head.weight"],
        f"{extra}shared_head.norm.weight": ("BF16", (hidden,)),
        f"{extra}enorm.weight": ("BF16", (hidden,)),
        f"{extra}hnorm.weight": ("BF16", (hidden,)),
        f"{extra}eh_proj.weight": ("BF16", (hidden, 2 * hidden)),
    }
    return {**layout, **copied, **own}


def in_fp8(layout: Layout) -> Layout:
    """Store every projection in 8 bits with a 32-bit scale for each block of 128 x 128."""
    quantized: Layout = {}
    for name, (dtype, shape) in layout.items():
        if name.endswith("_proj.weight") and "eh_proj" not in name:
            blocks = tuple(math.ceil(size / 128) for size in shape)
            quantized[name] = ("F8_E4M3", shape)
            quantized[name + "_scale_inv"] = ("F32", blocks)
        else:
            quantized[name] = (dtype, shape)
    return quantized


def write_layout(directory: Path, config: dict[str, Any], layout: Layout, shards: int) -> None:
    """Write a checkpoint of ``shards`` sparse files with its index and configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for at, names in enumerate(_dealt(list(layout), shards), start=1):
        shard = f"model-{at:05d}-of-{shards:06d}.safetensors"
        write_header(directory / shard, {name: layout[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _dealt(names: list[str], shards: int) -> Iterator[list[str]]:
    for at in range(shards):
        yield names[at * len(names) // shards : (at + 1) * len(names) // shards]


def write_header(path: Path, layout: Layout) -> None:
    """Write one safetensors file whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
