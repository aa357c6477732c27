"""From a path or a hub id to a model in memory, its tokenizer and its stored sizes."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from moefuse.checkpoint.formats import check_known, format_of, quantization_method
from moefuse.checkpoint.headers import (
    HUB_ERRORS,
    CheckpointHeaders,
    hub_error,
    local_directory,
    read_config,
    read_headers,
)
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import whole_model
from moefuse.errors import UserError
from moefuse.families import Family, MoeShape, all_families
from moefuse.modeling import FusedExperts, is_fused, load_fused, register_fused
from moefuse.modeling.modeling_moefuse import (
    MODEL_TYPE_PREFIX,
    CodedRows,
    MaskedDelta,
    NeuronExperts,
)
from moefuse.sizes import neuron_numbers

DTYPES = ("auto", "float32", "bfloat16", "float16")
NEEDED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.py", "*.model", "*.tiktoken"]


def load_model(
    path: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode, onto ``device``.

    ``path`` is a checkpoint directory or a hub id; ``dtype`` is ``float32``, ``bfloat16``,
    ``float16`` or, by default, as stored. A checkpoint that moefuse wrote is loaded through
    moefuse's own classes; a quantised one of a known format by moefuse's own reader, as the plain
    model; code that another checkpoint brings along runs only with ``trust_remote_code``. Raises
    ``UserError`` for what is no sound model or no usable device.
    """
    _check(dtype, device)
    directory = checkpoint_directory(path)
    config = read_headers(directory).config
    if not is_fused(config) and format_of(config) is not None:
        working = getattr(torch, dtype) if dtype and dtype != "auto" else None
        model = whole_model(CheckpointReader.open(directory), device=device, dtype=working)
        return model, load_tokenizer(path, trust_remote_code=trust_remote_code)
    method = quantization_method(config)
    # Prefixes, because Transformers knows bitsandbytes by its widths.
    if method and not any(known.startswith(method) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        # Transformers would only warn, and take the stored numbers for the weights.
        check_known(str(path), config)
    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    if not is_fused(config):
        options["trust_remote_code"] = trust_remote_code
    load: Any = load_fused if is_fused(config) else AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(directory, **options)
        model = model.eval().to(device)
    except UserError:
        raise
    except Exception as error:  # configurations and their classes raise whatever they like
        raise _not_loaded(path, error) from error
    _check_complete(path, sorted(found["missing_keys"]))
    return model, load_tokenizer(path, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; raises ``UserError`` where there is none."""
    try:
        directory = checkpoint_directory(path)
        config = read_config(directory)
        if is_fused(config):
            register_fused(config)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # tokenizer files and their classes raise whatever they like
        if "trust_remote_code" in str(error):
            raise _wants_consent(path) from error
        raise UserError(
            f"{path} has no tokenizer that can be loaded ({_reason(error)}); "
            "copy the teacher's tokenizer files into it."
        ) from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what to pad with: the tokenizer's own padding, else its end, else token 0."""
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    return next(number for number in known if isinstance(number, int))


def _check_complete(path: str | Path, missing: list[str]) -> None:
    """Refuse weights that Transformers would have filled with random numbers."""
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of the weights that its config.json asks for, "
            f"{missing[0]} among them; download or make it again."
        )


def _check(dtype: str | None, device: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{dtype!r} is no dtype for weights; give one of {', '.join(DTYPES)}.")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(
            f"{device!r} is no device; give one such as cpu, cuda or cuda:1."
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"The device {device!r} cannot be used here ({_reason(error)}); "
            "give another one, for example cpu."
        ) from error
    if kind == "meta":
        raise UserError("The meta device holds no numbers; give another one, for example cpu.")


def checkpoint_directory(path: str | Path) -> Path:
    """Return where a checkpoint lies; one of the hub is downloaded. Raises ``UserError``."""
    directory = local_directory(path)
    if directory is not None:
        return directory
    try:
        return Path(snapshot_download(str(path), allow_patterns=NEEDED))
    except HUB_ERRORS as error:
        raise hub_error(str(path), error) from error


def _not_loaded(path: str | Path, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return _wants_consent(path)
    if "ignore_mismatched_sizes" in str(error):
        return UserError(
            f"{path} holds weights of other shapes than its config.json asks for; "
            "take both from the same place."
        )
    return UserError(
        f"{path} cannot be loaded as a causal language model ({_reason(error)}); "
        "check that its config.json and its files belong together."
    )


def _wants_consent(path: str | Path) -> UserError:
    return UserError(
        f"{path} brings its own code, which runs with your rights; "
        "read it, and pass --trust-remote-code if you trust it."
    )


def _reason(error: Exception) -> str:
    """Return what a person needs of an exception: its kind and the first sentence of it."""
    sentence = re.split(r"(?<=[.!?:])\s", str(error).strip(), maxsplit=1)[0].rstrip(".!:")
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__


def read_sizes(path: str | Path) -> CheckpointHeaders:
    """Return the layout of the checkpoint that ``load_model`` loads from the same ``path``."""
    return read_headers(checkpoint_directory(path))


def _family(headers: CheckpointHeaders) -> tuple[Family, dict[str, Any]] | None:
    """Return the family of a teacher or student and the teacher's configuration, if it is known."""
    config = {key: value for key, value in headers.config.items() if key != "moefuse"}
    config["model_type"] = str(config.get("model_type")).removeprefix(MODEL_TYPE_PREFIX)
    family = all_families().get(config["model_type"])
    return None if family is None else (family, config)


def expert_bytes(headers: CheckpointHeaders) -> int | None:
    """Return the stored bytes of all routed experts, or None for a family that is not known."""
    known = _family(headers)
    if known is None:
        return None
    family, config = known
    prefixes = tuple(
        prefix
        for layer in family.shape(config).layers
        for prefix in (
            *family.routed_prefixes(layer),
            f"{family.experts_path(layer)}.",
        )
    )
    return sum(t.stored_bytes for name, t in headers.tensors.items() if name.startswith(prefixes))


def count_parameters(model: nn.Module) -> int:
    """Return how many parameters ``model`` has; shared ones count once.

    Where rows are stored as codes the numbers that these stand for count, not the codebook's.
    """
    coded = [rows for rows in model.modules() if isinstance(rows, CodedRows)]
    stored = sum(parameter.numel() for rows in coded for parameter in rows.parameters())
    plain = sum(parameter.numel() for parameter in model.parameters()) - stored
    return plain + sum(rows.codes[..., 0].numel() * rows.width for rows in coded)


def count_active_parameters(model: nn.Module, headers: CheckpointHeaders) -> int | None:
    """Return how many parameters a token passes at most, or None for an unknown family.

    Of E routed experts a token passes K. Of G bases it passes at most min(K, G), fewer where
    several of its experts share one. Of own neurons it passes at most those of the K experts that
    have most, and all shared ones.
    """
    known = _family(headers)
    if known is None:
        return None
    family, config = known
    shape = family.shape(config)
    idle = 0
    for layer in shape.layers:
        experts = model.get_submodule(family.experts_path(layer))
        idle += count_parameters(experts) - _active_of(experts, shape)
    return count_parameters(model) - idle


def _active_of(experts: nn.Module, shape: MoeShape) -> int:
    """Return how many of a layer's experts' parameters a token passes at most."""
    if isinstance(experts, NeuronExperts):
        own = int(experts.widths.sum(0).sort(descending=True).values[: shape.top_k].sum())
        shared = 0 if experts.gain is None else count_parameters(experts.gain) // shape.experts
        down = 0 if experts.down_bias is None else shape.top_k * shape.hidden
        return neuron_numbers(shape) * (own + shared) + shape.top_k * shared + down
    bases = experts.bases if isinstance(experts, FusedExperts) else nn.ModuleList()
    shared, all_numbers = count_parameters(bases), count_parameters(experts)
    masked = (module for module in experts.modules() if isinstance(module, MaskedDelta))
    shared += sum(delta.a.numel() + delta.b.numel() for delta in masked)
    active = (all_numbers - shared) * shape.top_k / shape.experts
    active += shared * min(shape.top_k, len(bases)) / len(bases) if bases else 0
    return round(active)
