"""The model card of a healed checkpoint: what healing did, and the student before it and after.

Both are measured as they are stored, in memory, on text that nothing learnt from. Where a teacher
cache stands for the teacher, the divergence from it is not known exactly and the card says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from moefuse import corpus
from moefuse.cards import CardRecord, Healed, Metrics, Text, metrics_of, with_stage
from moefuse.config import HealConfig, MeasureConfig
from moefuse.evaluation.quality import evaluate
from moefuse.evaluation.rows import TEACHER
from moefuse.evaluation.streamed import PAD_ID, HeldOut
from moefuse.measuring import read_held_out

HEALED = "healed"
MOST_TOKENS = MeasureConfig().held_out_tokens
LOSSES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "cross_entropy": "cross-entropy of the text",
    "hidden": "distance of hidden states",
}
"""What the weights of ``HealConfig`` weigh."""
PARTS = {
    "all": "everything",
    "experts": "the routed experts",
    "deltas": "the routed experts' deltas, scales and biases",
}
NO_KL = "not measured, because a teacher cache stood for the original"


def held_out_for(
    record: CardRecord, source: str | Path, tokenizer: PreTrainedTokenizerBase, length: int
) -> HeldOut:
    """Read the text to measure on; raises ``UserError``.

    Sequences are as long as those of the figures that ``record`` has, or ``length``: only figures
    on the very same text may stand beside each other.
    """
    if record.measured is not None and record.measured.data.sequence_length:
        length = record.measured.data.sequence_length
    return read_held_out(source, tokenizer, length, MOST_TOKENS)


@dataclass(frozen=True)
class Judge:
    """Measures stages of a student on ``held_out``; ``teacher`` is None where a cache stands for
    it. All models are on ``device``."""

    held_out: HeldOut
    teacher: nn.Module | None
    device: torch.device

    def measure(self, stage: str, model: nn.Module) -> tuple[Text, list[Metrics]]:
        """Return on what text what was measured: the teacher, if there is one, and ``stage``."""
        models = {stage: model} if self.teacher is None else {TEACHER: self.teacher, stage: model}
        found = evaluate(
            models,
            self.held_out.sequences,
            teacher=self.teacher,
            documents=self.held_out.documents,
            batch_size=self.held_out.batch_size(model.config.vocab_size),  # type: ignore[union-attr]
            pad_id=PAD_ID,
            device=self.device,
            description=f"Measure ({stage})",
        )
        tokens, documents = found[stage].tokens, found[stage].documents
        text = Text(self.held_out.name, tokens, documents, self.held_out.sequence_length)
        return text, [metrics_of(name, quality) for name, quality in found.items()]


def stage_before(record: CardRecord) -> str | None:
    """Return what a student's stage is called before healing; None for one that was healed."""
    if record.healed is not None:
        return None
    return "distilled" if record.distilled.steps else "one-shot"


def healed_record(
    record: CardRecord,
    name: str,
    healed: Healed,
    data: Text | None,
    stages: Sequence[Metrics],
) -> CardRecord:
    """Return the record of the healed checkpoint called ``name``.

    ``stages`` were measured on ``data``; without it the figures are those of before.
    """
    changed = replace(record, name=name, healed=healed)
    if data is None:
        return changed
    return replace(changed, measured=with_stage(record.measured, data, stages), unmeasured=None)


def healed_facts(
    options: HealConfig, data: Text, steps: int, rows: int, *, cached: str | None, compares: bool
) -> Healed:
    """Tell in words what healing did: ``rows`` a step; ``cached`` what a cache held, if one did.

    ``compares`` is whether the divergence from the teacher was measured.
    """
    rates = {"experts": options.expert_rate}
    if options.train == "all":
        rates["all else"] = options.rate
    details: dict[str, Any] = {
        "batches of": f"{rows:,} rows",
        "peak learning rate": ", ".join(f"{rate:g} ({part})" for part, rate in rates.items()),
    }
    if not compares:
        details["KL"] = NO_KL
    loss = loss_words(options) + (f" (from {cached})" if cached else "")
    return Healed(data, loss, trained_words(options), steps, details)


def loss_words(options: HealConfig) -> str:
    """Say what the loss was, such as "forward KL + 0.5 x reverse KL at temperature 1"."""
    weights = {words: getattr(options, name) for name, words in LOSSES.items()}
    terms = [
        words if weight == 1 else f"{weight:g} x {words}"
        for words, weight in weights.items()
        if weight
    ]
    heated = options.forward_kl or options.reverse_kl
    return " + ".join(terms) + (f" at temperature {options.temperature:g}" if heated else "")


def trained_words(options: HealConfig) -> str:
    """Say what was trained, such as "the routed experts and the router"."""
    words = PARTS[options.train]
    if options.train == "all":
        return words if options.trains_router else f"{words} but the router"
    return f"{words} and the router" if options.trains_router else words


def name_of(text: str) -> str:
    """Return what a card calls a text: no path of a machine has a place there."""
    name = corpus.source_name(text)
    return Path(name).name if Path(name).is_absolute() else name
