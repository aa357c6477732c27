"""Assemble: a directory that any Hugging Face user recognises, holding the fused student.

The teacher's own fields, tokenizer, chat template and generation settings; sharded safetensors with
an index; the modelling file that ``auto_map`` names; a model card. The directory appears whole, by
a rename.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.formats.base import without_settings
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.console import track
from moefuse.families import Family
from moefuse.modeling import TRAVELLING_FILE
from moefuse.modeling.modeling_moefuse import CLASS_PREFIX, MODEL_TYPE_PREFIX
from moefuse.sizes import LayerPlan

FORMAT_VERSION = 1
TOKENIZER_CONFIG = "tokenizer_config.json"

LayerState = Callable[[int], dict[str, Tensor]]


def student_config(
    config: dict[str, Any],
    family: Family,
    layers: dict[int, LayerPlan],
    dtype: torch.dtype,
    job: str,
) -> dict[str, Any]:
    """Return the student's ``config.json``: the teacher's fields and the moefuse block."""
    module = TRAVELLING_FILE.stem
    classes = {
        "AutoConfig": family.config_class,
        "AutoModel": family.base_model,
        "AutoModelForCausalLM": family.causal_lm,
    }
    dropped = {"torch_dtype", "dtype", "transformers_version"}
    kept = without_settings(with_rope_parameters(config))
    return {
        **{key: value for key, value in kept.items() if key not in dropped},
        "architectures": [CLASS_PREFIX + family.causal_lm],
        "model_type": MODEL_TYPE_PREFIX + family.model_type,
        "auto_map": {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in classes.items()},
        "dtype": str(dtype).removeprefix("torch."),
        "moefuse": {
            "format": FORMAT_VERSION,
            "teacher_model_type": family.model_type,
            "job": job,
            **experts_form(config, family),
            "layers": {str(layer): asdict(plan) for layer, plan in layers.items()},
        },
    }


def experts_form(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Return what the modelling file has to know of the native experts; nothing for most families.

    ``transposed`` is how the module that is replaced lies, ``biased`` and ``gating`` what is kept.
    """
    layout = family.layout
    form = {
        "transposed": layout.transposed,
        "biased": layout.biased,
        "gating": family.gating(config),
    }
    return {"experts": form} if any(form.values()) else {}


def with_rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Spell the rotary settings as Transformers v5 does, ``rope_theta`` among ``rope_parameters``.

    Published configurations have ``rope_scaling`` and ``rope_theta`` apart, which v5 still reads
    for model types it knows natively but not, without consent to remote code, for ours.
    """
    old = {"rope_scaling", "rope_theta"}
    if "rope_parameters" in config or not old & config.keys():
        return config
    scaling = dict(config.get("rope_scaling") or {})
    parameters = {"rope_type": scaling.get("type", "default"), **scaling}
    if "rope_theta" in config:
        parameters["rope_theta"] = config["rope_theta"]
    return {**{k: v for k, v in config.items() if k not in old}, "rope_parameters": parameters}


def student_tensors(
    reader: CheckpointReader, layers: dict[int, LayerPlan], state: LayerState, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the student by name, one layer of the teacher in memory at a time.

    ``state(layer)`` returns the fused module's state. Floats outside the experts keep the dtype
    that the teacher stores them in; those of the fused experts are cast to ``dtype``.
    """
    for name in reader.outside_names():
        yield reader.family.module_name(name), reader.read(name)
    family = reader.family
    for layer in track(range(family.layer_count(reader.config)), "Assemble"):
        prefix = family.layer_prefix(layer)
        for name, tensor in reader.read_layer(layer, experts=False).items():
            yield prefix + name, tensor
        if layer in layers:
            experts = f"{family.experts_path(layer)}."
            for name, tensor in state(layer).items():
                cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
                yield experts + name, cast


def assemble(
    reader: CheckpointReader,
    layers: dict[int, LayerPlan],
    state: LayerState,
    out: Path,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    job: str,
    tokenizer_class: str | None,
    describe: Callable[[Path], None],
) -> None:
    """Write the student to ``out``, which appears whole or not at all.

    ``job`` is the fingerprint of what made the layers; ``tokenizer_class`` the name of the class
    that the teacher's tokenizer is loaded as, None where it has none; ``describe`` writes the model
    card into the directory that it is given.
    """
    partial = artifacts.partial_directory(out)
    with ShardedWriter(partial, max_shard_bytes) as writer:
        for name, tensor in student_tensors(reader, layers, state, dtype):
            writer.add(name, tensor)
    reader.copy_auxiliary_files(partial)
    if tokenizer_class is not None:
        _name_tokenizer(partial / TOKENIZER_CONFIG, tokenizer_class)
    shutil.copyfile(TRAVELLING_FILE, partial / TRAVELLING_FILE.name)
    config = student_config(reader.config, reader.family, layers, dtype, job)
    artifacts.write_json(partial / "config.json", config)
    describe(partial)
    artifacts.finish_directory(partial, out)


def _name_tokenizer(path: Path, tokenizer_class: str) -> None:
    """Let the settings of a tokenizer name the class that it is.

    Transformers knows for some model types, DeepSeek's among them, that published settings name
    another class, which cuts text otherwise. It does not know the student's model type. A class
    that comes with the tokenizer (``auto_map``) is found as it is.
    """
    settings = artifacts.read_json(path) if path.is_file() else {}
    if "auto_map" not in settings and settings.get("tokenizer_class") != tokenizer_class:
        artifacts.write_json(path, {**settings, "tokenizer_class": tokenizer_class})
