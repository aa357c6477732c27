"""compressed-tensors, as llm-compressor writes it: packed whole numbers, int8 or fp8 with scales.

``weight_packed`` (out, in * bits / 32) holds the numbers of a row from the lowest bits, each plus
2^(bits - 1); ``weight_scale`` (out, groups), ``weight_zero_point`` (out * bits / 32, groups) packed
down the columns, and ``weight_g_idx`` (in,) each column's group. Else ``weight`` is int8 or fp8,
and ``weight_scale`` one number, one for every row or group, or one for every block. A number is
its value, less the zero point, times the scale.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moefuse.checkpoint.formats.base import (
    INDICES,
    PACKED_IN,
    SCALES_IN,
    DamagedPartsError,
    Format,
    Packed,
    Settings,
    check_groups,
    check_kind,
    check_shape,
    collect,
    missing_part,
)
from moefuse.checkpoint.formats.bits import scaled, shifted, unpack_columns, unpack_rows
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

PACKED, WEIGHT, SCALE = ".weight_packed", ".weight", ".weight_scale"
ZERO, GROUP_OF, SHAPE = ".weight_zero_point", ".weight_g_idx", ".weight_shape"
WHOLE = ("I8", "F8_E4M3")
READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
Kind = Mapping[str, Any]
"""How weights are quantised: ``weights`` of one of the settings' ``config_groups``."""
Parts = dict[str, TensorInfo]


