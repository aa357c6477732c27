"""fp8 in blocks, as DeepSeek-V3 is published: ``weight`` in e4m3, ``weight_scale_inv`` a block.

A number is its fp8 value times its block's scale (DeepSeek-AI, "DeepSeek-V3 Technical Report",
2024, section 3.3). Weights without a scale beside them are plain.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from moefuse.checkpoint.formats.base import (
    SCALES_IN,
    Format,
    Packed,
    Settings,
    check_kind,
    check_shape,
    collect,
)
from moefuse.checkpoint.formats.bits import scaled
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

WEIGHT, SCALE = ".weight", ".weight_scale_inv"
FLOATS = ("F8_E4M3", "F8_E5M2")


def _block(settings: Settings, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns of a block; the whole matrix where the settings name none."""
    block = settings.get("weight_block_size")
    if block is None:
        return shape[0], shape[1]
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(isinstance(size, int) and size > 0 for size in block):
        raise UserError(
            f"quantization_config has {block!r} under 'weight_block_size'; two positive numbers "
            "are needed. Take the configuration from the model's publisher."
        )
    return block[0], block[1]


def _find(source: str, tensors: Mapping[str, TensorInfo], settings: Settings) -> Iterator[Packed]:
    quantised = {n: t for n, t in tensors.items() if n.endswith(SCALE) or t.dtype in FLOATS}
    for stem, parts in collect(source, quantised, WEIGHT, (SCALE,)):
        check_kind(source, parts[WEIGHT], 2, *FLOATS)
        check_kind(source, parts[SCALE], None, *SCALES_IN)
        shape = parts[WEIGHT].shape
        rows, columns = _block(settings, shape)
        blocks = (-(-shape[0] // rows), -(-shape[1] // columns))
        check_shape(source, parts[SCALE], blocks, *([(), (1,)] if blocks == (1, 1) else []))
        yield Packed(stem + WEIGHT, shape, tuple(parts.items()))


def _unpack(parts: Mapping[str, Tensor], settings: Settings, shape: tuple[int, ...]) -> Tensor:
    block = _block(settings, shape)
    scale = parts[SCALE] if parts[SCALE].ndim == 2 else parts[SCALE].view(1, 1)
    return scaled(parts[WEIGHT].float(), scale, block)


FORMAT = Format(
    "fp8 in blocks",
    "fp8",
    _find,
    _unpack,
    leaves_out=(".input_scale", ".activation_scale"),
)
