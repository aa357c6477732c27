"""AWQ in its GEMM layout, as AutoAWQ stores it: ``qweight``, ``qzeros``, ``scales``.

``qweight`` (in, out / 8) and ``qzeros`` (groups, out / 8) hold eight numbers of 4 bits of a row in
the order 0 2 4 6 1 3 5 7; weight[o, i] = scale[g, o] * (q[i, o] - zero[g, o]).
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moefuse.checkpoint.formats.base import (
    PACKED_IN,
    SCALES_IN,
    Format,
    Packed,
    Settings,
    check_kind,
    check_shape,
    collect,
    columns_of_group,
)
from moefuse.checkpoint.formats.bits import unpack_columns
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

Q, ZEROS, SCALES = ".qweight", ".qzeros", ".scales"
BITS = 4
PLACE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of an int32's eight numbers is the first column's, the second's, ..."""


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:
    kind = str(settings.get("version", "gemm")).lower()
    if kind != "gemm" or settings.get("bits", settings.get("w_bit", BITS)) != BITS:
        raise UserError(
            f"{source} is quantised with AWQ in the layout {kind!r}; moefuse reads the layout "
            "'gemm' at 4 bits. Start from another version of the checkpoint."
        )
    for stem, parts in collect(source, tensors, Q, (ZEROS, SCALES)):
        check_kind(source, parts[Q], 2, *PACKED_IN)
        check_kind(source, parts[ZEROS], 2, *PACKED_IN)
        check_kind(source, parts[SCALES], 2, *SCALES_IN)
        inputs, packed = parts[Q].shape
        groups = -(-inputs // columns_of_group(settings, inputs, parts[SCALES].shape[0]))
        check_shape(source, parts[SCALES], (groups, 8 * packed))
        check_shape(source, parts[ZEROS], (groups, packed))
        yield Packed(stem + ".weight", (8 * packed, inputs), tuple(parts.items()))


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:
    q_IO, zero_GO = _in_order(parts[Q]), _in_order(parts[ZEROS])
    columns = columns_of_group(settings, shape[1], len(zero_GO))
    group_I = torch.arange(shape[1], device=q_IO.device) // columns
    return (parts[SCALES].float()[group_I] * (q_IO - zero_GO[group_I])).T


def _in_order(packed_RC: Tensor) -> Tensor:
    eights = unpack_columns(packed_RC, BITS).unflatten(-1, (-1, 8))
    return eights[..., list(PLACE_OF_COLUMN)].flatten(-2)


FORMAT = Format("AWQ", "awq", _find, _unpack)
