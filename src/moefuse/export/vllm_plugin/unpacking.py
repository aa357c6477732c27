"""Packed weights read as the plain ones that they stand for, where vLLM has no kernel for them.

vLLM's products with packed whole numbers are made for GPUs. On CPUs there is one for 4 bits, in
16-bit floats and for sides of whole 32s; for others vLLM stops while it loads, or, in fp32, when
first asked. Such bases are unpacked as they are read, and take the memory of plain ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moefuse.checkpoint.formats.compressed_tensors import FORMAT

PACKED = "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape")
KERNEL_BITS, KERNEL_SIDE = 4, 32


def settings_to_unpack_by(
    settings: Mapping[str, Any] | None, dtype: torch.dtype, linears: Iterable[nn.Linear]
) -> Mapping[str, Any] | None:
    """Return ``settings`` (a ``quantization_config``) if a CPU has no kernel for the weights.

    ``linears`` are the packed layers, ``dtype`` that of the products. None: leave them to vLLM.
    """
    if settings is None or settings.get("format") != PACKED:
        return None
    bits = {group["weights"]["num_bits"] for group in settings["config_groups"].values()}
    whole = all(
        side % KERNEL_SIDE == 0
        for linear in linears
        for side in (linear.in_features, linear.out_features)
    )
    if bits == {KERNEL_BITS} and dtype != torch.float32 and whole:
        return None
    return settings


def unpacked(
    weights: Iterable[tuple[str, Tensor]], settings: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name as they come, each packed weight, in fp32, when it is complete.

    The parts of a weight may lie in different files, and so may be far from each other.
    """
    waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        stem, _, part = name.rpartition(".")
        if part not in PARTS:
            yield name, tensor
            continue
        waiting[stem][f".{part}"] = tensor
        if len(waiting[stem]) == len(PARTS):
            parts = waiting.pop(stem)
            rows, columns = parts[".weight_shape"].tolist()
            yield f"{stem}.weight", FORMAT.unpack(parts, settings, (rows, columns))
