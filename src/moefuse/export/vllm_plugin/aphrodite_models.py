"""Fused models in Aphrodite, which shares vLLM's Transformers backend; see ``models``."""

from aphrodite.model_executor.models.transformers import TransformersForCausalLM


class ExpandedAttentionForCausalLM(TransformersForCausalLM):
    """See ``models.ExpandedAttentionForCausalLM``."""


class TransformersMoEForCausalLM(TransformersForCausalLM):
    """See ``models.TransformersMoEForCausalLM``, whose name matters here too."""
