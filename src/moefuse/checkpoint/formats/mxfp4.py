"""MXFP4 as gpt-oss ships it: ``NAME_blocks``, 32 numbers in 16 bytes, and ``NAME_scales``, a byte.

A number is an e2m1 value times two to the power of its block's scale less 127 (Open Compute
Project, "OCP Microscaling Formats", 2023). Experts are stored (E, outputs, inputs / 32, 16) and
stand for (E, inputs, outputs), as Transformers has them.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moefuse.checkpoint.formats.base import (
    Format,
    Packed,
    Settings,
    check_kind,
    check_shape,
    collect,
)
from moefuse.checkpoint.tensor_info import TensorInfo

BLOCKS, SCALES = "_blocks", "_scales"
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS = 127
BLOCK_BYTES = 16


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:  # noqa: ARG001
    for stem, parts in collect(source, tensors, BLOCKS, (SCALES,)):
        check_kind(source, parts[BLOCKS], 4, "U8")
        check_kind(source, parts[SCALES], 3, "U8")
        experts, outputs, blocks, _ = parts[BLOCKS].shape
        check_shape(source, parts[BLOCKS], (experts, outputs, blocks, BLOCK_BYTES))
        check_shape(source, parts[SCALES], (experts, outputs, blocks))
        shape = (experts, 2 * BLOCK_BYTES * blocks, outputs)
        yield Packed(stem, shape, tuple(parts.items()))


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:  # noqa: ARG001
    blocks = parts[BLOCKS]
    value = torch.tensor((*HALF, *(-half for half in HALF)), device=blocks.device)
    # The lower half of a byte comes first.
    pairs = torch.stack([value[(blocks & 15).long()], value[(blocks >> 4).long()]], -1)
    exponent = parts[SCALES].int() - BIAS
    return torch.ldexp(pairs.flatten(-2), exponent.unsqueeze(-1)).flatten(-2).mT


FORMAT = Format("MXFP4", "mxfp4", _find, _unpack)
