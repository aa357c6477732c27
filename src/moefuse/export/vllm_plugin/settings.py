"""What is checked before vLLM loads a fused checkpoint."""

from typing import Any

from moefuse.errors import UserError
from moefuse.export.assemble import FORMAT_VERSION
from moefuse.families import all_families
from moefuse.modeling.modeling_moefuse import MULTIPLEXED


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
        family = all_families()[block["teacher_model_type"]]
        if family.unserved is not None:
            raise UserError(
                f"{model_config.model} cannot be served by vLLM: it is of family "
                f"{family.model_type}, and {family.unserved}."
            )
        if block.get("format") != FORMAT_VERSION:
            raise UserError(
                f"{model_config.model} has format {block.get('format')!r}, and this moefuse serves "
                f"format {FORMAT_VERSION}; install the moefuse that wrote it."
            )


class GpuSettings(FusedSettings):
    """The same where CUDA graphs are captured."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Do without CUDA graphs where a layer asks how many rows its experts have.

        All forms do but plain bases and low-rank deltas, which ``ServedExperts`` runs; coded deltas
        are plain ones there, and beside quantised bases stay as they are.
        """
        FusedSettings.verify_and_update_model_config(model_config)
        layers = model_config.hf_config.moefuse["layers"].values()
        quantised = getattr(model_config.hf_config, "quantization_config", None) is not None
        if quantised or any(
            layer.get("neurons") is not None or layer["delta"] in MULTIPLEXED for layer in layers
        ):
            model_config.enforce_eager = True


class EagerSettings(FusedSettings):
    """The same for an engine that ``ServedExperts`` is not written for."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Do without CUDA graphs."""
        FusedSettings.verify_and_update_model_config(model_config)
        model_config.enforce_eager = True
