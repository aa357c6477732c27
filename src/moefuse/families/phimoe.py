"""Phi-3.5-MoE: two experts a token, weighed each by itself (sparsemixer); LayerNorms with biases.

While a model trains its router draws experts at random; healing keeps it as it is when used.
"""

from moefuse.families.base import Family, stated_window

FAMILY = Family(
    model_type="phimoe",
    causal_lm="PhimoeForCausalLM",
    base_model="PhimoeModel",
    config_class="PhimoeConfig",
    experts_count_key="num_local_experts",
    experts_count_aliases=("num_experts",),
    intermediate_key="intermediate_size",
    window=stated_window,
    router_name="router",
    unserved="vLLM 0.32's Transformers backend stops in its first forward pass",
    disk_moe_name="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    rename=((r"\.block_sparse_moe\.", ".mlp."), (r"\.mlp\.gate\.weight$", ".mlp.router.weight")),
    publish=((r"\.mlp\.router\.", ".mlp.gate."), (r"\.mlp\.", ".block_sparse_moe.")),
)
