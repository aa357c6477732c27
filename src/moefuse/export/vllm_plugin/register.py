"""Tell Transformers and vLLM, or Aphrodite, about every fused architecture."""

from importlib import import_module

from moefuse.export.vllm_plugin.settings import EagerSettings, FusedSettings, GpuSettings
from moefuse.families import all_families
from moefuse.modeling import register_fused
from moefuse.modeling.modeling_moefuse import CLASS_PREFIX, MODEL_TYPE_PREFIX

MODELS = {
    "vllm": "moefuse.export.vllm_plugin.models",
    "aphrodite": "moefuse.export.vllm_plugin.aphrodite_models",
}
"""By engine: the module of its model classes."""


def register() -> None:
    """Register every family's fused model with vLLM. May be called again, and changes nothing."""
    _register("vllm", GpuSettings)


def register_with_aphrodite() -> None:
    """Do the same with Aphrodite, whose interface is vLLM's under another name."""
    _register("aphrodite", EagerSettings)


def _register(engine: str, gpu_settings: type[FusedSettings]) -> None:
    """Register with ``engine``; ``gpu_settings`` are what is set and checked off CPUs.

    On CPUs DeepSeek's latent attention is computed with expanded heads: vLLM's CPU kernel for the
    latents takes one size of heads only, and gives up prefix caching and chunked prefill.
    """
    registry = import_module(f"{engine}.model_executor.models.registry").ModelRegistry
    settings = import_module(f"{engine}.model_executor.models.config").MODELS_CONFIG_MAP
    on_cpu = import_module(f"{engine}.platforms").current_platform.is_cpu()
    model = "ExpandedAttentionForCausalLM" if on_cpu else "TransformersMoEForCausalLM"
    for family in all_families().values():
        register_fused({"model_type": MODEL_TYPE_PREFIX + family.model_type})
        architecture = CLASS_PREFIX + family.causal_lm
        registry.register_model(architecture, f"{MODELS[engine]}:{model}")
        settings[architecture] = FusedSettings if on_cpu else gpu_settings
