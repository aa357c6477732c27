"""Granite 3 with experts and PowerMoE; checkpoints stack a layer's experts in one tensor.

Embeddings and what layers add are multiplied inside Transformers' model; the logits are divided by
``logits_scaling`` behind the head.
"""

from moefuse.families.base import Config, Family, factor_under


def divided_logits(config: Config) -> float:
    """Return what the head's output is multiplied by: one over ``logits_scaling``."""
    return 1.0 / factor_under("logits_scaling")(config)


FAMILY = Family(
    model_type="granitemoe",
    causal_lm="GraniteMoeForCausalLM",
    base_model="GraniteMoeModel",
    config_class="GraniteMoeConfig",
    experts_count_key="num_local_experts",
    intermediate_key="intermediate_size",
    logit_scale=divided_logits,
    experts_scale=factor_under("residual_multiplier"),
    moe_name="block_sparse_moe",
    disk_moe_name="block_sparse_moe",
    router_name="router",
    router_returns=("index", "weights", "logits"),
    stacked=("input_linear.weight", "output_linear.weight"),
    rename=((r"\.router\.layer\.weight$", ".router.weight"),),
    publish=((r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),),
)
