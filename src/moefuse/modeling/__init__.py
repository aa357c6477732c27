"""The fused module, its classes for Transformers, and how a fused checkpoint is loaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from moefuse.artifacts import read_json
from moefuse.errors import UserError
from moefuse.modeling.modeling_moefuse import MODEL_TYPE_PREFIX, FusedExperts, fused_classes

TRAVELLING_FILE = Path(__file__).with_name("modeling_moefuse.py")

__all__ = [
    "TRAVELLING_FILE",
    "FusedExperts",
    "fused_classes",
    "is_fused",
    "load_fused",
    "register_fused",
]


def is_fused(config: dict[str, Any]) -> bool:
    """Say whether a ``config.json`` belongs to a checkpoint that moefuse wrote."""
    return "moefuse" in config


def register_fused(config: dict[str, Any]) -> None:
    """Let Transformers' Auto classes know the model type of a fused ``config.json``."""
    model_type = config["model_type"]
    fused_config, model, causal = fused_classes(model_type.removeprefix(MODEL_TYPE_PREFIX))
    AutoConfig.register(model_type, fused_config, exist_ok=True)
    AutoModel.register(fused_config, model, exist_ok=True)
    AutoModelForCausalLM.register(fused_config, causal, exist_ok=True)


def _check_block(path: str | Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if not str(model_type).startswith(MODEL_TYPE_PREFIX):
        raise UserError(
            f"The config.json in {path} has a moefuse block, but its model_type is {model_type!r}; "
            f"fused checkpoints have one that starts with {MODEL_TYPE_PREFIX!r}."
        )
    if not config["moefuse"].get("layers"):
        raise UserError(f"The moefuse block names no layers in {path}/config.json.")


def load_fused(
    path: str | Path, *, dtype: str | torch.dtype = "auto", **options: Any
) -> PreTrainedModel:
    """Load a fused checkpoint with moefuse's own classes, running no code of the checkpoint's.

    ``path`` is a directory that ``moefuse fuse`` wrote; ``dtype`` is what the weights are cast to
    (``auto``: as stored); other options go to ``from_pretrained``. Raises ``UserError`` for a
    directory that is no fused checkpoint.
    """
    config_path = Path(path) / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if not is_fused(config):
        raise UserError(f"{path} is not a fused checkpoint: its config.json has no moefuse block.")
    _check_block(path, config)
    register_fused(config)
    *_, causal = fused_classes(config["model_type"].removeprefix(MODEL_TYPE_PREFIX))
    return causal.from_pretrained(path, dtype=dtype, **options)
