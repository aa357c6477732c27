"""Streaming a student whose experts no ordinary ones compute: as they are, in its own modules."""

import torch
from torch import Tensor

from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.export.student_reader import StudentReader
from moefuse.modeling.modeling_moefuse import gating_of
from moefuse.sizes import make_experts


class StreamedStudent(StreamedTeacher):
    """A student read layer by layer; where a plain one has experts, it has its fused modules."""

    reader: StudentReader

    def __init__(self, reader: StudentReader, *, device: str, dtype: torch.dtype) -> None:
        super().__init__(reader, device=device, dtype=dtype)
        family = reader.family
        for layer in reader.shape.layers:
            block = self.layers[layer].get_submodule(family.moe_name)
            native = getattr(block, family.experts_name)
            gating = gating_of(native, family.gating(reader.config))
            module = make_experts(reader.shape, reader.plans[layer], "meta", gating)
            setattr(block, family.experts_name, module.to(dtype).eval().requires_grad_(False))

    def _experts_state(self, layer: int) -> dict[str, Tensor]:
        return self.reader.module(layer).state_dict()


def stream(reader: StudentReader, *, device: str, dtype: torch.dtype) -> StreamedTeacher:
    """Return a student as a teacher: of written-out experts, or as it is where it has none such."""
    kind = StreamedStudent if reader.is_multiplexed else StreamedTeacher
    return kind(reader, device=device, dtype=dtype)
