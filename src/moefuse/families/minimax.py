"""MiniMax-Text-01: lightning (linear) attention in most layers, full attention in some.

A linear layer keeps one matrix of every head for all that came before, which no position resets.
"""

from moefuse.families.base import (
    Config,
    Family,
    factor_under,
    grouped_query_attention,
    is_linear,
    stated_window,
)


def lightning_state(config: Config, layer: int) -> int:
    """Return how many numbers a linear layer keeps of a sequence: a square matrix of every head."""
    attention = grouped_query_attention(config)
    linear = is_linear(config, layer, default=layer % 2 == 1)
    return attention.heads * attention.key_width**2 if linear else 0


FAMILY = Family(
    model_type="minimax",
    causal_lm="MiniMaxForCausalLM",
    base_model="MiniMaxModel",
    config_class="MiniMaxConfig",
    experts_count_key="num_local_experts",
    experts_count_aliases=("num_experts",),
    intermediate_key="intermediate_size",
    window=stated_window,
    state=lightning_state,
    experts_scale=factor_under("mlp_beta_factor"),
    one_piece_a_row=True,
    unserved="its linear attention is not run by vLLM's Transformers backend",
    disk_moe_name="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    rename=((r"\.block_sparse_moe\.", ".mlp."),),
    publish=((r"\.mlp\.", ".block_sparse_moe."),),
)
