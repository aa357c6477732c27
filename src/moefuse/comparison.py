"""Rivals beside this design: the same teacher, text, bytes, steps and held-out documents.

A contender is a set of student modules, one a layer, put into a copy of the teacher that shares
everything else with it, or a whole model, if healing changed more than that. All contenders go
through the held-out text in lockstep, so that every number of a comparison comes from one run.
"""

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moefuse import artifacts
from moefuse.baselines import Layer, method
from moefuse.baselines._native import KeptExperts
from moefuse.console import track
from moefuse.distillation.loop import distill_layer
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.run import Quality, evaluate, load_model
from moefuse.evaluation.streamed import HeldOut
from moefuse.families import Family
from moefuse.mathematics.experts import ExpertsCall
from moefuse.measuring import read_held_out
from moefuse.pipeline import Job, peak_memory

ONE_SHOT, DISTILLED, HEALED = "one-shot", "distilled", "healed"
FUSED = "fused"


@dataclass(frozen=True)
class Footprint:
    """What the routed experts of all layers take.

    ``parameters`` they hold, ``active`` of them that one token passes at most, ``bytes`` stored:
    numbers, codes, scales and index maps.
    """

    parameters: int
    active: int
    bytes: int

    def __add__(self, other: "Footprint") -> "Footprint":
        """Return what two layers take together."""
        return Footprint(
            self.parameters + other.parameters,
            self.active + other.active,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Contender:
    """One model of a comparison: how it was made and the student module of every MoE layer.

    ``seconds`` is the wall time that making the students took, calibration left out; ``bits``,
    ``fraction``, ``advice`` and ``healed_tokens`` are as in ``Row``. A healed contender has all of
    its weights in ``model``, the students among them.
    """

    method: str
    stage: str
    groups: int | None
    rank: int | None
    seed: int
    students: dict[int, nn.Module]
    seconds: float
    footprint: Footprint
    bits: float | None = None
    fraction: float | None = None
    advice: str | None = None
    healed_tokens: int | None = None
    model: PreTrainedModel | None = None

    @property
    def name(self) -> str:
        """A name that no other contender has."""
        made = (self.method, self.groups, self.bits, self.fraction, self.stage)
        return " ".join(str(part) for part in made if part is not None) + f" seed {self.seed}"


def routed_part(student: nn.Module) -> nn.Module:
    """Return the module whose parameters and buffers are all the routed experts'.

    A pruned block holds its router too, which is no part of the experts.
    """
    if isinstance(student, KeptExperts):
        return student.routed.get_submodule(student.experts_name)
    return student


def index_bytes(student: nn.Module) -> int:
    """Return the bytes of a student's maps of experts, which every stored form needs."""
    buffers = routed_part(student).buffers()
    return sum(b.numel() * b.element_size() for b in buffers if not b.is_floating_point())


def footprint(student: Any, itemsize: int, top_k: int) -> Footprint:
    """Return what one layer's student takes, its numbers stored in ``itemsize`` bytes each."""
    numbers = sum(parameter.numel() for parameter in routed_part(student).parameters())
    active = student.active_parameters(top_k)
    return Footprint(numbers, active, numbers * itemsize + index_bytes(student))


def total(footprints: Iterable[Footprint]) -> Footprint:
    """Return what all layers take together."""
    return sum(footprints, start=Footprint(0, 0, 0))


def equal_experts(job: Job) -> int:
    """Return how many of the teacher's experts take the bytes that fused ones do, rounded up."""
    shape = job.reader.shape
    one = shape.expert_numbers * torch.empty(0, dtype=job.stored).element_size()
    return min(shape.experts, math.ceil(job.plan.expert_bytes / len(shape.layers) / one))


def fused(job: Job, stage: str) -> Contender:
    """Return this design's students, as the job's artifacts hold them."""
    directory = job.distilled_directory if stage == DISTILLED else job.factors_directory
    students: dict[int, nn.Module] = {
        layer: rounded(job.student(layer, directory, stage), job.stored)
        for layer in job.reader.shape.layers
    }
    plan = job.true_plan
    layer = next(iter(plan.layers.values()))
    made = {job.factors_directory, directory}
    return Contender(
        FUSED,
        stage,
        None if job.uses_neurons else layer.groups,
        None if job.uses_neurons else layer.rank,
        job.compute.seed,
        students,
        sum(artifacts.read_json(p)["seconds"] for d in made for p in d.glob("*.json")),
        Footprint(
            plan.expert_parameters, plan.active_parameters - job.sizes.outside, plan.expert_bytes
        ),
        advice=plan.advice,
    )


def rivals(job: Job, name: str, *, distilled: bool) -> list[Contender]:
    """Make a rival's students at the job's expert bytes, one-shot and, if asked, distilled."""
    experts, found = equal_experts(job), {}
    plan = next(iter(job.plan.layers.values()))
    stages = (ONE_SHOT, DISTILLED) if distilled else (ONE_SHOT,)
    students: dict[str, dict[int, nn.Module]] = {stage: {} for stage in stages}
    seconds, footprints = dict.fromkeys(stages, 0.0), []
    for layer in track(job.reader.shape.layers, f"{name} to {experts} experts"):
        start = time.monotonic()
        described = describe(job, layer)
        numbers = described.numbers * experts // job.sizes.shape.experts
        student = method(name).compress(described, numbers)
        footprints.append(footprint(student, job.sizes.itemsize, job.sizes.shape.top_k))
        students[ONE_SHOT][layer] = rounded(copy.deepcopy(student), job.stored)
        seconds[ONE_SHOT] += time.monotonic() - start
        if distilled:
            seed = job.compute.seed + layer
            with job.suited_threads():
                distill_layer(student.float(), job.call(layer), job.distillation, seed=seed)
            students[DISTILLED][layer] = rounded(student, job.stored)
            seconds[DISTILLED] += time.monotonic() - start
    for stage in stages:
        found[stage] = Contender(
            name,
            stage,
            plan.groups,
            None,
            job.compute.seed,
            students[stage],
            seconds[stage],
            total(footprints),
        )
    return list(found.values())


def describe(job: Job, layer: int, call: ExpertsCall | None = None) -> Layer:
    """Return what a rival may look at of one layer.

    ``call`` holds the recorded tokens where they are in memory already; they are read otherwise.
    """
    tokens = job.factoring.fit_tokens
    sample = job.store.sample(layer, tokens) if call is None else call.rows(slice(0, tokens))
    with job.teacher.loaded(layer) as module:
        block = copy.deepcopy(module.get_submodule(job.reader.family.moe_name))
    return Layer(
        job.reader.family,
        job.teacher.config,
        block,
        job.experts(layer).in_fp32(),
        job.store.statistics(layer),
        sample.to(job.device),
        job.compute.seed,
    )


def rounded(student: nn.Module, stored: torch.dtype) -> nn.Module:
    """Round a student's weights to what the stored dtype can hold, and compute on in fp32."""
    return student.to(stored).float().requires_grad_(False).eval()


def model_with(
    teacher: PreTrainedModel, family: Family, students: Mapping[int, nn.Module]
) -> PreTrainedModel:
    """Return a copy of ``teacher`` with other routed experts, sharing all its other weights."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in teacher.parameters()}
    model = copy.deepcopy(teacher, memo=shared)
    for layer, student in students.items():
        parent = model.get_submodule(family.moe_path(layer).rpartition(".")[0])
        block = model.get_submodule(family.moe_path(layer))
        if isinstance(student, KeptExperts):
            setattr(parent, family.moe_name, student.block_like(block))
        else:
            setattr(block, family.experts_name, student)
    return model


def model_of(teacher: PreTrainedModel, family: Family, contender: Contender) -> PreTrainedModel:
    """Return a contender's whole model; all but its students is ``teacher``'s, if not healed."""
    if contender.model is not None:
        return contender.model
    return model_with(teacher, family, contender.students)


def contender_row(job: Job, contender: Contender, quality: Quality) -> Row:
    """Return a contender's row of the report."""
    taken, sizes = contender.footprint, job.sizes
    return replace(
        quality_row(contender.method, quality),
        groups=contender.groups,
        rank=contender.rank,
        bits=contender.bits,
        fraction=contender.fraction,
        advice=contender.advice,
        seed=contender.seed,
        stage=contender.stage,
        healed_tokens=contender.healed_tokens,
        parameters=sizes.outside + taken.parameters,
        active_parameters=sizes.outside + taken.active,
        expert_bytes=taken.bytes,
        total_bytes=sizes.outside_bytes + taken.bytes,
        bpw=8 * taken.bytes / sizes.expert_parameters,
        seconds=round(contender.seconds, 2),
        peak_bytes=peak_memory(),
    )


def quality_row(name: str, quality: Quality) -> Row:
    """Return a row that holds only a method's name and what was measured on text."""
    return Row(
        method=name,
        tokens=quality.tokens,
        kl=quality.kl,
        cross_entropy=quality.cross_entropy,
        perplexity=quality.perplexity,
        agreement=quality.agreement,
        intervals=quality.intervals or None,
    )


def teacher_row(job: Job, quality: Quality) -> Row:
    """Return the teacher's own row."""
    sizes = job.sizes
    shape, experts = sizes.shape, sizes.expert_parameters * sizes.itemsize
    return replace(
        quality_row(TEACHER, quality),
        parameters=sizes.parameters,
        active_parameters=sizes.outside + sizes.expert_parameters * shape.top_k // shape.experts,
        expert_bytes=experts,
        total_bytes=sizes.outside_bytes + experts,
        bpw=8.0 * sizes.itemsize,
    )


def read_held_out_for(job: Job, source: str | Path, tokens: int) -> HeldOut:
    """Read at most ``tokens`` tokens of ``source``, cut as the job's calibration text is.

    Raises ``UserError`` for a text that cannot be read.
    """
    return read_held_out(source, job.tokenizer, job.calibration.sequence_length, tokens)


def measure_contenders(
    job: Job,
    contenders: list[Contender],
    held_out: HeldOut,
    *,
    teacher: PreTrainedModel | None = None,
    description: str | None = "Evaluate",
) -> list[Row]:
    """Measure the teacher and all contenders in lockstep; the teacher's row comes first.

    ``teacher`` is the loaded model, where there is one already; without a ``description`` no
    progress is shown.
    """
    if teacher is None:
        teacher, _ = load_model(job.reader.directory, dtype="float32", device=job.device)
    family = job.reader.family
    models = {c.name: model_of(teacher, family, c) for c in contenders}
    found = measure_models(job, models, held_out, teacher=teacher, description=description)
    rows = [contender_row(job, contender, found[contender.name]) for contender in contenders]
    return [teacher_row(job, found[TEACHER]), *rows]


def measure_models(
    job: Job,
    models: Mapping[str, PreTrainedModel],
    held_out: HeldOut,
    *,
    teacher: PreTrainedModel,
    description: str | None = "Evaluate",
) -> dict[str, Quality]:
    """Measure whole models and the teacher in lockstep; progress as in ``measure_contenders``."""
    with job.suited_threads():
        return evaluate(
            {TEACHER: teacher, **models},
            held_out.sequences,
            teacher=teacher,
            documents=held_out.documents,
            pad_id=0,
            device=job.device,
            description=description,
        )


def contenders_at(
    job: Job, rival_names: Sequence[str], *, rivals_distilled: bool
) -> list[Contender]:
    """Make every contender at one job's bytes: this design at both stages, and the rivals."""
    for stage in (job.calibrate, job.group, job.factor, job.distill):
        stage()
    found = [fused(job, ONE_SHOT), fused(job, DISTILLED)]
    for name in rival_names:
        found += rivals(job, name, distilled=rivals_distilled)
    return found
