"""ERNIE 4.5 text models with experts.

The correction bias, which only chooses experts, lies beside the router in published checkpoints and
in it in Transformers. The multi-token prediction module, ``model.mtp_*``, is not loaded there.
"""

from moefuse.errors import UserError
from moefuse.families.base import Config, Family, optional


def in_stated_interval(config: Config, layer: int) -> bool:
    """Tell whether ``layer`` has experts: every so many layers between the first and the last."""
    last = config.get("moe_layer_end_index")
    if last is None or last == -1:
        last = optional(config, "num_hidden_layers", 0) - 1
    elif isinstance(last, bool) or not isinstance(last, int):
        raise UserError(
            f"config.json has {last!r} under 'moe_layer_end_index'; a whole number is needed."
        )
    first = optional(config, "moe_layer_start_index", 1)
    interval = optional(config, "moe_layer_interval", 1) or 1
    return first <= layer <= last and (layer + 1) % interval == 0


FAMILY = Family(
    model_type="ernie4_5_moe",
    causal_lm="Ernie4_5_MoeForCausalLM",
    base_model="Ernie4_5_MoeModel",
    config_class="Ernie4_5_MoeConfig",
    experts_count_key="moe_num_experts",
    experts_count_aliases=("num_experts",),
    top_k_key="moe_k",
    has_experts=in_stated_interval,
    shared_experts=lambda config: optional(config, "moe_num_shared_experts", 2),
    unused=("model.mtp_",),
    rename=((r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),),
    publish=((r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),),
)
