"""Tiny random models of every family, saved the way published checkpoints are.

The weights are large enough that experts matter: with Transformers' usual initialisation the
residual stream would drown them and a test could not tell one expert from another.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

STD = 0.2
VOCABULARY = 64
BOS, EOS = "<s>", "</s>"
TEXT = (
    "def add(first, second):\n    return first + second\n\n"
    "for line in lines:\n    print(add(line, 1))\n"
    "while not done: total = total * 2\n"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_DEEPSEEK = {
    **_LATENT_ATTENTION,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
}
_GLM = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 48}
_BY_FAMILY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {
        **_DEEPSEEK,
        "n_shared_experts": 1,
        "q_lora_rank": 16,
        "n_group": 2,
        "topk_group": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        **_GLM,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 2.5,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        # Low enough that the clamps of gate and up are met.
        "swiglu_limit": 2.0,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "embedding_multiplier": 1.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "tie_word_embeddings": False,
    },
    "minimax": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "block_size": 8,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "mlp_alpha_factor": 1.5,
        "mlp_beta_factor": 0.8,
        "linear_attn_beta_factor": 0.5,
    },
    "phimoe": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.01,
    },
    "qwen3_5_moe_text": {
        # The class of its tokenizers adds a token of its own.
        "vocab_size": VOCABULARY + 1,
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "hunyuan_v1_moe": {
        "num_experts": 8,
        "moe_topk": 2,
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "qwen3_moe": {**_QWEN, "num_key_value_heads": 2, "head_dim": 8},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 8, "intermediate_size": 16},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 16, "num_key_value_heads": 2},
}


def tiny_config(model_type: str = "deepseek_v2", **changes: Any) -> PreTrainedConfig:
    """Return a configuration with D 32, F 16, E 8, K 2 and three layers; ``changes`` win."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **_BY_FAMILY[model_type], **changes})


def tiny_model(model_type: str = "deepseek_v2", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random fp32 model in evaluation mode; ``changes`` go into its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=STD)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=STD / 10)
        for name, buffer in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=STD / 10)
    return model.eval()


def save_tiny(
    path: Path,
    model_type: str = "deepseek_v2",
    *,
    seed: int = 0,
    max_shard_size: str = "20KB",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Save a tiny model with its tokenizer in ``path`` and return the model (in ``dtype``)."""
    model = tiny_model(model_type, seed, **changes).to(dtype)
    # Transformers shows a progress bar for every save, whatever the verbosity of the hub's bars.
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if shown:
        transformers_logging.enable_progress_bar()
    tiny_tokenizer().save_pretrained(path)
    return model


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with ``VOCABULARY`` tokens.

    Its alphabet is the bytes of ``TEXT``; other bytes are dropped.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    return fast
