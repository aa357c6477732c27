"""What a format of quantised weights is, and what several of them share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

Settings = Mapping[str, Any]
"""``quantization_config`` of a ``config.json``."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Safetensors' names of the dtypes that a ``config.json`` may name."""


@dataclass(frozen=True)
class Packed:
    """One quantised weight: its name and shape once plain, and what is stored of it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, TensorInfo], ...]

    def named(self, config: Mapping[str, Any]) -> TensorInfo:
        """Return the plain tensor, in the dtype that the model is meant to be in (else bf16)."""
        dtype = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
        first = self.parts[0][1]
        return TensorInfo(self.name, dtype, self.shape, first.shard, first.begin, self.parts)


Find = Callable[[str, Mapping[str, TensorInfo], Settings], Iterator[Packed]]
Unpack = Callable[[Mapping[str, Tensor], Settings, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Format:
    """A way to store weights in few bits.

    ``reads(settings)`` says whether these are its settings; ``find(source, tensors, settings)``
    yields all quantised weights, raising ``UserError`` for damaged ones; ``unpack(parts, settings,
    shape)`` makes one plain weight of its parts, any float dtype. ``leaves_out`` are ends of names
    of tensors that only quantised products need.
    """

    title: str
    reads: Callable[[Settings], bool]
    find: Find
    unpack: Unpack
    leaves_out: tuple[str, ...] = ()


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """Return ``quantization_config`` of a configuration; None where there is none."""
    settings = config.get("quantization_config", config.get("compression_config"))
    return settings if isinstance(settings, Mapping) else None


def method_is(name: str) -> Callable[[Settings], bool]:
    """Return what recognises settings by their ``quant_method``."""
    return lambda settings: settings.get("quant_method") == name


def collect(
    source: str,
    tensors: Mapping[str, TensorInfo],
    first: str,
    needed: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Yield the stem and the parts, by the ends of their names, of all that end with ``first``.

    Raises ``UserError`` where one of ``needed`` is missing beside it.
    """
    for name in tensors:
        if not name.endswith(first):
            continue
        stem = name.removesuffix(first)
        for end in needed:
            if stem + end not in tensors:
                raise UserError(
                    f"{source} has {name!r} but not {stem + end!r}, without which its numbers mean "
                    "nothing; download the checkpoint again."
                )
        ends = (first, *needed, *optional)
        yield stem, {end: tensors[stem + end] for end in ends if stem + end in tensors}


def check_shape(source: str, tensor: TensorInfo, *allowed: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless a stored tensor has one of the ``allowed`` shapes."""
    if tensor.shape not in allowed:
        raise UserError(
            f"The tensor {tensor.name!r} in {source} has the shape {list(tensor.shape)} where "
            f"{list(allowed[0])} belongs to its weight; download the checkpoint again."
        )
