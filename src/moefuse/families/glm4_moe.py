"""GLM-4.5, GLM-4.5-Air and GLM-4.6: DeepSeek-V3's router, grouped-query attention.

As DeepSeek-V3's, published checkpoints end with the multi-token prediction module, one layer more
than ``num_hidden_layers``, which Transformers does not load and moefuse does not fuse.
"""

from moefuse.families._gguf import Gguf, glm_facts
from moefuse.families.base import Family, after_leading_dense, counted_shared_experts

FAMILY = Family(
    model_type="glm4_moe",
    causal_lm="Glm4MoeForCausalLM",
    base_model="Glm4MoeModel",
    config_class="Glm4MoeConfig",
    experts_count_key="n_routed_experts",
    experts_count_aliases=("num_local_experts",),
    has_experts=after_leading_dense(default=1),
    shared_experts=counted_shared_experts,
    gguf=Gguf(architecture="glm4moe", facts=glm_facts, leading_dense=True),
)
