"""What is checked before vLLM loads a fused checkpoint."""

from typing import Any

from moefuse.errors import UserError
from moefuse.export.assemble import FORMAT_VERSION


class FusedSettings:
    """What vLLM's ``VerifyAndUpdateConfig`` is for one architecture.

    vLLM calls these when it is told to serve a fused checkpoint, before any weight is read.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Change nothing of how vLLM runs."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what would be served wrongly, in one sentence."""
        block = getattr(model_config.hf_config, "moefuse", None)
        if not block or not block.get("layers"):
            raise UserError(
                f"The config.json of {model_config.model} names a fused architecture but has no "
                "moefuse block with layers; take it from the checkpoint that moefuse wrote."
            )
        if block.get("format") != FORMAT_VERSION:
            raise UserError(
                f"{model_config.model} has format {block.get('format')!r}, and this moefuse serves "
                f"format {FORMAT_VERSION}; install the moefuse that wrote it."
            )
