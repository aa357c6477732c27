"""Fused models in vLLM: its Transformers backend around moefuse's own modelling file.

That backend gives any Transformers model vLLM's attention, linear layers, norms and embeddings. It
does not route attention through vLLM's rotary kernel, whose CPU form is silently wrong for
DeepSeek-V2, and as it is used here it never puts its own Mixture-of-Experts layer in the place of
the fused one.
"""

from vllm.model_executor.models.transformers import TransformersForCausalLM


class ExpandedAttentionForCausalLM(TransformersForCausalLM):
    """A fused model whose latent attention, if it has any, is computed with expanded heads."""


class TransformersMoEForCausalLM(TransformersForCausalLM):
    """A fused model that keeps latents in the cache where its attention is DeepSeek's.

    vLLM knows that a model of this backend has latent attention by the name of the class, which is
    therefore that of vLLM's own for Mixture-of-Experts models.
    """
