"""Quantised checkpoints made from plain ones, by packers written from the formats' definitions.

Packing is done number by number with Python's integers, as the formats are described, and shares
nothing with how moefuse unpacks. Beside every quantised checkpoint a plain one is written, of the
numbers that the quantised ones stand for.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 8
BLOCK = (16, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
State = dict[str, Tensor]


def in_fp8(weight_OI: Tensor) -> tuple[State, Tensor]:
    """Blocks of ``BLOCK``; returns what is stored after the weight's stem, and the plain weight."""
    rows, columns = BLOCK
    outputs, inputs = weight_OI.shape
    scale = torch.empty(math.ceil(outputs / rows), math.ceil(inputs / columns))
    stored = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    plain_OI = torch.empty_like(weight_OI)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight_OI[place].abs().max() / 448
            stored[place] = (weight_OI[place] / scale[i, j]).to(torch.float8_e4m3fn)
            plain_OI[place] = stored[place].float() * scale[i, j]
    return {".weight": stored, ".weight_scale_inv": scale}, plain_OI


def _rounded(weight_OI: Tensor, bits: int, group_I: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return whole numbers (O, I), and scales (fp16) and zeros of every group, (groups, O)."""
    group = torch.tensor(group_I)
    scales, zeros, q_OI = [], [], torch.empty(weight_OI.shape, dtype=torch.int64)
    for g in range(int(group.max()) + 1):
        part_OI = weight_OI[:, group == g]
        low_O, high_O = part_OI.amin(1).clamp_max(0), part_OI.amax(1).clamp_min(0)
        scale_O = ((high_O - low_O) / (2**bits - 1)).clamp_min(1e-3).half()
        zero_O = (-low_O / scale_O.float()).round().clamp(0, 2**bits - 1).long()
        whole = (part_OI / scale_O.float()[:, None]).round() + zero_O[:, None]
        q_OI[:, group == g] = whole.clamp(0, 2**bits - 1).long()
        scales.append(scale_O)
        zeros.append(zero_O)
    return q_OI, torch.stack(scales), torch.stack(zeros)


def _plain(q_OI: Tensor, scale_GO: Tensor, zero_GO: Tensor, group_I: list[int]) -> Tensor:
    columns = [
        scale_GO[g].float() * (q_OI[:, i] - zero_GO[g]).float() for i, g in enumerate(group_I)
    ]
    return torch.stack(columns, 1)


def _as_int32(numbers: list[int], bits: int) -> int:
    word = sum(number << (bits * place) for place, number in enumerate(numbers))
    return word - (1 << 32) if word >= 1 << 31 else word


def _packed_rows(matrix_RC: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack neighbours along a row into int32, the first (by ``order``) in the lowest bits."""
    each = 32 // bits
    rows = []
    for row in matrix_RC.tolist():
        runs = [row[at : at + each] for at in range(0, len(row), each)]
        rows.append([_as_int32([run[n] for n in order or range(each)], bits) for run in runs])
    return torch.tensor(rows, dtype=torch.int32)


def _in_no_order(inputs: int) -> list[int]:
    generator = torch.Generator().manual_seed(inputs)
    return [int(at) // GROUP for at in torch.randperm(inputs, generator=generator)]


def in_gptq(
    weight_OI: Tensor, *, bits: int = 4, version: int = 1, group_I: list[int] | None = None
) -> tuple[State, Tensor]:
    """GPTQ with columns that belong to ``group_I``: by default in no order, as act-order has it."""
    group_I = group_I or _in_no_order(weight_OI.shape[1])
    q_OI, scale_GO, zero_GO = _rounded(weight_OI, bits, group_I)
    stored_zero_GO = zero_GO if version == 2 else (zero_GO - 1) % 2**bits
    stored = {
        ".qweight": _packed_rows(q_OI, bits).T.contiguous(),
        ".qzeros": _packed_rows(stored_zero_GO, bits),
        ".scales": scale_GO,
        ".g_idx": torch.tensor(group_I, dtype=torch.int32),
    }
    return stored, _plain(q_OI, scale_GO, zero_GO, group_I)


def in_awq(weight_OI: Tensor) -> tuple[State, Tensor]:
    """AWQ, GEMM layout."""
    group_I = [at // GROUP for at in range(weight_OI.shape[1])]
    q_OI, scale_GO, zero_GO = _rounded(weight_OI, 4, group_I)
    stored = {
        ".qweight": _packed_rows(q_OI.T, 4, AWQ_ORDER),
        ".qzeros": _packed_rows(zero_GO, 4, AWQ_ORDER),
        ".scales": scale_GO,
    }
    return stored, _plain(q_OI, scale_GO, zero_GO, group_I)


def in_compressed_tensors(weight_OI: Tensor) -> tuple[State, Tensor]:
    """compressed-tensors, W4A16 in groups of columns in no order, as act-order leaves them."""
    group_I = _in_no_order(weight_OI.shape[1])
    q_OI, scale_GO, zero_GO = _rounded(weight_OI, 4, group_I)
    stored = {
        ".weight_packed": _packed_rows(q_OI, 4),
        ".weight_scale": scale_GO.T.contiguous(),
        # Packed down the columns: eight outputs of one group to an int32.
        ".weight_zero_point": _packed_rows(zero_GO, 4).T.contiguous(),
        ".weight_shape": torch.tensor(weight_OI.shape),
        ".weight_g_idx": torch.tensor(group_I, dtype=torch.int32),
    }
    return stored, _plain(q_OI, scale_GO, zero_GO, group_I)


FP8_SETTINGS = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
GPTQ_SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
COMPRESSED_WEIGHTS = {
    "num_bits": 4,
    "symmetric": False,
    "strategy": "group",
    "group_size": GROUP,
    "actorder": "group",
}
COMPRESSED_SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": COMPRESSED_WEIGHTS}},
}
FORMATS: dict[str, tuple[dict, Callable[[Tensor], tuple[State, Tensor]]]] = {
    "fp8": (FP8_SETTINGS, in_fp8),
    "gptq": (GPTQ_SETTINGS, in_gptq),
    "awq": (AWQ_SETTINGS, in_awq),
    "compressed-tensors": (COMPRESSED_SETTINGS, in_compressed_tensors),
}


def quantize(plain: Path, quantized: Path, name: str) -> None:
    """Write ``quantized`` from the plain checkpoint ``plain``, which becomes what that stands for.

    Every projection is quantised; the first decoder layer's attention stays as it is.
    """
    settings, pack = FORMATS[name]
    shutil.copytree(plain, quantized)
    (quantized / "model.safetensors.index.json").unlink(missing_ok=True)
    stored: State = {}
    for shard in sorted(plain.glob("*.safetensors")):
        (quantized / shard.name).unlink()
        tensors = load_file(shard)
        for tensor_name, tensor in tensors.items():
            is_left_out = "layers.0.self_attn" in tensor_name
            if not tensor_name.endswith("_proj.weight") or is_left_out:
                stored[tensor_name] = tensor
                continue
            parts, tensors[tensor_name] = pack(tensor)
            stem = tensor_name.removesuffix(".weight")
            stored |= {stem + end: part for end, part in parts.items()}
        save_file({n: t.contiguous() for n, t in tensors.items()}, shard, {"format": "pt"})
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
