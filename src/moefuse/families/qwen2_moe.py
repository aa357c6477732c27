"""Qwen1.5-MoE and Qwen2 with experts; one gated shared expert of its own width."""

from moefuse.families.base import Family, at_sparse_steps

FAMILY = Family(
    model_type="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    base_model="Qwen2MoeModel",
    config_class="Qwen2MoeConfig",
    experts_count_key="num_experts",
    has_experts=at_sparse_steps,
    shared_experts=lambda config: 1,  # noqa: ARG005
)
