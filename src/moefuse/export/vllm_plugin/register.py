"""Tell Transformers and vLLM about every fused architecture."""

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from moefuse.export.vllm_plugin.settings import FusedSettings
from moefuse.families import all_families
from moefuse.modeling import register_fused
from moefuse.modeling.modeling_moefuse import CLASS_PREFIX, MODEL_TYPE_PREFIX

MODELS = "moefuse.export.vllm_plugin.models"


def register() -> None:
    """Register every family's fused model. May be called again, which changes nothing.

    On CPUs DeepSeek's latent attention is computed with expanded heads: vLLM's CPU kernel for the
    latents takes one size of heads only, and gives up prefix caching and chunked prefill.
    """
    model = (
        "ExpandedAttentionForCausalLM"
        if current_platform.is_cpu()
        else "TransformersMoEForCausalLM"
    )
    for family in all_families().values():
        register_fused({"model_type": MODEL_TYPE_PREFIX + family.model_type})
        architecture = CLASS_PREFIX + family.causal_lm
        ModelRegistry.register_model(architecture, f"{MODELS}:{model}")
        MODELS_CONFIG_MAP[architecture] = FusedSettings
