"""What a format of quantised weights is, and what several of them share."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

# torch takes seconds to import, and what only reads headers of plain checkpoints needs none of it.
if TYPE_CHECKING:
    from torch import Tensor

Settings = Mapping[str, Any]
"""``quantization_config`` of a ``config.json``."""
SETTINGS = ("quantization_config", "compression_config")
"""Where a ``config.json`` has it; the second is an older name."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Safetensors' names of the dtypes that a ``config.json`` may name."""
PACKED_IN = ("I32",)
INDICES = ("I32", "I64")
SCALES_IN = ("BF16", "F16", "F32", "F8_E8M0")
"""What packed numbers, the groups of columns and scales may be stored in."""


class DamagedPartsError(Exception):
    """The numbers of a weight's parts do not fit each other, which headers cannot tell."""


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
Unpack = Callable[["Mapping[str, Tensor]", Settings, tuple[int, ...]], "Tensor"]


@dataclass(frozen=True)
class Format:
    """A way to store weights in few bits.

    ``method`` is what settings call it; ``find(source, tensors, settings)`` yields all quantised
    weights, raising ``UserError`` for damaged ones; ``unpack(parts, settings, shape)`` makes one
    plain weight of its parts, any float dtype, and raises ``DamagedPartsError``. ``leaves_out`` are
    ends of names of tensors that only quantised products need.
    """

    title: str
    method: str
    find: Find
    unpack: Unpack
    leaves_out: tuple[str, ...] = ()


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """Return ``quantization_config`` of a configuration; None where there is none."""
    settings = next((config[key] for key in SETTINGS if key in config), None)
    return settings if isinstance(settings, Mapping) and settings else None


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration for weights that are plain now."""
    return {key: value for key, value in config.items() if key not in SETTINGS}


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """Return the method that ``quantization_config`` names, or None where there is none."""
    settings = settings_of(config)
    return None if settings is None else str(settings.get("quant_method", "an unnamed method"))


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
                raise missing_part(source, name, stem + end)
        ends = (first, *needed, *optional)
        yield stem, {end: tensors[stem + end] for end in ends if stem + end in tensors}


def missing_part(source: str, name: str, other: str) -> UserError:
    """Return the refusal of a checkpoint that has the tensor ``name`` and not ``other``."""
    return UserError(
        f"{source} has {name!r} but not {other!r}, without which its numbers mean nothing; "
        "download the checkpoint again."
    )


def check_kind(source: str, tensor: TensorInfo, dims: int | None, *dtypes: str) -> None:
    """Raise ``UserError`` unless a stored tensor has so many dimensions (None: any) and a dtype."""
    if tensor.dtype not in dtypes or dims not in (None, len(tensor.shape)):
        what = "tensor" if dims is None else f"{dims}-dimensional tensor"
        raise UserError(
            f"The tensor {tensor.name!r} in {source} is stored as {tensor.dtype} in the shape "
            f"{list(tensor.shape)}, where a {what} of {' or '.join(dtypes)} belongs; download the "
            "checkpoint again."
        )


def columns_of_group(settings: Settings, inputs: int, groups: int) -> int:
    """Return how many neighbouring columns share a scale, by the settings or else evenly."""
    size = settings.get("group_size", settings.get("q_group_size"))
    if isinstance(size, int):
        return size if size > 0 else inputs
    return max(1, -(-inputs // max(1, groups)))


def check_groups(group_I: "Tensor", groups: int) -> None:
    """Raise ``DamagedPartsError`` unless every column, (in,), belongs to one of ``groups``."""
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise DamagedPartsError(
            f"its columns belong to groups {int(group_I.min())} to {int(group_I.max())}, and it "
            f"has scales for {groups}"
        )


def check_shape(source: str, tensor: TensorInfo, *allowed: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless a stored tensor has one of the ``allowed`` shapes."""
    if tensor.shape not in allowed:
        raise UserError(
            f"The tensor {tensor.name!r} in {source} has the shape {list(tensor.shape)} where "
            f"{list(allowed[0])} belongs to its weight; download the checkpoint again."
        )
