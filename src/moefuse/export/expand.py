"""Expand: all experts of a student written out, as a plain checkpoint of its teacher's own kind.

For checking a student, and for engines that know the teacher's architecture and nothing else. It
saves no memory: every expert has its three matrices again, as large as the teacher's.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefuse.checkpoint.streaming import native_model
from moefuse.devices import WORKING
from moefuse.errors import UserError
from moefuse.export.plain import MAX_SHARD_BYTES, write_plain
from moefuse.export.plain_card import plain_card
from moefuse.export.student_reader import StudentReader
from moefuse.places import check_output, check_outside, existing_parent, size_of

SPARE_DISK_SHARE = 1.05
NEURONS_TOGETHER = 32
"""Wider experts get a multiple of these: engines' kernels and quantisers want such."""
EXPANDED = (
    "Every expert of the fused student {student}, written out as an ordinary one: the same "
    "function in the architecture of {base}, without any code of its own. It is for checking and "
    "for engines that know that architecture only, and saves no memory against the original: "
    "{bytes}, where the student takes {student_bytes}."
)
WITHOUT_BIASES = (
    " The student's biases were left out, because an ordinary expert has none; so this model "
    "computes something else than the student."
)


@dataclass(frozen=True)
class ExpandResult:
    """Where the plain checkpoint is, its bytes and the student's, and the width of its experts.

    ``dropped_biases`` says whether the student had biases that are not in it.
    """

    out: Path
    bytes: int
    student_bytes: int
    intermediate: int
    dropped_biases: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def expand(
    student: str | Path,
    out: str | Path,
    *,
    dtype: str = "auto",
    drop_biases: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExpandResult:
    """Write all experts of the fused checkpoint ``student`` out, as a plain checkpoint in ``out``.

    ``dtype`` is what experts are stored in: auto, as the student, or float32, bfloat16, float16.
    What the student computes is what the result does, but for that rounding. Raises ``UserError``
    before any work, for a student with biases too unless they are to be dropped.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    reader = StudentReader.of(Path(student))
    check_outside(out, reader.directory, "output")
    if reader.loses_biases and not drop_biases:
        raise UserError(
            f"{student} has a bias on every expert's neurons, which an ordinary expert cannot "
            "have; pass --drop-biases to write it without them, as another function than the "
            "student's."
        )
    stored = reader.dtype if dtype == "auto" else _dtype(dtype)
    width, needed = reader.shape.intermediate, reader.widest()
    if needed > width:
        width = -(-needed // NEURONS_TOGETHER) * NEURONS_TOGETHER
    wide = reader if width == reader.shape.intermediate else reader.widened(width)
    counted = wide.family.with_expert_count(wide.config, wide.shape.experts)
    config = {**counted, "dtype": str(stored).removeprefix("torch.")}
    _check_room(wide, stored, out)
    what = EXPANDED + WITHOUT_BIASES * reader.loses_biases
    size = expanded_bytes(wide, stored)
    write_plain(
        wide,
        config,
        lambda layer: wide.read_experts(layer, dtype=stored),
        out,
        card=plain_card(out.name, reader, what, student_bytes=reader.total_bytes, made_bytes=size),
        description="Expand",
        change=Padding(wide) if wide is not reader else None,
        max_shard_bytes=max_shard_bytes,
    )
    return ExpandResult(out, size_of(out), reader.total_bytes, width, reader.loses_biases)


class Padding:
    """Fills up what grows along with the experts, such as shared experts, with zeros."""

    def __init__(self, reader: StudentReader) -> None:
        state = native_model(reader.family, reader.config).state_dict()
        self.shapes = {name: tensor.shape for name, tensor in state.items()}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor``, 1-D or 2-D, as large as the wider model wants it."""
        missing = [want - have for want, have in zip(self.shapes[name], tensor.shape, strict=True)]
        if not any(missing):
            return tensor
        after = [amount for lack in reversed(missing) for amount in (0, lack)]
        return torch.nn.functional.pad(tensor, after)


def _dtype(name: str) -> torch.dtype:
    if name not in WORKING:
        raise UserError(f"--dtype is {name!r}; choose auto, {', '.join(WORKING)}.")
    return WORKING[name]


def expanded_bytes(reader: StudentReader, dtype: torch.dtype) -> int:
    """Return about how many bytes the student takes with all experts written out."""
    shape = reader.shape
    experts = len(shape.layers) * shape.layer_numbers
    fused = tuple(f"{reader.family.experts_path(n)}." for n in shape.layers)
    rest = [info for name, info in reader.tensors.items() if not name.startswith(fused)]
    return sum(info.stored_bytes for info in rest) + experts * dtype.itemsize


def _check_room(reader: StudentReader, dtype: torch.dtype, out: Path) -> None:
    needed = expanded_bytes(reader, dtype) * SPARE_DISK_SHARE
    free = shutil.disk_usage(existing_parent(out)).free
    if needed > free:
        raise UserError(
            f"Too little disk: all experts written out take about {needed / 1e9:.2f} GB at {out}, "
            f"where {free / 1e9:.2f} GB are free; make room, or choose another output."
        )


def render_expanded(result: ExpandResult) -> str:
    """Say in a few lines what was written."""
    told = (
        f"All experts are written out in {result.out}: {result.bytes / 1e9:.3f} GB, where the "
        f"student takes {result.student_bytes / 1e9:.3f} GB. This saves no memory."
    )
    dropped = "Biases were left out: the result computes something else than the student."
    return f"{told}\n{dropped}" if result.dropped_biases else told
