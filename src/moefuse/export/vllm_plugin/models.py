"""Fused models in vLLM: its Transformers backend around moefuse's own modelling file.

That backend gives any Transformers model vLLM's attention, linear layers, norms and embeddings. It
does not route attention through vLLM's rotary kernel, whose CPU form is silently wrong for
DeepSeek-V2, and as it is used here it never puts its own Mixture-of-Experts layer in the place of
the fused one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.transformers import TransformersForCausalLM

from moefuse.export.vllm_plugin.served_experts import put_served_experts
from moefuse.export.vllm_plugin.unpacking import settings_to_unpack_by, unpacked


class ExpandedAttentionForCausalLM(TransformersForCausalLM):
    """A fused model whose latent attention, if it has any, is computed with expanded heads."""

    packed: Mapping[str, Any] | None = None
    """The settings of packed weights that are read as plain ones; None where there are none."""

    def recursive_replace(self) -> None:
        """Replace fused layers first, then, as the backend does, what it has better ones of.

        Where there is one CPU they stay as they are: there they run a base once for all the
        members of a group that a token chose. Quantised bases stay linear layers, which the
        backend replaces by vLLM's quantised ones, unless they have to be unpacked.
        """
        on_cpu = self.device_config.device_type == "cpu"
        if on_cpu:
            self._unpack_what_has_no_kernel()
        on_one_cpu = on_cpu and self.tp_group.world_size == 1
        if not on_one_cpu and self.quant_config is None:
            put_served_experts(
                self.model,
                self.model_config.dtype,
                self.device_config.device,
                by_experts=self.parallel_config.enable_expert_parallel,
            )
        super().recursive_replace()

    def _unpack_what_has_no_kernel(self) -> None:
        settings = getattr(self.config, "quantization_config", None)
        stay = set((settings or {}).get("ignore") or ())
        linears = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and f"model.{name}" not in stay
        ]
        self.packed = settings_to_unpack_by(settings, self.model_config.dtype, linears)
        if self.packed is not None:
            # The backend asks the one for plain linear layers, the other for those that it joins.
            self.quant_config = self.vllm_config.quant_config = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the checkpoint's tensors; see the backend's."""
        if self.packed is not None:
            weights = unpacked(weights, self.packed)
        return super().load_weights(weights)


class TransformersMoEForCausalLM(ExpandedAttentionForCausalLM):
    """A fused model that keeps latents in the cache where its attention is DeepSeek's.

    vLLM knows that a model of this backend has latent attention by the name of the class, which is
    therefore that of vLLM's own for Mixture-of-Experts models.
    """
