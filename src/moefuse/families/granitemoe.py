"""Granite 3 with experts and PowerMoE; checkpoints stack a layer's experts in one tensor.

Embeddings and what layers add are multiplied inside Transformers' model; the logits are divided by
``logits_scaling`` behind the head.
"""

from moefuse.errors import UserError
from moefuse.families.base import Config, Family


def divided_logits(config: Config) -> float:
    """Return what the head's output is multiplied by: one over ``logits_scaling``."""
    scaling = config.get("logits_scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or scaling <= 0:
        raise UserError(
            f"config.json has {scaling!r} under 'logits_scaling'; a positive number is needed."
        )
    return 1.0 / scaling


FAMILY = Family(
    model_type="granitemoe",
    causal_lm="GraniteMoeForCausalLM",
    base_model="GraniteMoeModel",
    config_class="GraniteMoeConfig",
    experts_count_key="num_local_experts",
    intermediate_key="intermediate_size",
    logit_scale=divided_logits,
    moe_name="block_sparse_moe",
    disk_moe_name="block_sparse_moe",
    router_name="router",
    router_returns=("index", "weights", "logits"),
    stacked=("input_linear.weight", "output_linear.weight"),
    rename=((r"\.router\.layer\.weight$", ".router.weight"),),
)
