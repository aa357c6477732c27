"""DeepSeek-V3, R1 and their descendants.

Published checkpoints end with one more layer than ``num_hidden_layers``: the multi-token prediction
module, which Transformers does not load and moefuse does not fuse.
"""

from moefuse.families._gguf import Gguf, deepseek_objection, deepseek_v3_facts
from moefuse.families.base import (
    Family,
    after_leading_dense,
    counted_shared_experts,
    latent_attention,
)

FAMILY = Family(
    model_type="deepseek_v3",
    causal_lm="DeepseekV3ForCausalLM",
    base_model="DeepseekV3Model",
    config_class="DeepseekV3Config",
    experts_count_key="n_routed_experts",
    experts_count_aliases=("num_local_experts",),
    has_experts=after_leading_dense(default=3),
    shared_experts=counted_shared_experts,
    attention=latent_attention,
    gguf=Gguf(
        architecture="deepseek2",
        facts=deepseek_v3_facts,
        objection=deepseek_objection,
        leading_dense=True,
        splits_latent=True,
    ),
)
