"""The text model of Qwen3.5 with experts: gated delta net in most layers, full attention in some.

A linear layer keeps a state and the end of its convolution's input, which no position resets.
"""

from moefuse.families.base import Config, Family, is_linear, optional

FULL_EVERY, KERNEL, KEY_WIDTH, VALUE_WIDTH, KEY_HEADS, VALUE_HEADS = 4, 4, 128, 128, 16, 32
"""What Transformers takes where the configuration does not say."""


def delta_net_state(config: Config, layer: int) -> int:
    """Return how many numbers a linear layer keeps of a sequence.

    A key width x value width matrix of every value head, and as many of the last inputs of the
    convolution over queries, keys and values as its kernel is wide.
    """
    every = optional(config, "full_attention_interval", FULL_EVERY) or FULL_EVERY
    if not is_linear(config, layer, default=(layer + 1) % every != 0):
        return 0
    key_width = optional(config, "linear_key_head_dim", KEY_WIDTH)
    value_width = optional(config, "linear_value_head_dim", VALUE_WIDTH)
    values = optional(config, "linear_num_value_heads", VALUE_HEADS)
    channels = 2 * key_width * optional(config, "linear_num_key_heads", KEY_HEADS)
    channels += value_width * values
    kernel = optional(config, "linear_conv_kernel_dim", KERNEL)
    return values * key_width * value_width + channels * kernel


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    causal_lm="Qwen3_5MoeForCausalLM",
    base_model="Qwen3_5MoeTextModel",
    config_class="Qwen3_5MoeTextConfig",
    experts_count_key="num_experts",
    shared_experts=lambda config: 1,  # noqa: ARG005
    state=delta_net_state,
    one_piece_a_row=True,
    unserved="its linear attention is not run by vLLM's Transformers backend",
    attention_names=("self_attn", "linear_attn"),
    text_prefix="model.language_model.",
    unused=("mtp.", "model.visual."),
)
