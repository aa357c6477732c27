"""``transformers serve`` for fused checkpoints, in this process.

Transformers' server looks a model's class up in its own name space and list of language models,
where only native ones are; fused classes are put there. They are moefuse's own, so no code of the
checkpoint runs.
"""

from contextlib import suppress
from typing import Any

import transformers
from transformers.cli.serve import Serve
from transformers.models.auto import modeling_auto

from moefuse.modeling import fused_classes, register_fused
from moefuse.modeling.modeling_moefuse import MODEL_TYPE_PREFIX


def make_known(config: dict[str, Any]) -> None:
    """Let ``transformers serve`` find the classes of a fused ``config.json``."""
    register_fused(config)
    model_type = config["model_type"]
    *_, causal = fused_classes(model_type.removeprefix(MODEL_TYPE_PREFIX))
    setattr(transformers, causal.__name__, causal)
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = causal.__name__


def run_server(model: str, config: dict[str, Any] | None, *, host: str, port: int) -> None:
    """Serve ``model`` until this process is interrupted; ``config`` is that of a fused one."""
    if config is not None:
        make_known(config)
    # The server closes what is open, then hands Ctrl-C on.
    with suppress(KeyboardInterrupt):
        Serve(force_model=model, host=host, port=port)
