"""GPTQ as AutoGPTQ and GPTQModel store it: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

``qweight`` (in * bits / 32, out) holds the numbers of a column from the top, ``qzeros`` (groups,
out * bits / 32) each group's zero, less one in the first version of the format, ``scales`` (groups,
out), and ``g_idx`` (in,) each row's group. weight[o, i] = scale[g, o] * (q[i, o] - zero[g, o]).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moefuse.checkpoint.formats.base import (
    INDICES,
    PACKED_IN,
    SCALES_IN,
    Format,
    Packed,
    Settings,
    check_groups,
    check_kind,
    check_shape,
    collect,
    columns_of_group,
)
from moefuse.checkpoint.formats.bits import unpack_columns, unpack_rows
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

Q, ZEROS, SCALES, GROUP_OF = ".qweight", ".qzeros", ".scales", ".g_idx"
VERSIONS = ("gptq", "gptq_v2")


def bits_of(settings: Settings, key: str = "bits") -> int:
    """Return the bits of a number, 2, 4 or 8; raises ``UserError``."""
    bits = settings.get(key)
    if bits not in (2, 4, 8):
        raise UserError(
            f"quantization_config has {bits!r} under {key!r}; moefuse reads 2, 4 and 8 bits. "
            "Start from another version of the checkpoint."
        )
    return bits


def _version(settings: Settings) -> str:
    """Return the version of the format; raises ``UserError`` for repacked ones (Marlin, ...)."""
    version = settings.get("checkpoint_format") or VERSIONS[0]
    if settings.get("is_marlin_format"):
        version = "marlin"
    if version not in VERSIONS:
        raise UserError(
            f"quantization_config has the GPTQ layout {version!r}; moefuse reads "
            f"{' and '.join(VERSIONS)}. Start from another version of the checkpoint."
        )
    return str(version)


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:
    each = 32 // bits_of(settings)
    _version(settings)
    for stem, parts in collect(source, tensors, Q, (ZEROS, SCALES), (GROUP_OF,)):
        check_kind(source, parts[Q], 2, *PACKED_IN)
        check_kind(source, parts[ZEROS], 2, *PACKED_IN)
        check_kind(source, parts[SCALES], 2, *SCALES_IN)
        rows, outputs = parts[Q].shape
        inputs, groups = rows * each, parts[SCALES].shape[0]
        if GROUP_OF in parts:
            check_kind(source, parts[GROUP_OF], 1, *INDICES)
            check_shape(source, parts[GROUP_OF], (inputs,))
        else:
            groups = -(-inputs // columns_of_group(settings, inputs, groups))
        check_shape(source, parts[SCALES], (groups, outputs))
        check_shape(source, parts[ZEROS], (groups, outputs // each))
        yield Packed(stem + ".weight", (outputs, rows * each), tuple(parts.items()))


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:
    bits = bits_of(settings)
    q_IO = unpack_rows(parts[Q], bits)
    zero_GO = unpack_columns(parts[ZEROS], bits)
    if _version(settings) == VERSIONS[0]:
        # The first version stored zeros less one; nought became the largest number.
        zero_GO = (zero_GO + 1) & (2**bits - 1)
    groups = len(zero_GO)
    group_I = parts.get(GROUP_OF)
    if group_I is None:
        columns = columns_of_group(settings, shape[1], groups)
        group_I = torch.arange(shape[1], device=q_IO.device) // columns
    check_groups(group_I, groups)
    scale_IO = parts[SCALES].float()[group_I.long()]
    return (scale_IO * (q_IO - zero_GO[group_I.long()])).T


FORMAT = Format("GPTQ", "gptq", _find, _unpack)
