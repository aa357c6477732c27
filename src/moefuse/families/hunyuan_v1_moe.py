"""Hunyuan-A13B; every layer has experts and one shared expert, ``shared_mlp``, of their width.

Published configurations give ``moe_topk`` layer by layer; all layers must agree.
"""

from moefuse.families._gguf import Gguf, hunyuan_facts
from moefuse.families.base import Family

FAMILY = Family(
    model_type="hunyuan_v1_moe",
    causal_lm="HunYuanMoEV1ForCausalLM",
    base_model="HunYuanMoEV1Model",
    config_class="HunYuanMoEV1Config",
    experts_count_key="num_experts",
    experts_count_aliases=("num_local_experts",),
    top_k_key="moe_topk",
    intermediate_key="intermediate_size",
    shared_experts=lambda config: 1,  # noqa: ARG005
    router_weight="wg.weight",
    shared_prefix="shared_mlp",
    gguf=Gguf(architecture="hunyuan-moe", facts=hunyuan_facts, normalises=True),
)
