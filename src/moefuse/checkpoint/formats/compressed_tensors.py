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
    Format,
    Packed,
    Settings,
    check_shape,
    collect,
    method_is,
)
from moefuse.checkpoint.formats.bits import scaled, shifted, unpack_columns, unpack_rows
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

PACKED, WEIGHT, SCALE = ".weight_packed", ".weight", ".weight_scale"
ZERO, GROUP_OF, SHAPE = ".weight_zero_point", ".weight_g_idx", ".weight_shape"
WHOLE = ("I8", "F8_E4M3")
READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _weights(settings: Settings) -> Mapping[str, Any]:
    """Return how weights are quantised, the same everywhere; raises ``UserError``."""
    groups = [g.get("weights") or {} for g in (settings.get("config_groups") or {}).values()]
    kinds = {(group.get("num_bits"), str(group.get("block_structure"))) for group in groups}
    written = str(settings.get("format"))
    if len(kinds) != 1 or written not in READ:
        raise UserError(
            f"quantization_config has the compressed-tensors format {written!r} with {len(kinds)} "
            f"kinds of weights; moefuse reads one kind, in one of {', '.join(READ)}."
        )
    return groups[0]


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:
    bits = int(_weights(settings)["num_bits"])
    for stem, parts in collect(source, tensors, PACKED, (SCALE, SHAPE), (ZERO, GROUP_OF)):
        if 32 % bits:
            raise UserError(f"{source} packs {bits} bits a number; moefuse reads 2, 4 and 8.")
        rows, columns = parts[PACKED].shape
        shape = (rows, columns * 32 // bits)
        check_shape(source, parts[SCALE], (rows, parts[SCALE].shape[-1]), (1,))
        yield Packed(stem + WEIGHT, shape, tuple(parts.items()))
    whole = {n: t for n, t in tensors.items() if not n.endswith(WEIGHT) or t.dtype in WHOLE}
    for stem, parts in collect(source, whole, WEIGHT, (SCALE,), (ZERO,)):
        yield Packed(stem + WEIGHT, parts[WEIGHT].shape, tuple(parts.items()))


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:
    weights = _weights(settings)
    scale = _as_matrix(parts[SCALE])
    zero = parts.get(ZERO)
    if PACKED in parts:
        bits = int(weights["num_bits"])
        value = (unpack_columns(parts[PACKED], bits) - 2 ** (bits - 1)).float()
        if zero is not None:
            zero = unpack_rows(zero, bits)[: shape[0]] - 2 ** (bits - 1)
    else:
        value = parts[WEIGHT].float()
    group_I = parts.get(GROUP_OF)
    if group_I is not None and int(group_I.min()) >= 0:
        scale = scale[:, group_I.long()]
        zero = None if zero is None else zero[:, group_I.long()]
    rows, columns = weights.get("block_structure") or _block(shape, scale)
    block = (int(rows), int(columns))
    if zero is not None:
        shifted(value, _as_matrix(zero), block)
    return scaled(value, scale, block)


def _as_matrix(scale: Tensor) -> Tensor:
    return scale.reshape(-1, 1) if scale.ndim < 2 else scale


def _block(shape: tuple[int, ...], scale: Tensor) -> tuple[int, int]:
    """Return how many rows and columns share a scale."""
    return -(-shape[0] // len(scale)), -(-shape[1] // scale.shape[1])


FORMAT = Format(
    "compressed-tensors",
    method_is("compressed-tensors"),
    _find,
    _unpack,
    leaves_out=(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_zero_point"),
)