def _kinds(settings: Settings) -> tuple[int, list[Kind]]:
    """Return the bits of a number and how they share scales; raises ``UserError``."""
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    found = [g.get("weights") for g in groups if isinstance(g, Mapping)]
    kinds = [kind for kind in found if isinstance(kind, Mapping)]
    bits = {kind.get("num_bits") for kind in kinds}
    written = str(settings.get("format"))
    width = next((number for number in (2, 4, 8) if bits == {number}), None)
    if width is None or written not in READ:
        raise UserError(
            f"quantization_config has the compressed-tensors format {written!r} with weights of "
            f"{', '.join(sorted(map(str, bits))) or 'no'} bits; moefuse reads one of 2, 4 and 8 "
            f"bits, in one of {', '.join(READ)}. Start from another version of the checkpoint."
        )
    strange = [f"the strategy {_strategy(k)!r}" for k in kinds if _strategy(k) not in STRATEGIES]
    if (settings.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        strange.append("packed sparsity")
    if settings.get("transform_config"):
        strange.append("rotations")
    if strange:
        raise UserError(
            f"quantization_config has weights with {strange[0]} (compressed-tensors), which "
            "moefuse does not read; start from another version of the checkpoint."
        )
    return width, kinds


def _strategy(kind: Kind) -> str:
    """Return which numbers share a scale; where it is not said the group's size tells."""
    if kind.get("strategy") or kind.get("block_structure"):
        return str(kind.get("strategy") or "block")
    if kind.get("group_size") is None:
        return "tensor"
    return "group" if _group_size(kind) else "channel"


def _group_size(kind: Kind) -> int:
    """Return how many columns of a row share a scale; 0 where all do."""
    size = kind.get("group_size")
    return size if isinstance(size, int) and size > 0 else 0


def _block(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return how many rows and columns of a weight share a scale; raises ``UserError``."""
    strategy = _strategy(kind)
    if strategy == "block":
        written = kind.get("block_structure")
        sizes = written.split("x") if isinstance(written, str) else written
        try:
            rows, columns = map(int, sizes or ())
            if min(rows, columns) > 0:
                return rows, columns
        except (TypeError, ValueError):
            pass
        raise UserError(
            f"quantization_config has {written!r} under 'block_structure'; two positive numbers "
            "are needed. Take the configuration from the model's publisher."
        )
    if strategy == "tensor":
        return shape[0], shape[1]
    return 1, (strategy == "group" and _group_size(kind)) or shape[1]


def _scale_shape(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = _block(kind, shape)
    return -(-shape[0] // max(1, rows)), -(-shape[1] // max(1, columns))


def _as_matrix(scale: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales as a matrix: one number, or one a row, may come as a vector."""
    return (*scale, 1, 1)[:2] if len(scale) < 2 else scale


def _kind_of(kinds: list[Kind], shape: tuple[int, ...], scale: tuple[int, ...]) -> Kind | None:
    """Return the first kind by which a weight of ``shape`` has scales of the shape ``scale``."""
    fits = (kind for kind in kinds if _scale_shape(kind, shape) == _as_matrix(scale))
    return next(fits, None)


def _checked(
    source: str, stem: str, parts: Parts, shape: tuple[int, ...], settings: Settings
) -> Packed:
    """Return a weight of ``shape``; raises ``UserError`` where its parts do not fit it."""
    bits, kinds = _kinds(settings)
    check_kind(source, parts[SCALE], None, *SCALES_IN)
    kind = _kind_of(kinds, shape, parts[SCALE].shape)
    if kind is None:
        check_shape(source, parts[SCALE], _scale_shape(kinds[0], shape))
        kind = kinds[0]
    rows, groups = _as_matrix(parts[SCALE].shape)
    if PACKED in parts and ZERO not in parts and not kind.get("symmetric", True):
        raise missing_part(source, parts[PACKED].name, stem + ZERO)
    if ZERO in parts and PACKED in parts and not kind.get("symmetric", True):
        check_kind(source, parts[ZERO], 2, *PACKED_IN)
        check_shape(source, parts[ZERO], (-(-rows * bits // 32), groups))
    elif ZERO in parts and PACKED not in parts:
        check_shape(source, parts[ZERO], parts[SCALE].shape)
    if GROUP_OF in parts:
        check_kind(source, parts[GROUP_OF], 1, *INDICES)
        check_shape(source, parts[GROUP_OF], shape[1:])
    return Packed(stem + WEIGHT, shape, tuple(parts.items()))


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:
    bits, _ = _kinds(settings)
    for stem, parts in collect(source, tensors, PACKED, (SCALE, SHAPE), (ZERO, GROUP_OF)):
        check_kind(source, parts[PACKED], 2, *PACKED_IN)
        rows, columns = parts[PACKED].shape
        yield _checked(source, stem, parts, (rows, columns * 32 // bits), settings)
    whole = {n: t for n, t in tensors.items() if not n.endswith(WEIGHT) or t.dtype in WHOLE}
    for stem, parts in collect(source, whole, WEIGHT, (SCALE,), (ZERO,)):
        check_kind(source, parts[WEIGHT], 2, *WHOLE)
        yield _checked(source, stem, parts, parts[WEIGHT].shape, settings)


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:
    bits, kinds = _kinds(settings)
    kind = _kind_of(kinds, shape, tuple(parts[SCALE].shape))
    assert kind is not None, "the header's check let other shapes pass"
    scale = parts[SCALE].reshape(_scale_shape(kind, shape))
    zero = None if PACKED in parts and kind.get("symmetric", True) else parts.get(ZERO)
    if PACKED in parts:
        if parts[SHAPE].tolist() != list(shape):
            raise DamagedPartsError(
                f"its shape is said to be {parts[SHAPE].tolist()}, and {list(shape)} are packed"
            )
        value = (unpack_columns(parts[PACKED], bits) - 2 ** (bits - 1)).float()
        if zero is not None:
            zero = unpack_rows(zero, bits)[: shape[0]] - 2 ** (bits - 1)
    else:
        value = parts[WEIGHT].float()
    block = _block(kind, shape)
    group_I = parts.get(GROUP_OF)
    if group_I is not None and int(group_I.min()) >= 0:  # -1: columns are in order
        check_groups(group_I, scale.shape[1])
        scale = scale[:, group_I.long()]
        zero = None if zero is None else zero[:, group_I.long()]
        block = (block[0], 1)
    if zero is not None:
        shifted(value, zero.reshape(-1, scale.shape[1]), block)
    return scaled(value, scale, block)


FORMAT = Format(
    "compressed-tensors",
    "compressed-tensors",
    _find,
    _unpack,
    leaves_out=(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_zero_point"),
)
