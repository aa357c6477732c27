"""Running a teacher that does not fit in memory, one decoder layer at a time.

The model is built on the meta device, where weights take no memory. A recorder stands in for the
decoder layers once per batch, to learn the arguments that each of them receives (positions, masks,
rotary embeddings); then each layer's weights are read, every batch passes through it, and the
weights go. At no time is more than one layer in memory, besides the embeddings.

The bigger alternative, accelerate's offloading hooks, moves weights per forward pass: every batch
would read the whole model again.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefuse.checkpoint.reader import CheckpointReader
from moefuse.errors import UserError
from moefuse.families import Family
from moefuse.mathematics.experts import ExpertsCall


class _LastLayerReachedError(Exception):
    """Ends the recording pass before the final norm, which has no weights."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps its keyword arguments and passes the hidden states."""

    def __init__(self, layer: nn.Module, *, last: bool) -> None:
        super().__init__()
        self.stood_in_for = [layer]
        self.last = last
        self.entering = torch.empty(0)
        self.received: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stood_in_for"][0], name)

    def forward(self, hidden_states: Tensor, *_: Any, **received: Any) -> Tensor:
        self.entering, self.received = hidden_states, received
        if self.last:
            raise _LastLayerReachedError
        return hidden_states


class _Scaled(nn.Module):
    """Multiplies by a number; by 1 it does nothing at all."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale


def native_model(family: Family, settings: Mapping[str, Any]) -> Any:
    """Build the model of a ``config.json`` on the meta device, where weights take no memory."""
    config = getattr(transformers, family.config_class).from_dict(deepcopy(dict(settings)))
    config.use_cache = False
    with torch.device("meta"):
        return getattr(transformers, family.causal_lm)(config)


def _without_weights(reader: CheckpointReader) -> Any:
    try:
        return native_model(reader.family, reader.config)
    except Exception as error:  # every family checks its own fields in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(
            f"Transformers cannot build the model of the config.json in {reader.source} "
            f"({reason}); take the configuration from the model's publisher."
        ) from error


def _keep_in_fp32(model: nn.Module) -> None:
    """Give fp32 back to what ``from_pretrained`` would leave in it, whatever the dtype."""
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if model.dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(re.search(name, path) for name in names):  # as Transformers matches them
            tensor.data = tensor.data.float()


def _check_tensors(model: nn.Module, reader: CheckpointReader) -> None:
    """Raise ``UserError`` unless the checkpoint has all that the model needs, in its shapes."""
    family = reader.family
    stored = {family.module_name(name): tensor for name, tensor in reader.tensors.items()}
    ties = reader.config.get("tie_word_embeddings", False)
    tied = (getattr(model, "_tied_weights_keys", None) or {}) if ties else {}
    # Routed experts lie stacked in the model and singly on disk; the reader checked them.
    experts = tuple(f"{family.experts_path(n)}." for n in reader.shape.layers)
    for name, wanted in model.state_dict().items():
        if name.startswith(experts) or (name in tied and name not in stored):
            continue
        if name not in stored:
            raise UserError(
                f"{reader.source} lacks the tensor {name!r}, which a {family.model_type} model "
                "with its config.json needs; download the checkpoint again."
            )
        if stored[name].shape != tuple(wanted.shape):
            raise UserError(
                f"The tensor {stored[name].name!r} in {reader.source} has the shape "
                f"{list(stored[name].shape)}, but its config.json means {list(wanted.shape)}; "
                "configuration and weights are of different models."
            )


class StreamedTeacher:
    """A teacher read layer by layer from ``reader``, computing on ``device`` in ``dtype``."""

    def __init__(self, reader: CheckpointReader, *, device: str, dtype: torch.dtype) -> None:
        self.reader = reader
        self.device = torch.device(device)
        self.dtype = dtype
        model = _without_weights(reader)
        self.config: Any = model.config
        self.model: nn.Module = model.to(dtype).eval().requires_grad_(False)
        _keep_in_fp32(self.model)
        _check_tensors(self.model, reader)
        self.backbone: nn.Module = model.base_model
        self.layers = list(self.backbone.layers)  # type: ignore[arg-type]
        self._load_outside()

    def _load_outside(self) -> None:
        """Read the embeddings; rebuild what computes its buffers instead of loading them."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        name = next(n for n, m in self.model.named_modules() if m is embedding)
        weight = self.reader.read(f"{name}.weight").to(self.device, self.dtype)
        embedding.load_state_dict({"weight": weight}, assign=True)
        for child_name, child in list(self.backbone.named_children()):
            if any(True for _ in child.buffers()) and not any(True for _ in child.parameters()):
                rebuilt = type(child)(self.config)
                setattr(self.backbone, child_name, rebuilt.to(self.device))

    @torch.no_grad()
    def embed(
        self,
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor | None = None,
        *,
        position_ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the first layer's input, (B, S, D), and the keyword arguments of every layer.

        All are (B, S) int64. Padded rows come with ``attention_mask_BS``, packed ones with
        ``position_ids_BS``, whose every 0 begins a piece that sees no other.
        """
        recorders = [_Recorder(layer, last=False) for layer in self.layers]
        recorders[-1].last = True
        ids_BS = input_ids_BS.to(self.device)
        hidden_BSD = self.model.get_input_embeddings()(ids_BS)  # type: ignore[operator]
        self.backbone.layers = nn.ModuleList(recorders)
        try:
            self.backbone(
                inputs_embeds=hidden_BSD,
                attention_mask=_moved(attention_mask_BS, self.device),
                position_ids=_moved(position_ids_BS, self.device),
                use_cache=False,
            )
        except _LastLayerReachedError:
            pass
        finally:
            self.backbone.layers = nn.ModuleList(self.layers)
        # Not the embeddings: a model may scale them before its first layer.
        return recorders[0].entering, [recorder.received for recorder in recorders]

    @contextmanager
    def loaded(self, layer: int, *, following: int | None = None) -> Iterator[nn.Module]:
        """Hold one decoder layer's weights in memory, on the device and in the working dtype.

        Meanwhile the layer ``following``, by default the next one, is read from the disk into the
        operating system's cache. Raises ``OSError`` where a weight cannot be read.
        """
        module = self.layers[layer]
        self.reader.read_ahead(layer)
        module.load_state_dict(self._layer_state(layer), strict=True, assign=True)
        following = layer + 1 if following is None else following
        if 0 <= following < len(self.layers):
            self.reader.read_ahead(following)
        try:
            yield module
        finally:
            module.to("meta")

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Hold what follows the last layer in memory: hidden states (..., D) to logits (..., V)."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        scale = self.reader.family.logit_scale(self.reader.config)
        weighted: list[Any] = [self.backbone.norm, output]
        head = nn.Sequential(*weighted, _Scaled(scale))
        try:
            for module in weighted:
                module.load_state_dict(self._outside_state(module), strict=True, assign=True)
            yield head
        finally:
            head.to("meta")

    def whole(self) -> PreTrainedModel:
        """Read all weights and return the model, which is no longer streamed."""
        for layer, module in enumerate(self.layers):
            self.reader.read_ahead(layer)
            module.load_state_dict(self._layer_state(layer), strict=True, assign=True)
        model: Any = self.model
        for module in (model.base_model.norm, model.get_output_embeddings()):
            module.load_state_dict(self._outside_state(module), strict=True, assign=True)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.tie_weights()
        return model.requires_grad_(True)

    def _outside_state(self, module: nn.Module) -> dict[str, Tensor]:
        """Read a module under no decoder layer; tied embeddings where it is not stored."""
        family, reader = self.reader.family, self.reader
        stored = {family.module_name(name): name for name in reader.outside_names()}
        prefix = next(name for name, found in self.model.named_modules() if found is module)
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        state = {}
        for name, expected in module.state_dict().items():
            source = stored.get(f"{prefix}.{name}")
            weight = embedding.weight if source is None else reader.read(source)
            state[name] = weight.detach().to(self.device, expected.dtype)
        return state

    def _layer_state(self, layer: int) -> dict[str, Tensor]:
        family = self.reader.family
        expected = self.layers[layer].state_dict()
        stored = self.reader.read_layer(layer, experts=False)
        if layer in self.reader.shape.layers:
            path = f"{family.moe_name}.{family.experts_name}"
            experts = self._experts_state(layer)
            stored |= {f"{path}.{name}": tensor for name, tensor in experts.items()}
            del experts
        # Popped, so that what is stored in another dtype goes as soon as it is converted.
        return {name: stored.pop(name).to(self.device, expected[name].dtype) for name in expected}

    def _experts_state(self, layer: int) -> dict[str, Tensor]:
        """Read the state of a layer's experts module, by the names in it."""
        family = self.reader.family
        experts = self.layers[layer].get_submodule(f"{family.moe_name}.{family.experts_name}")
        dtype = experts.state_dict()["gate_up_proj"].dtype
        return self.reader.read_native(layer, device=self.device, dtype=dtype)

    @torch.no_grad()
    def forward_layer(
        self, module: nn.Module, hidden_BSD: Tensor, received: dict[str, Any]
    ) -> Tensor:
        """Pass one batch through a loaded layer; (B, S, D) to (B, S, D)."""
        output = module(hidden_BSD.to(self.device), **received)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def listening(
        self, module: nn.Module, hear: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    ) -> Iterator[None]:
        """Call ``hear(x, index, weights, y)`` whenever the layer's routed experts run."""
        family = self.reader.family
        experts = module.get_submodule(f"{family.moe_name}.{family.experts_name}")

        def hook(_: nn.Module, given: tuple[Tensor, ...], returned: Tensor) -> None:
            x_TD, index_TK, weight_TK = given[:3]
            hear(x_TD, index_TK, weight_TK, returned)

        handle = experts.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def whole_model(
    reader: CheckpointReader, *, device: str, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the whole model of a checkpoint, in evaluation mode, each weight read once.

    For quantised checkpoints, which Transformers' own loading leaves quantised or cannot read on
    every device. ``dtype`` is by default that of the experts once plain.
    """
    return StreamedTeacher(reader, device=device, dtype=dtype or reader.dtype).whole()


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def without_padding(
    call: tuple[Tensor, Tensor, Tensor, Tensor], attention_mask_BS: Tensor
) -> ExpertsCall:
    """Keep only the rows of a recorded call that belong to tokens of the text."""
    x_TD, index_TK, weight_TK, y_TD = call
    kept_T = attention_mask_BS.reshape(-1).bool().to(x_TD.device)
    flat_TD = x_TD.reshape(-1, x_TD.shape[-1])
    return ExpertsCall(
        x_TD=flat_TD[kept_T],
        index_TK=index_TK[kept_T].to(torch.int32),
        weight_TK=weight_TK[kept_T].float(),
        y_TD=y_TD.reshape(flat_TD.shape)[kept_T],
    )
