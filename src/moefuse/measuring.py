"""Measuring a student for its model card: on which text, and with what left in the work directory.

The text is one that nothing was fitted to: what ``--held-out`` names, the bundled teacher's own, or
the documents that calibration left over.
"""

import shutil
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefuse import artifacts, corpus
from moefuse.cards import Measured, Text, metrics_of
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.config import CalibrateConfig
from moefuse.evaluation.quality import Quality
from moefuse.evaluation.rows import TEACHER
from moefuse.evaluation.streamed import HeldOut, Students, measure_streamed

LEAST_LEFT_OVER = 1024
"""Fewer tokens than these that calibration left over would tell little."""
LEFT_OVER = "documents after those calibrated on"
UNMEASURED = "no text was held out"
RESULT = "measured.json"


def read_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    wanted: CalibrateConfig,
    left_over_tokens: int,
) -> tuple[list[Tensor], HeldOut | None]:
    """Read the sequences to calibrate on, and as held-out text the documents after those.

    Sequences are 1-D int64 token ids. There is no held-out text where ``left_over_tokens``, the
    most it may have, or what is left is less than ``LEAST_LEFT_OVER``. Raises ``UserError`` for a
    text that cannot be used.
    """
    documents = corpus.load_documents(source)
    length = wanted.sequence_length
    windows = corpus.cut_documents(documents, tokenizer, length, limit_tokens=wanted.tokens)
    sequences = [window for document in windows.values() for window in document]
    corpus.check_enough(documents, sum(map(len, sequences)), length)
    if left_over_tokens < LEAST_LEFT_OVER:
        return sequences, None
    rest = documents[max(windows) + 1 :]
    cut = corpus.cut_documents(rest, tokenizer, length, limit_tokens=left_over_tokens)
    left_over = _held_out(source, list(cut.values()), length, LEFT_OVER)
    enough = sum(map(len, left_over.sequences)) >= LEAST_LEFT_OVER
    return sequences, left_over if enough else None


def read_held_out(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int, tokens: int
) -> HeldOut:
    """Read at most ``tokens`` tokens to measure on; raises ``UserError`` where there are none."""
    windows = corpus.tokenize_by_document(
        corpus.load_documents(source), tokenizer, sequence_length, limit_tokens=tokens
    )
    return _held_out(source, windows, sequence_length)


def _held_out(
    source: str | Path, windows: list[list[Tensor]], sequence_length: int, note: str = ""
) -> HeldOut:
    return HeldOut(
        corpus.source_name(source),
        [window for document in windows for window in document],
        [number for number, document in enumerate(windows) for _ in document],
        sequence_length,
        note,
    )


def measure_student(
    teacher: StreamedTeacher,
    students: Students,
    held_out: HeldOut,
    stage: str,
    *,
    teacher_directory: Path,
    directory: Path,
) -> Measured:
    """Measure a student's ``stage`` beside its teacher, once: the result stays in ``directory``.

    The teacher's hidden states stay in ``teacher_directory``, for other students; those of the
    student go. Raises ``UserError`` for logits that are no numbers.
    """
    result, passed = directory / RESULT, directory / "passed"
    if not result.exists():
        original, student = measure_streamed(
            teacher,
            students,
            held_out,
            teacher_directory=teacher_directory,
            student_directory=passed,
        )
        measured = measured_of(held_out, original, {stage: student})
        artifacts.write_json(result, measured.to_json())
    shutil.rmtree(passed, ignore_errors=True)
    return Measured.from_json(artifacts.read_json(result))


def measured_of(held_out: HeldOut, teacher: Quality, stages: dict[str, Quality]) -> Measured:
    """Return what a card tells of figures on ``held_out``, the teacher's first."""
    text = Text(held_out.name, teacher.tokens, teacher.documents, held_out.sequence_length)
    figures = {TEACHER: teacher, **stages}
    return Measured(text, tuple(metrics_of(*item) for item in figures.items()), held_out.note)
