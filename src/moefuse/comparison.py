"""Rivals beside this design: the same teacher, text, bytes, steps and held-out documents.

A contender is a set of student modules, one a layer, put into a copy of the teacher that shares
everything else with it. All contenders go through the held-out text in lockstep, so that every
number of a comparison comes from one run.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefuse import artifacts, corpus
from moefuse.baselines import Layer, method
from moefuse.baselines._native import KeptExperts
from moefuse.console import track
from moefuse.distillation.loop import distill_layer
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.run import Quality, evaluate, load_model
from moefuse.families import Family
from moefuse.pipeline import Job, peak_memory

ONE_SHOT, DISTILLED = "one-shot", "distilled"
FUSED = "fused"


@dataclass(frozen=True)
class Contender:
    """One model of a comparison: how it was made and the student module of every MoE layer.

    ``seconds`` is the wall time that making the students took, calibration left out.
    """

    method: str
    stage: str
    groups: int
    rank: int | None
    seed: int
    students: dict[int, nn.Module]
    seconds: float

    @property
    def name(self) -> str:
        """A name that no other contender has."""
        return f"{self.method} {self.groups} {self.stage} seed {self.seed}"

    @property
    def expert_parameters(self) -> int:
        """Numbers that the routed experts hold."""
        return sum(_expert_parameters(student) for student in self.students.values())


def _expert_parameters(student: nn.Module) -> int:
    trained = student.named_parameters()
    return sum(p.numel() for name, p in trained if ".gate." not in name)


def equal_experts(job: Job) -> int:
    """Return how many of the teacher's experts take the bytes that fused ones do, rounded up."""
    shape = job.reader.shape
    one = 3 * shape.hidden * shape.intermediate * torch.empty(0, dtype=job.stored).element_size()
    return min(shape.experts, math.ceil(job.plan.expert_bytes / len(shape.layers) / one))


def fused(job: Job, stage: str) -> Contender:
    """Return this design's students, as the job's artifacts hold them."""
    directory = job.distilled_directory if stage == DISTILLED else job.factors_directory
    students: dict[int, nn.Module] = {
        layer: rounded(job.student(layer, directory, stage), job.stored)
        for layer in job.reader.shape.layers
    }
    plan = next(iter(job.plan.layers.values()))
    made = {job.factors_directory, directory}
    seconds = sum(artifacts.read_json(p)["seconds"] for d in made for p in d.glob("*.json"))
    return Contender(FUSED, stage, plan.groups, plan.rank, job.compute.seed, students, seconds)


def rivals(job: Job, name: str, *, distilled: bool) -> list[Contender]:
    """Make a rival's students at the job's expert bytes, one-shot and, if asked, distilled."""
    experts, found = equal_experts(job), {}
    plan = next(iter(job.plan.layers.values()))
    stages = (ONE_SHOT, DISTILLED) if distilled else (ONE_SHOT,)
    students: dict[str, dict[int, nn.Module]] = {stage: {} for stage in stages}
    seconds = dict.fromkeys(stages, 0.0)
    for layer in track(job.reader.shape.layers, f"{name} to {experts} experts"):
        start = time.monotonic()
        student = compress(job, layer, name, experts)
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
            name, stage, plan.groups, None, job.compute.seed, students[stage], seconds[stage]
        )
    return list(found.values())


def compress(job: Job, layer: int, name: str, experts: int) -> nn.Module:
    """Compress one layer to ``experts`` experts by the rival method ``name``."""
    with job.teacher.loaded(layer) as module:
        block = copy.deepcopy(module.get_submodule(job.reader.family.moe_name))
    described = Layer(
        job.reader.family,
        job.teacher.config,
        block,
        job.experts(layer),
        job.store.statistics(layer),
        job.store.sample(layer, job.factoring.fit_tokens).to(job.device),
        job.compute.seed,
    )
    return method(name).compress(described, described.numbers * experts // job.sizes.shape.experts)


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


def contender_row(job: Job, contender: Contender, quality: Quality) -> Row:
    """Return a contender's row of the report."""
    itemsize = torch.empty(0, dtype=job.stored).element_size()
    experts = contender.expert_parameters
    buffers = sum(_buffer_bytes(student) for student in contender.students.values())
    row = quality_row(contender.method, quality)
    return replace(
        row,
        groups=contender.groups,
        rank=contender.rank,
        seed=contender.seed,
        stage=contender.stage,
        parameters=job.sizes.outside + experts,
        expert_bytes=experts * itemsize + buffers,
        total_bytes=job.sizes.outside_bytes + experts * itemsize + buffers,
        seconds=round(contender.seconds, 2),
        peak_bytes=peak_memory(),
    )


def _buffer_bytes(student: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for b in student.buffers() if not b.is_floating_point())


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
    experts = sizes.expert_parameters * sizes.itemsize
    return replace(
        quality_row(TEACHER, quality),
        parameters=sizes.parameters,
        expert_bytes=experts,
        total_bytes=sizes.outside_bytes + experts,
    )


@dataclass(frozen=True)
class HeldOut:
    """Text that nothing was fitted to: ``sequences`` of token ids, 1-D int64, and of which
    document each is."""

    source: str
    sequences: list[Tensor]
    documents: list[int]

    @classmethod
    def read(cls, source: Path, job: Job, tokens: int) -> "HeldOut":
        """Read at most ``tokens`` tokens of ``source``, cut as the job's calibration text is."""
        windows = corpus.tokenize_by_document(
            corpus.load_documents(source),
            job.tokenizer,
            job.calibration.sequence_length,
            limit_tokens=tokens,
        )
        sequences = [window for document in windows for window in document]
        documents = [number for number, document in enumerate(windows) for _ in document]
        return cls(source.name, sequences, documents)

    def to_json(self) -> dict[str, Any]:
        """Say which text this is, without where it lies."""
        tokens = [sequence.tolist() for sequence in self.sequences]
        return {
            "name": self.source,
            "documents": len(set(self.documents)),
            "tokens": sum(len(sequence) for sequence in tokens),
            "fingerprint": artifacts.fingerprint(tokens),
        }


def measure_contenders(job: Job, contenders: list[Contender], held_out: HeldOut) -> list[Row]:
    """Measure the teacher and all contenders in lockstep; the teacher's row comes first."""
    teacher, _ = load_model(job.reader.directory, dtype="float32", device=job.device)
    family = job.reader.family
    models = {c.name: model_with(teacher, family, c.students) for c in contenders}
    with job.suited_threads():
        found = evaluate(
            {TEACHER: teacher, **models},
            held_out.sequences,
            teacher=teacher,
            documents=held_out.documents,
            pad_id=0,
            device=job.device,
            description="Evaluate",
        )
    rows = [contender_row(job, contender, found[contender.name]) for contender in contenders]
    return [teacher_row(job, found[TEACHER]), *rows]


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
