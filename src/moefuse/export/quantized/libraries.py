"""Schemes of libraries that round while Transformers loads a model, and write what they made.

The model is in memory as a whole for them. Each library is an extra of its own, imported by
Transformers when it is asked for.
"""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from moefuse import artifacts
from moefuse.checkpoint.headers import CONFIG
from moefuse.errors import UserError
from moefuse.export.quantized.compressed import Layout
from moefuse.export.student_reader import StudentReader
from moefuse.mathematics.integers import Grid
from moefuse.modeling import load_fused

NF4 = "nf4"
TORCHAO = {"int4-torchao": "AFFINE", "hqq4": "HQQ_SCALE_ONLY"}
"""torchao's schemes, with its name for how scales are chosen; HQQ is half-quadratic."""
SCHEMES = {NF4: ("bitsandbytes", "nf4"), **dict.fromkeys(TORCHAO, ("torchao", "torchao"))}
"""By scheme: the package that rounds, and moefuse's extra that has it."""
BLOCKS = (64, 32)
"""Numbers that share a scale in nf4, the usual first; CPUs read whole blocks of a row alone."""
LAYOUTS = dict.fromkeys(TORCHAO, Layout("torchao", 4, grouped=True))
"""What is known of how a library's scheme stores weights."""


def check(scheme: str, widths: set[int]) -> None:
    """Raise ``UserError`` where the scheme's library is missing or cannot read the layers.

    ``widths`` are how many numbers rows have.
    """
    ragged = sorted(width for width in widths if width % min(BLOCKS))
    if scheme == NF4 and ragged:
        raise UserError(
            f"Rows of {ragged[0]} numbers are not whole blocks of {min(BLOCKS)}, and bitsandbytes "
            "reads such rows wrongly on a CPU; leave those layers out with --what, or use w8a16."
        )
    package, extra = SCHEMES[scheme]
    if find_spec(package) is None:
        raise UserError(
            f"The scheme {scheme} needs {package}; install it with pip install 'moefuse[{extra}]'."
        )


def load(reader: StudentReader, scheme: str, stay: list[str], grid: Grid | None) -> PreTrainedModel:
    """Load a student rounded by ``scheme``, all but the linear layers ``stay``.

    ``grid`` tells torchao's schemes how many numbers share a scale.
    """
    how = settings(scheme, reader.dtype, stay, grid)
    model = load_fused(reader.directory, quantization_config=how)
    if scheme == NF4:
        _fit_blocks(model, reader)
    return model


def _fit_blocks(model: Any, reader: StudentReader) -> None:
    """Round rows that are not whole blocks of bitsandbytes' usual size again, in smaller ones.

    Its kernels for CPUs take blocks row by row, where all else numbers them through the matrix:
    0.50.2 reads rows of 160 numbers in blocks of 64 with errors of 24 %, not 9.
    """
    kind: Any = import_module("bitsandbytes").nn.Linear4bit
    for name, linear in model.named_modules():
        if not (isinstance(linear, kind) and linear.in_features % max(BLOCKS)):
            continue
        old = linear.weight
        block = next(block for block in BLOCKS if linear.in_features % block == 0)
        made = {**vars(old), "quant_state": None, "bnb_quantized": False, "blocksize": block}
        plain = reader.read(f"{name}.weight")
        linear.weight = type(old)(plain, requires_grad=False, **made).to(old.device)


def settings(scheme: str, dtype: torch.dtype, stay: list[str], grid: Grid | None) -> Any:
    """Return what ``from_pretrained`` takes as ``quantization_config``; see ``load``.

    ``dtype`` is the one that nf4's layers compute in.
    """
    if scheme == NF4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=stay,
        )
    assert grid is not None
    return TorchAoConfig(_torchao(scheme, grid), modules_to_not_convert=stay)


def _torchao(scheme: str, grid: Grid) -> Any:
    quantization: Any = import_module("torchao.quantization")
    workflows: Any = import_module("torchao.quantization.quantize_.workflows")
    granularity: Any = import_module("torchao.quantization.granularity")
    int4: Any = getattr(torch, "int4")  # noqa: B009 - torch's stubs do not know it
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=int4,
        granularity=granularity.PerGroup(grid.group),
        intx_choose_qparams_algorithm=workflows.IntxChooseQParamsAlgorithm[TORCHAO[scheme]],
    )


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every linear layer below ``module`` with its name, a library's own among them."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            yield name, child


@torch.no_grad()
def weight_of(linear: Any) -> Tensor:
    """Return the weight that a layer multiplies with, (O, I) fp32, by asking it for its columns."""
    unit_II = torch.eye(linear.in_features, dtype=torch.float32)
    dtype = getattr(linear, "compute_dtype", None) or linear.weight.dtype
    return linear(unit_II.to(dtype)).T.float()


def stored(model: PreTrainedModel, names: list[str]) -> dict[str, int]:
    """Return the bytes that every layer of ``names`` takes, with its scales."""
    found = dict.fromkeys(names, 0)
    for name, tensor in model.state_dict().items():
        layer = name.partition(".weight")[0]
        if layer in found:
            found[layer] += _bytes(tensor)
    return found


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor or of the plain ones that a subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not Tensor:
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def save(model: PreTrainedModel, directory: Path, max_shard_bytes: int) -> dict[str, Any]:
    """Write the model in the library's own way; returns its ``quantization_config``."""
    model.save_pretrained(directory, max_shard_size=max_shard_bytes)
    for path in directory.iterdir():
        artifacts.give_usual_mode(path)
    return artifacts.read_json(directory / CONFIG)["quantization_config"]
