"""Where to compute and in which dtype."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from moefuse.checkpoint.headers import TensorInfo
from moefuse.errors import UserError
from moefuse.families import Family

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
KNOWN = ("cpu", "cuda", "mps", "xpu")
WORKING = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> str:
    """Turn ``auto`` into ``cuda`` where there is one, else ``cpu``; raises ``UserError``."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in KNOWN:
        raise UserError(f"--device is {name!r}; choose auto or {', '.join(KNOWN)}, such as cuda:1.")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name} cannot be used here: {reason}.") from error
    return name


def choose_dtype(name: str, stored: torch.dtype, device: str) -> torch.dtype:
    """Turn ``auto`` into the checkpoint's dtype, or fp32 on a CPU; raises ``UserError``."""
    if name == "auto":
        return stored if device.startswith("cuda") else torch.float32
    if name not in WORKING:
        raise UserError(f"--dtype is {name!r}; choose auto, {', '.join(WORKING)}.")
    return WORKING[name]


def stored_dtype(
    tensors: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any]
) -> torch.dtype:
    """Return the dtype in which a checkpoint stores its routed experts (bf16 if quantised)."""
    shape = family.shape(config)
    first = next(iter(family.expert_tensors(shape.layers[0], shape)))
    return STORED.get(tensors[first].dtype, torch.bfloat16)


SMALL_MATRIX = 512 * 512


@contextmanager
def suited_threads(hidden: int, intermediate: int) -> Iterator[None]:
    """Compute on one CPU thread while matrices of ``hidden`` x ``intermediate`` are small.

    A few thousand small products per step cost more in waiting for each other's threads than the
    threads save: on a busy two-core machine one thread was measured five times as fast as two.
    The choice depends on sizes alone, because the number of threads changes the last bits.
    """
    before = torch.get_num_threads()
    if hidden * intermediate < SMALL_MATRIX:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
