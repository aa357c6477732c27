"""Qwen1.5-MoE and Qwen2 with experts; one gated shared expert of its own width.

Where the sliding window is on, it holds for the layers that ``layer_types`` names, or else for
every second one, beginning with the first, below ``max_window_layers``.
"""

from moefuse.errors import UserError
from moefuse.families._gguf import Gguf, qwen2_facts
from moefuse.families.base import Config, Family, at_sparse_steps, optional, switched_window

DEFAULT_WINDOW_LAYERS = 28
"""What Transformers takes for ``max_window_layers`` where it is not given."""


def alternating_window(config: Config, layer: int) -> int | None:
    """Return the sliding window of a layer that has one, else None."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) <= layer:
            raise UserError(
                f"config.json has {kinds!r} under 'layer_types'; a list with an entry for every "
                "layer is needed."
            )
        slides = kinds[layer] == "sliding_attention"
    else:
        last = optional(config, "max_window_layers", DEFAULT_WINDOW_LAYERS)
        slides = layer % 2 == 0 and layer < last
    return switched_window(config, layer) if slides else None


FAMILY = Family(
    model_type="qwen2_moe",
    causal_lm="Qwen2MoeForCausalLM",
    base_model="Qwen2MoeModel",
    config_class="Qwen2MoeConfig",
    experts_count_key="num_experts",
    has_experts=at_sparse_steps,
    shared_experts=lambda config: 1,  # noqa: ARG005
    window=alternating_window,
    gguf=Gguf(architecture="qwen2moe", facts=qwen2_facts, normalises=False),
)
