"""gpt-oss-20b and -120b: biased experts with a gated activation of their own.

Experts lie stacked, transposed, gate and up taking turns; a neuron is
``(up + 1) * gate * sigmoid(alpha * gate)`` with gate and up clamped. Every second layer slides.
Attention has a sink for every head, for which Transformers multiplies it out, and masks that know
no positions, so pieces of text that shared a row would see each other.
"""

from typing import Any

from moefuse.families.base import Config, ExpertsLayout, Family, listed_window

ALPHA, LIMIT = 1.702, 7.0
"""What Transformers takes where the configuration does not say."""


def clamped_gating(config: Config) -> dict[str, Any]:
    """Return the experts' gating with its two constants."""
    alpha, limit = config.get("swiglu_alpha", ALPHA), config.get("swiglu_limit", LIMIT)
    return {"kind": "clamped", "alpha": alpha, "limit": limit}


FAMILY = Family(
    model_type="gpt_oss",
    causal_lm="GptOssForCausalLM",
    base_model="GptOssModel",
    config_class="GptOssConfig",
    experts_count_key="num_local_experts",
    experts_count_aliases=("num_experts",),
    intermediate_key="intermediate_size",
    window=listed_window,
    layout=ExpertsLayout(transposed=True, interleaved=True, biased=True),
    gating=clamped_gating,
    router_name="router",
    router_bias="bias",
    stacked=("experts.gate_up_proj", "experts.down_proj"),
    writes_scores=True,
    one_piece_a_row=True,
)
