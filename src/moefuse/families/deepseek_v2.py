"""DeepSeek-V2, V2-Lite and DeepSeek-Coder-V2."""

from moefuse.families._gguf import Gguf, deepseek_v2_facts, deepseek_v2_objection
from moefuse.families.base import (
    Family,
    after_leading_dense,
    counted_shared_experts,
    latent_attention,
)

FAMILY = Family(
    model_type="deepseek_v2",
    causal_lm="DeepseekV2ForCausalLM",
    base_model="DeepseekV2Model",
    config_class="DeepseekV2Config",
    experts_count_key="n_routed_experts",
    experts_count_aliases=("num_experts",),
    has_experts=after_leading_dense(default=0),
    shared_experts=counted_shared_experts,
    attention=latent_attention,
    gguf=Gguf(
        architecture="deepseek2",
        facts=deepseek_v2_facts,
        objection=deepseek_v2_objection,
        leading_dense=True,
        splits_latent=True,
    ),
)
