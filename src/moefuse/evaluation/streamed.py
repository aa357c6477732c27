"""Measuring a student against a teacher when neither need fit in memory.

The text passes through the decoder layers one by one, each in memory only while it is used: once
as the teacher's and once with the student's modules in the place of the routed experts. Both
paths' last hidden states stay on disk, and the logits of both come of them batch by batch, through
the head that teacher and student share; so KL is exact, and the peak is that of calibration. A
student that is loaded whole, healed ones for instance, is measured beside ``Remembered``.

The teacher's path is the same for every student, and its states serve them all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefuse import artifacts
from moefuse.checkpoint.passed import OnDisk
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.console import track
from moefuse.corpus import batches
from moefuse.evaluation.quality import Quality, evaluate
from moefuse.evaluation.rows import TEACHER

LOGITS_AT_ONCE = 1 << 27
"""How many logits of one model are held at once (512 MiB of them in fp32)."""
MOST_SEQUENCES = 8
PAD_ID = 0
"""Any token does: what stands in padding is never looked at."""
STUDENT = "student"
HIDDEN = "hidden"

Students = Callable[[int], nn.Module]
"""Makes the module that takes the place of a layer's routed experts, on the teacher's device and in
its dtype."""


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing was fitted to.

    ``sequences`` of at most ``sequence_length`` token ids, 1-D int64, and of which document each
    is. ``note`` says which part of ``name`` this is, where it is not simply its beginning.
    """

    name: str
    sequences: Sequence[Tensor]
    documents: Sequence[int]
    sequence_length: int
    note: str = ""

    def batch_size(self, vocabulary: int) -> int:
        """Return how many sequences go at once, so that a batch's logits fit in memory."""
        logits = self.sequence_length * vocabulary
        return max(1, min(MOST_SEQUENCES, LOGITS_AT_ONCE // logits))

    def to_json(self) -> dict[str, Any]:
        """Say which text this is, without where it lies."""
        tokens = [sequence.tolist() for sequence in self.sequences]
        return {
            "name": self.name,
            "documents": len(set(self.documents)),
            "tokens": sum(len(sequence) for sequence in tokens),
            "fingerprint": artifacts.fingerprint(tokens),
        }


@dataclass(frozen=True)
class Remembered:
    """A model by the last hidden states that it left in ``passed``, for ``evaluate``."""

    head: nn.Module
    passed: OnDisk
    device: torch.device

    def __call__(self, number: int, *_: Tensor) -> Tensor:
        """Return the logits of a batch, (B, S, V), on ``device``."""
        return self.head(self.passed.entering(number)[HIDDEN].to(self.device))


@contextmanager
def remembered(
    teacher: StreamedTeacher, held_out: HeldOut, directory: Path
) -> Iterator[Remembered]:
    """Hold the teacher by its last hidden states over ``held_out``, kept in ``directory``.

    Give it to ``evaluate`` with the sequences of ``held_out`` and its ``batch_size``.
    """
    passed = pass_through(teacher, held_out, directory, "Measure the teacher")
    with teacher.head() as head:
        yield Remembered(head, passed, teacher.device)


def pass_through(
    teacher: StreamedTeacher,
    held_out: HeldOut,
    directory: Path,
    description: str,
    students: Students | None = None,
) -> OnDisk:
    """Leave in ``directory`` what enters the head: the teacher's, or with ``students`` a student's.

    An interrupted call goes on from the last finished layer, and one for the same model and text
    finds everything there.
    """
    passed = OnDisk(directory)
    size = held_out.batch_size(teacher.config.vocab_size)
    text = list(batches(held_out.sequences, size, PAD_ID))
    while passed.layer < len(teacher.layers):
        layer = passed.layer
        with _layer(teacher, layer, students) as module:
            for number, batch in enumerate(track(text, f"{description}, layer {layer}")):
                embedded_BSD, received = teacher.embed(*batch)
                entering_BSD = passed.entering(number)[HIDDEN] if layer else embedded_BSD
                left_BSD = teacher.forward_layer(module, entering_BSD, received[layer])
                passed.leave(number, {HIDDEN: left_BSD})
        passed.advance()
    return passed


@contextmanager
def _layer(teacher: StreamedTeacher, layer: int, students: Students | None) -> Iterator[nn.Module]:
    """Hold a decoder layer, with a student in the place of its routed experts if there is one."""
    family = teacher.reader.family
    with teacher.loaded(layer) as module:
        if students is None or layer not in teacher.reader.shape.layers:
            yield module
            return
        block = module.get_submodule(family.moe_name)
        own = getattr(block, family.experts_name)
        setattr(block, family.experts_name, students(layer))
        try:
            yield module
        finally:
            setattr(block, family.experts_name, own)


def measure_streamed(
    teacher: StreamedTeacher,
    students: Students,
    held_out: HeldOut,
    *,
    teacher_directory: Path,
    student_directory: Path,
) -> tuple[Quality, Quality]:
    """Measure the teacher and the student that has ``students`` for experts; in this order.

    Hidden states are left in the two directories. Raises ``UserError`` for logits that are no
    numbers.
    """
    passed = pass_through(teacher, held_out, student_directory, "Measure the student", students)
    with remembered(teacher, held_out, teacher_directory) as original:
        found = evaluate(
            {TEACHER: original, STUDENT: replace(original, passed=passed)},
            held_out.sequences,
            teacher=original,
            documents=held_out.documents,
            batch_size=held_out.batch_size(teacher.config.vocab_size),
            pad_id=PAD_ID,
            device=teacher.device,
            description="Measure",
        )
    return found[TEACHER], found[STUDENT]
