"""Model cards of checkpoints: what is known of a student as a record, and the files made from it.

A stage that changes a checkpoint reads its record, adds what it did and measured, and writes the
card anew::

    record = read_record(student)
    healed = replace(record, name=out.name, healed=Healed(...), measured=with_stage(...))
    write_card(out, healed)
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moefuse import artifacts
from moefuse.checkpoint.headers import CARD
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.evaluation.quality import Quality
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.stage_plot import stage_plot
from moefuse.export.card import render_card
from moefuse.export.original import original_of
from moefuse.export.record import (
    PLOT,
    CardRecord,
    Distilled,
    Form,
    Healed,
    Measured,
    Metrics,
    Size,
    Text,
    read_record,
    save_record,
)
from moefuse.fusion.plan import Teacher
from moefuse.sizes import Plan

__all__ = [
    "CardRecord",
    "Distilled",
    "Healed",
    "Measured",
    "Metrics",
    "Text",
    "metrics_of",
    "read_record",
    "student_record",
    "with_stage",
    "write_card",
]


def write_card(directory: Path, record: CardRecord) -> None:
    """Write ``record`` into a checkpoint, and the card and its plot made of it.

    Each file is written whole or not at all; the same record gives the same bytes. Without a KL
    there is no plot, and one of before is removed.
    """
    text = render_card(record)
    save_record(directory, record)
    if record.measured is not None and record.measured.has_kl:
        stages = record.measured.stages
        stage_plot([_row(stage) for stage in stages if stage.stage != TEACHER], directory / PLOT)
    else:
        (directory / PLOT).unlink(missing_ok=True)
    artifacts.write_text(directory / CARD, text)


def _row(metrics: Metrics) -> Row:
    return Row(
        method="student",
        stage=metrics.stage,
        kl=metrics.kl,
        agreement=metrics.agreement,
        intervals=metrics.intervals,
    )


def student_record(
    name: str,
    reader: CheckpointReader,
    sizes: Teacher,
    plan: Plan,
    *,
    calibrated: Text,
    distilled: Distilled,
    multiplexed: str | None = None,
    measured: Measured | None = None,
    unmeasured: str | None = None,
) -> CardRecord:
    """Return what there is to tell of a student called ``name`` that nothing has healed yet.

    ``multiplexed`` says how experts were multiplexed, where they were.
    ``unmeasured`` says in a sentence why there is no ``measured``.
    """
    shape, experts = sizes.shape, sizes.expert_parameters * sizes.itemsize
    return CardRecord(
        name=name,
        base=original_of(reader),
        form=replace(_form(sizes, plan), multiplexed=multiplexed),
        original=Size(
            parameters=sizes.parameters,
            active_parameters=sizes.outside
            + sizes.expert_parameters * shape.top_k // shape.experts,
            expert_bytes=experts,
            bytes=sizes.outside_bytes + experts,
        ),
        student=Size(
            parameters=plan.parameters,
            active_parameters=plan.active_parameters,
            expert_bytes=plan.expert_bytes,
            bytes=plan.bytes,
        ),
        calibrated=calibrated,
        distilled=distilled,
        measured=measured,
        unmeasured=unmeasured,
    )


def _form(sizes: Teacher, plan: Plan) -> Form:
    layers = list(plan.layers.values())
    form = Form(sizes.shape.experts, sizes.shape.top_k, len(layers))
    if layers[0].neurons is None:
        return replace(form, groups=layers[0].groups, rank=layers[0].rank)
    neurons = Counter[str]()
    for layer in layers:
        neurons.update(layer.neurons)
    return replace(
        form,
        neurons=dict(sorted(neurons.items(), key=lambda item: float(item[0]))),
        shared=max(layer.shared for layer in layers),
        kept=plan.neurons_kept,
        mean_bits=plan.mean_bits,
        energy_lost=plan.energy_lost,
        advice=plan.advice,
    )


def metrics_of(stage: str, quality: Quality) -> Metrics:
    """Return what was measured of a ``stage``; figures that are infinite are left out."""
    is_teacher = stage == TEACHER
    finite = {
        name: interval
        for name, interval in quality.intervals.items()
        if all(map(math.isfinite, interval))
    }
    return Metrics(
        stage=stage,
        cross_entropy=quality.cross_entropy,
        perplexity=quality.perplexity if math.isfinite(quality.perplexity) else None,
        kl=None if is_teacher else quality.kl,
        agreement=None if is_teacher else quality.agreement,
        intervals={n: i for n, i in finite.items() if not is_teacher or n not in AGAINST_TEACHER},
    )


AGAINST_TEACHER = ("kl", "agreement")


def with_stage(measured: Measured | None, data: Text, stages: Iterable[Metrics]) -> Measured:
    """Return figures with ``stages`` in the place of older ones of their name, or after them.

    Figures on another text than ``data`` cannot stand beside these and are dropped.
    """
    older = measured.stages if measured is not None and measured.data == data else ()
    newer = {stage.stage: stage for stage in stages}
    kept = [newer.pop(stage.stage, stage) for stage in older]
    note = measured.note if measured is not None and older else ""
    return Measured(data, (*kept, *newer.values()), note)
