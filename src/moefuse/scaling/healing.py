"""How a student of a grid is healed: as all others are, but for tokens and seed."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from moefuse.arena.healing import Healing
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.trainer import remove_incomplete, train
from moefuse.scaling.grid import Student


def heal_student(
    healing: Healing,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    student: Student,
    directory: Path,
) -> None:
    """Train ``model`` in place by a complete schedule of the student's tokens.

    Both models are on the device, in fp32. The training's checkpoints lie in ``directory``;
    the same call after an interruption goes on from the last whole one.
    """
    remove_incomplete(directory)
    train(
        model,
        LiveTeacher(teacher, healing.family),
        healing.text(student.tokens, student.seed),
        healing.family,
        replace(healing.options, tokens=str(student.tokens)),
        directory=directory,
        seed=student.seed,
        device=healing.device,
        mixed=healing.mixed,
        description=f"Heal {student.name}",
    )
