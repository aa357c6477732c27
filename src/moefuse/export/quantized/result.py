"""What quantising a student came to, and how it is told on the screen and in the card."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefuse.export.quantized.deltas import PLAIN_BITS

UNUSED = "It was of no use: what was rounded does not go by text, and nothing was learnt."


@dataclass(frozen=True)
class Seen:
    """How many calibration tokens reach a base, and how many an expert: medians and the least."""

    base_median: float
    base_least: int
    expert_median: float
    expert_least: int


@dataclass(frozen=True)
class Refit:
    """How layers made up for rounding in ``steps`` each: ``improved`` of ``layers`` did.

    ``learnt`` are words for what of a layer learns. ``before`` and ``after`` are means over layers
    of the relative error (see ``mathematics.losses``) of a layer's output against the plain
    student's, on tokens held back.
    """

    steps: int
    learnt: str
    layers: int
    improved: int
    before: float
    after: float


@dataclass(frozen=True)
class Predictions:
    """How layers learnt predictions in ``steps``; ``learnt`` are words for what of them.

    ``before`` and ``after`` are KL(student || quantised student), nats a token, on ``sequences`` of
    the text that they learnt from.
    """

    steps: int
    learnt: str
    sequences: int
    before: float
    after: float


@dataclass(frozen=True)
class QuantizeResult:
    """Where the checkpoint is and what it takes.

    ``delta_bits`` are those of a number of deltas, "16" where they stay as they were, None where
    there are none. ``bits`` are those of a number of the routed experts, deltas and scales
    included, ``teacher_bits`` the same bytes over the numbers of the teacher's, ``base_bits``
    those of a number of what was rounded, with its scales. ``tokens`` of text were used; without
    text it is 0, and ``seen``, ``refit`` and ``predictions`` are None.
    """

    out: Path
    scheme: str
    what: str
    bytes: int
    student_bytes: int
    delta_bits: str | None
    bits: float
    teacher_bits: float
    base_bits: float
    tokens: int
    weighed: bool
    """Whether rounding itself went by the text, not only what was learnt after it."""
    seen: Seen | None
    refit: Refit | None
    predictions: Predictions | None

    @property
    def used_text(self) -> bool:
        """Whether anything went by the text."""
        return self.weighed or self.refit is not None or self.predictions is not None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def deltas_told(result: QuantizeResult) -> str:
    """Say how deltas are stored, in a sentence; "" where there are none."""
    if result.delta_bits is None:
        return ""
    if result.delta_bits == PLAIN_BITS:
        return "Deltas stay as they were."
    return (
        f"Deltas take {result.delta_bits} bits a number, in moefuse's own packed form: codes, a "
        "codebook for each of a layer's four factors, and a scale for each row of a factor."
    )


def learning_told(result: QuantizeResult) -> list[str]:
    """Say what was learnt after rounding, a sentence or two for each way."""
    told = []
    if result.refit is not None:
        told.append(_refit_told(result.refit))
    if result.predictions is not None:
        told.append(_predictions_told(result.predictions))
    return told or ["Nothing was learnt after rounding."]


def _refit_told(refit: Refit) -> str:
    told = (
        f"Every layer of experts learnt for {refit.steps} steps to return on the text what it "
        f"returned before rounding; what learnt are {refit.learnt}. The relative error of its "
        f"output went from {refit.before:.5f} to {refit.after:.5f} (mean of {refit.layers} layers, "
        "on tokens held back)."
    )
    if refit.improved == refit.layers:
        return told
    return (
        f"{told} {refit.layers - refit.improved} of these layers did not improve and stayed as "
        "they were rounded."
    )


def _predictions_told(predictions: Predictions) -> str:
    gained = predictions.after < predictions.before
    return (
        f"By {predictions.steps} steps over the whole model, {predictions.learnt} learnt to "
        "predict what the student predicted before rounding. KL(student || this) went from "
        f"{predictions.before:.5f} to {predictions.after:.5f} nats a token on "
        f"{predictions.sequences} sequences of the text that they learnt from"
        f"{'' if gained else ', no gain by this measure'}; 'moefuse eval' measures it on other "
        "text."
    )


def render_quantized(result: QuantizeResult) -> str:
    """Say in a few lines what was written."""
    lines = [
        f"{result.out}: {result.scheme}; {result.bytes / 1e6:.2f} MB, where the student takes "
        f"{result.student_bytes / 1e6:.2f} MB.",
        f"A number of the routed experts takes {result.bits:.2f} bits, deltas included "
        f"({result.teacher_bits:.2f} for each of the teacher's); one that was rounded "
        f"{result.base_bits:.2f}, scales included.",
        *filter(None, [deltas_told(result)]),
    ]
    if result.tokens:
        use = "" if result.used_text else f" {UNUSED}"
        lines.append(f"Text: {result.tokens:,} tokens.{_seen_told(result.seen)}{use}")
    return "\n".join([*lines, *learning_told(result)])


def _seen_told(seen: Seen | None) -> str:
    if seen is None:
        return ""
    return (
        f" A base sees {seen.base_median:.0f} of them (least {seen.base_least}), an expert of its "
        f"own {seen.expert_median:.0f} (least {seen.expert_least}); medians."
    )
