"""Fused models in vLLM: its Transformers backend around moefuse's own modelling file.

That backend gives any Transformers model vLLM's attention, linear layers, norms and embeddings. It
does not route attention through vLLM's rotary kernel, whose CPU form is silently wrong for
DeepSeek-V2, and as it is used here it never puts its own Mixture-of-Experts layer in the place of
the fused one.
"""

from vllm.model_executor.models.transformers import TransformersForCausalLM

from moefuse.export.vllm_plugin.served_experts import put_served_experts


class ExpandedAttentionForCausalLM(TransformersForCausalLM):
    """A fused model whose latent attention, if it has any, is computed with expanded heads."""

    def recursive_replace(self) -> None:
        """Replace fused layers first, then, as the backend does, what it has better ones of.

        Where there is one CPU they stay as they are: there they run a base once for all the
        members of a group that a token chose. Quantised bases stay linear layers, which the
        backend replaces by vLLM's quantised ones.
        """
        on_one_cpu = self.tp_group.world_size == 1 and self.device_config.device_type == "cpu"
        if not on_one_cpu and self.quant_config is None:
            put_served_experts(self.model, self.model_config.dtype, self.device_config.device)
        super().recursive_replace()


class TransformersMoEForCausalLM(ExpandedAttentionForCausalLM):
    """A fused model that keeps latents in the cache where its attention is DeepSeek's.

    vLLM knows that a model of this backend has latent attention by the name of the class, which is
    therefore that of vLLM's own for Mixture-of-Experts models.
    """
