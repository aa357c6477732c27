"""What llama.cpp has to be told of a family, and what its engine cannot do, as data.

Facts are read from a configuration in which Transformers has filled in all defaults. What is here
was read in llama.cpp as llama-cpp-python 0.3.36 carries it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Facts = dict[str, Any]
SOFTMAX, SIGMOID = 1, 2
"""The engine's numbers for how a router's logits become scores."""
LITE_LAYERS = (26, 27)


def no_facts(config: Config) -> Facts:  # noqa: ARG001
    """Add nothing."""
    return {}


def no_objection(config: Config) -> str | None:  # noqa: ARG001
    """Find nothing that the engine cannot do."""
    return None


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """The engine's form of one family."""

    architecture: str
    facts: Callable[[Config], Facts] = no_facts
    """Further metadata, by key without the architecture's name."""
    objection: Callable[[Config], str | None] = no_objection
    """Says what the engine cannot do, as the end of "llama.cpp cannot run it: ..."."""
    normalises: bool | None = None
    """Whether the engine makes chosen weights sum to 1 whatever the file says; None: it is told."""
    leading_dense: bool = False
    """Whether the first layers may be dense."""
    turns_neighbours: bool = False
    """Whether rotary embeddings turn neighbouring numbers where Transformers turns halves, so that
    rows of query and key must be sorted anew."""
    splits_latent: bool = False
    """Whether the latent's projection is stored as two, one for keys and one for values."""


def expert_width(config: Config) -> Facts:
    """Tell the width of routed experts."""
    return {"expert_feed_forward_length": config["moe_intermediate_size"]}


def deepseek_facts(config: Config) -> Facts:
    """Tell of latent attention, shared experts and routing (arXiv:2405.04434, 2412.19437).

    The engine attends to the latents themselves, as one head of keys and values. Told of no rank of
    queries it refuses a model unless that has as many layers as one that it knows to have none; a
    rank of 0 it takes for what it says.
    """
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    facts = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": config.get("q_lora_rank") or 0,
        "attention.key_length": latent + rope,
        "attention.value_length": latent,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rope,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        **expert_width(config),
    }
    scaling = config.get("rope_parameters") or {}
    if scaling.get("mscale_all_dim"):
        facts["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling["mscale_all_dim"]
    return facts


def deepseek_v2_facts(config: Config) -> Facts:
    """Tell of softmax scores, which Transformers does not normalise."""
    return {**deepseek_facts(config), "expert_gating_func": SOFTMAX, "expert_weights_norm": False}


def sigmoid_facts(config: Config) -> Facts:
    """Tell of DeepSeek-V3's routing: sigmoid scores, groups of experts."""
    facts = {"expert_gating_func": SIGMOID, "expert_weights_norm": config["norm_topk_prob"]}
    if (config.get("n_group") or 1) > 1:
        facts |= {
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
        }
    return facts


def deepseek_v3_facts(config: Config) -> Facts:
    """Tell of latent attention and sigmoid scores."""
    return {**deepseek_facts(config), **sigmoid_facts(config)}


def told_lite(config: Config) -> bool:
    """Say whether the engine takes a DeepSeek model for one without low-rank queries.

    It goes by the number of layers, and for one more model by the vocabulary.
    """
    layers = config["num_hidden_layers"]
    return layers in LITE_LAYERS or (layers == 48 and config["vocab_size"] == 128_256)


def deepseek_objection(config: Config) -> str | None:
    """Refuse what the engine takes for another model, and a way of stretching that it has not."""
    if config.get("q_lora_rank") and told_lite(config):
        return (
            f"it takes a DeepSeek model of {config['num_hidden_layers']} layers for one without "
            "low-rank queries (q_lora_rank), which this one has"
        )
    rope = config.get("rope_parameters") or {}
    even = rope.get("mscale") and rope.get("mscale") == rope.get("mscale_all_dim")
    if rope.get("rope_type") == "yarn" and not even:
        return "with YaRN it takes mscale and mscale_all_dim of rope_scaling to be one number"
    return None


def deepseek_v2_objection(config: Config) -> str | None:
    """Refuse groups of experts chosen by their best expert, and what all of DeepSeek's are."""
    limited = config.get("topk_method") == "group_limited_greedy"
    if limited and (config.get("n_group") or 1) > 1:
        return (
            "it limits groups of experts by the sum of their two best scores, as DeepSeek-V3 does, "
            "and not by the best one, as topk_method 'group_limited_greedy' wants"
        )
    return deepseek_objection(config)


def glm_facts(config: Config) -> Facts:
    """Tell of partly rotated heads, shared experts and DeepSeek-V3's routing."""
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 0.5)
    return {
        "rope.dimension_count": int(config["head_dim"] * share),
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        **expert_width(config),
        **sigmoid_facts(config),
    }


def qwen2_facts(config: Config) -> Facts:
    """Tell the widths of routed and shared experts."""
    shared = {"expert_shared_feed_forward_length": config["shared_expert_intermediate_size"]}
    return {**expert_width(config), **shared}


def hunyuan_facts(config: Config) -> Facts:
    """Tell that routed and shared experts are as wide as the configuration's one width."""
    width = config["intermediate_size"]
    return {"expert_feed_forward_length": width, "expert_shared_feed_forward_length": width}


def clipping_objection(config: Config) -> str | None:
    """Refuse queries, keys and values that are clipped."""
    if config.get("clip_qkv") is None:
        return None
    return "it does not clip queries, keys and values, as clip_qkv asks for"
