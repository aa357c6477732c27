"""Writes compressed_tensors.safetensors: weights as the format's own library stores and reads them.

Needs the package compressed-tensors (0.20 made the file), which the tests do not.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

ROWS, COLUMNS, GROUP = 48, 64, 32
CASES = {
    "w4a16": (
        PackedQuantizationCompressor,
        {"num_bits": 4, "group_size": GROUP, "strategy": "group"},
    ),
    "w4a16-asymmetric": (
        PackedQuantizationCompressor,
        {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": False},
    ),
    "w8a16-channel": (PackedQuantizationCompressor, {"num_bits": 8, "strategy": "channel"}),
    "w8a8-int": (IntQuantizationCompressor, {"num_bits": 8, "strategy": "channel"}),
    "w8a8-fp8": (
        FloatQuantizationCompressor,
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ),
    "w8a8-fp8-tensor": (
        FloatQuantizationCompressor,
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "w8a8-fp8-block": (
        FloatQuantizationCompressor,
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ),
}
FORMATS = {
    PackedQuantizationCompressor: "pack-quantized",
    IntQuantizationCompressor: "int-quantized",
    FloatQuantizationCompressor: "float-quantized",
}


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest number that share a scale."""
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        tiles = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    grouped = weight.unflatten(1, (-1, args.group_size or COLUMNS))
    return grouped.amin(-1), grouped.amax(-1)


def main() -> None:
    """Write the file beside this script."""
    tensors, settings = {}, {}
    for seed, (name, (compressor, given)) in enumerate(CASES.items()):
        args = QuantizationArgs(**given)
        rows = 64 if args.strategy == "block" else ROWS
        weight = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))
        scale, zero = calculate_qparams(*extremes(weight, args), args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if args.symmetric:
            del state["weight_zero_point"]
        packed = compressor.compress(state, scheme)
        plain = compressor.decompress(packed, scheme)["weight"]
        stored = {key: value for key, value in packed.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{name}/{key}": value.contiguous() for key, value in stored.items()}
        tensors[f"{name}/plain"] = plain.contiguous()
        settings[name] = {
            "quant_method": "compressed-tensors",
            "format": FORMATS[compressor],
            "config_groups": {"group_0": {"weights": json.loads(args.model_dump_json())}},
        }
    out = Path(__file__).with_name("compressed_tensors.safetensors")
    save_file(tensors, out, metadata={"settings": json.dumps(settings)})


if __name__ == "__main__":
    main()
