"""Mixtral; checkpoints say ``block_sparse_moe`` and ``w1``, ``w3``, ``w2`` for gate, up, down."""

from moefuse.families._gguf import Gguf
from moefuse.families.base import Family, stated_window

FAMILY = Family(
    model_type="mixtral",
    causal_lm="MixtralForCausalLM",
    base_model="MixtralModel",
    config_class="MixtralConfig",
    experts_count_key="num_local_experts",
    experts_count_aliases=("num_experts",),
    intermediate_key="intermediate_size",
    window=stated_window,
    disk_moe_name="block_sparse_moe",
    projections=("w1", "w3", "w2"),
    rename=((r"\.block_sparse_moe\.", ".mlp."),),
    publish=((r"\.mlp\.", ".block_sparse_moe."),),
    gguf=Gguf(architecture="llama", normalises=True, turns_neighbours=True),
)
