"""OLMoE; ``intermediate_size`` is the width of one expert, and every layer has experts."""

from moefuse.families._gguf import Gguf, clipping_objection
from moefuse.families.base import Family

FAMILY = Family(
    model_type="olmoe",
    causal_lm="OlmoeForCausalLM",
    base_model="OlmoeModel",
    config_class="OlmoeConfig",
    experts_count_key="num_experts",
    experts_count_aliases=("num_local_experts",),
    intermediate_key="intermediate_size",
    gguf=Gguf(architecture="olmoe", normalises=False, objection=clipping_objection),
)
