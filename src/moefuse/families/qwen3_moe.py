"""Qwen3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder).

Published configurations say ``num_experts``; Transformers 5 saves ``num_local_experts``.
"""

from moefuse.families._gguf import Gguf, expert_width
from moefuse.families.base import Family, at_sparse_steps, switched_window

FAMILY = Family(
    model_type="qwen3_moe",
    causal_lm="Qwen3MoeForCausalLM",
    base_model="Qwen3MoeModel",
    config_class="Qwen3MoeConfig",
    experts_count_key="num_experts",
    experts_count_aliases=("num_local_experts",),
    has_experts=at_sparse_steps,
    window=switched_window,
    gguf=Gguf(architecture="qwen3moe", facts=expert_width, normalises=True),
)
