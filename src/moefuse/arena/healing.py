"""The third stage of a comparison: every contender healed alike from its distilled state.

All train on the same rows of the same text in the same order, for as many steps at the same rates;
what is rounded to few bits in distillation is so here too. What is measured afterwards is what
would be stored: codes and scales at the same bits, all else in the dtypes it had.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse import corpus
from moefuse.arena.lowbit import RoundedStudent, round_to
from moefuse.artifacts import fingerprint
from moefuse.baselines._native import KeptExperts
from moefuse.comparison import HEALED, Contender, model_with, routed_part
from moefuse.config import HealConfig, build, parse_count
from moefuse.corpus import Document
from moefuse.families import Family
from moefuse.heal import heal_in_place
from moefuse.healing.text import PackedText, pack
from moefuse.pipeline import Job

NO_MATTER = ("data", "tokens", "report_to", "logging_steps", "eval_steps")
"""Settings that figures do not depend on, or that not all students share."""


@dataclass(frozen=True)
class Healing:
    """What all students are healed with; ``mixed`` computes in bf16 around fp32 weights."""

    options: HealConfig
    documents: Sequence[Document]
    tokenizer: PreTrainedTokenizerBase
    family: Family
    device: str
    mixed: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the options say."""
        return parse_count(self.options.tokens, "--tokens")

    def settings(self) -> dict[str, Any]:
        """Return all that figures depend on besides student and tokens, as JSON values."""
        chosen = {k: v for k, v in asdict(self.options).items() if k not in NO_MATTER}
        text = [[document.text, document.messages] for document in self.documents]
        return {**chosen, "mixed": self.mixed, "text": fingerprint(text)}

    def text(self, tokens: int, seed: int) -> PackedText:
        """Pack the text that students of one ``seed`` are healed on."""
        length = self.options.sequence_length
        apart = self.family.one_piece_a_row
        return pack(self.documents, self.tokenizer, length, tokens=tokens, seed=seed, apart=apart)


def healing_of(job: Job, values: Mapping[str, Any], *, mixed: bool = False) -> Healing:
    """Read how students are healed; ``values`` are settings by name (see ``HealConfig``).

    Without ``data`` they are healed on the job's calibration text. Raises ``UserError`` for a text
    that cannot be read and for settings that make no sense.
    """
    options = build(HealConfig, values)
    documents = corpus.load_documents(options.data or job.data)
    return Healing(options, documents, job.tokenizer, job.reader.family, job.device, mixed)


@dataclass(frozen=True)
class Trainable:
    """One layer's distilled student in the form in which it is trained.

    ``finish`` makes of it a module with the very numbers that are stored, fp32.
    """

    module: nn.Module
    finish: Callable[[Any], nn.Module]

    def placed(self) -> "Trainable":
        """Return a copy that can stand in a whole model.

        A pruned block has a router of its own, which must not hide in what rounds its experts.
        """
        module = copy.deepcopy(self.module)
        if not (isinstance(module, RoundedStudent) and isinstance(module.student, KeptExperts)):
            return Trainable(module, self.finish)
        kept, rounding = module.student, module.of_experts()
        kept.put_experts(rounding)

        def finish(block: KeptExperts) -> nn.Module:
            block.put_experts(rounding.finished())
            return block

        return Trainable(kept, finish)


def healed(
    job: Job,
    healing: Healing,
    teacher: PreTrainedModel,
    distilled: Contender,
    trainable: Mapping[int, Trainable],
) -> Contender:
    """Return ``distilled`` as healing makes it: all weights of the whole model trained.

    ``trainable`` are its students by layer; they and ``teacher`` stay as they are.
    """
    start = time.monotonic()
    base = copy.deepcopy(teacher)
    placed = {layer: student.placed() for layer, student in trainable.items()}
    model = model_with(base, healing.family, {n: s.module for n, s in placed.items()})
    with job.suited_threads():
        heal_in_place(
            model,
            teacher,
            healing.text(healing.tokens, distilled.seed),
            healing.family,
            healing.options,
            seed=distilled.seed,
            device=healing.device,
            mixed=healing.mixed,
            description=f"Heal {distilled.name}",
        )
    students = {layer: student.finish(student.module) for layer, student in placed.items()}
    # Shares with base what was trained there; finished students may be other modules.
    stored = model_with(base, healing.family, students)
    experts = {id(p) for student in students.values() for p in routed_part(student).parameters()}
    round_to((p for p in stored.parameters() if id(p) not in experts), job.stored)
    return replace(
        distilled,
        stage=HEALED,
        students=students,
        seconds=distilled.seconds + time.monotonic() - start,
        healed_tokens=healing.tokens,
        model=stored.requires_grad_(False).eval(),
    )
