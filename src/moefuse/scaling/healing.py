"""How the students of a grid are healed: all alike, but for tokens and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse import artifacts, corpus
from moefuse.config import HealConfig, build
from moefuse.corpus import Document
from moefuse.families import Family
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.text import pack
from moefuse.healing.trainer import remove_incomplete, train
from moefuse.pipeline import Job
from moefuse.scaling.grid import Student

NO_MATTER = ("data", "tokens", "report_to", "logging_steps", "eval_steps")
"""Settings that figures do not depend on, or that every student has of its own."""


@dataclass(frozen=True)
class Healing:
    """What all students are healed with."""

    options: HealConfig
    documents: Sequence[Document]
    tokenizer: PreTrainedTokenizerBase
    family: Family
    device: str

    @property
    def mixed(self) -> bool:
        """Whether bf16 is computed in around fp32 weights."""
        return self.device.startswith("cuda")

    def settings(self) -> dict[str, Any]:
        """Return all that figures depend on besides the student, as JSON values."""
        chosen = {k: v for k, v in asdict(self.options).items() if k not in NO_MATTER}
        text = [[document.text, document.messages] for document in self.documents]
        return {**chosen, "mixed": self.mixed, "text": artifacts.fingerprint(text)}

    def heal(
        self, model: PreTrainedModel, teacher: PreTrainedModel, student: Student, directory: Path
    ) -> None:
        """Train ``model`` in place by a complete schedule of the student's tokens.

        Both models are on the device, in fp32. The training's checkpoints lie in ``directory``;
        the same call after an interruption goes on from the last whole one.
        """
        text = pack(
            self.documents,
            self.tokenizer,
            self.options.sequence_length,
            tokens=student.tokens,
            seed=student.seed,
        )
        remove_incomplete(directory)
        train(
            model,
            LiveTeacher(teacher),
            text,
            self.family,
            replace(self.options, tokens=str(student.tokens)),
            directory=directory,
            seed=student.seed,
            device=self.device,
            mixed=self.mixed,
            description=f"Heal {student.name}",
        )


def healing_of(job: Job, values: Mapping[str, Any]) -> Healing:
    """Read how students are healed; ``values`` are settings by name (see ``HealConfig``).

    Without ``data`` they are healed on the job's calibration text. Raises ``UserError`` for a text
    that cannot be read and for settings that make no sense.
    """
    options = build(HealConfig, values)
    documents = corpus.load_documents(options.data or job.data)
    return Healing(options, documents, job.tokenizer, job.reader.family, job.device)
