"""The students of one cell: made within the budget, distilled, and rounded to what is stored."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from moefuse.arena.bench import Bench, alone
from moefuse.arena.cells import AFTER, FUSED_BF16, OURS, WHOLE, Cell
from moefuse.arena.lowbit import (
    RoundedStudent,
    bits_per_number,
    numbers_bytes,
    round_to,
    student_bytes,
)
from moefuse.baselines import Layer, TooSmallError, method
from moefuse.comparison import (
    DISTILLED,
    ONE_SHOT,
    Contender,
    Footprint,
    describe,
    fused,
    routed_part,
    total,
)
from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.distillation.own_inputs import InMemory
from moefuse.errors import UserError
from moefuse.pipeline import Job

FULL_RATE_BITS = 8
"""From so many bits on, matrices that are rounded while they are trained learn at the full rate.

Pruned to 1/8 of the bytes (bundled teacher, 120 steps, seed 0), KL at rates of 1e-4, 3e-4, 1e-3
and 2e-3: 2 bits 0.150, 0.147, 0.155, 0.192 (0.174 one-shot), 4 bits 0.359, 0.323, 0.312, 0.338.
"""


def make_contenders(bench: Bench, cell: Cell) -> list[Contender]:
    """Make a cell's students at every stage; raises ``TooSmallError`` where none fits."""
    return _ours(bench, cell) if cell.method in OURS else _rivals(bench, cell)


def _ours(bench: Bench, cell: Cell) -> list[Contender]:
    """Make this design's students by the stages of its own job."""
    teacher_bits = 8 * bench.job.sizes.itemsize
    size: dict[str, Any] = {"expert_bits": teacher_bits * (cell.fraction or 1.0)}
    if cell.method == FUSED_BF16:
        size["bits"] = "16"
    job = bench.job_for({**size, "seed": cell.seed})
    try:
        _ = job.plan
    except UserError as error:
        raise TooSmallError(str(error)) from error
    run_stages(job)
    stages = (ONE_SHOT, DISTILLED) if job.distillation.steps else (ONE_SHOT,)
    return [
        replace(fused(job, stage), method=cell.method, bits=cell.bits, fraction=cell.fraction)
        for stage in stages
    ]


def run_stages(job: Job) -> None:
    """Run a job's stages; those of several processes on the same artifacts wait for each other."""
    for stage, artifact in (
        (job.calibrate, "calibrate"),
        (job.group, "group"),
        (job.factor, job.factors_directory.name),
        (job.distill, job.distilled_directory.name),
    ):
        with alone(job.work / f"{artifact}.lock"):
            stage()


@dataclass(frozen=True)
class Made:
    """One layer's student as it is trained, how it is finished, and what it takes stored.

    ``finish`` returns a module with the very numbers that are stored, fp32.
    """

    trained: nn.Module
    finish: Callable[[Any], nn.Module]
    footprint: Footprint


def _rivals(bench: Bench, cell: Cell) -> list[Contender]:
    job, options = bench.job, distillation_of(bench, cell)
    stages = (ONE_SHOT, DISTILLED) if options.steps else (ONE_SHOT,)
    students: dict[str, dict[int, nn.Module]] = {stage: {} for stage in stages}
    seconds, footprints = dict.fromkeys(stages, 0.0), []
    layers = job.reader.shape.layers
    own = job.own_inputs(InMemory()) if options.steps and job.on_own_inputs else None
    for layer in layers:
        start, call = time.monotonic(), bench.call(layer)
        described = replace(describe(job, layer, call), seed=cell.seed)
        with job.suited_threads():
            made = _make(bench, cell, described)
            footprints.append(made.footprint)
            students[ONE_SHOT][layer] = _still(made.finish(copy.deepcopy(made.trained)))
            seconds[ONE_SHOT] += time.monotonic() - start
            if options.steps:
                distill_layer(
                    made.trained,
                    own.call(layer) if own else call,
                    options,
                    seed=cell.seed + layer,
                    metric_root_DD=job.metric_root(layer),
                )
                student = _still(made.finish(made.trained))
                students[DISTILLED][layer] = student
                if own and layer != layers[-1]:
                    own.take(student)
                seconds[DISTILLED] += time.monotonic() - start
    return [
        Contender(
            method=cell.method,
            stage=stage,
            groups=None,
            rank=None,
            seed=cell.seed,
            students=students[stage],
            seconds=seconds[stage],
            footprint=total(footprints),
            bits=cell.bits,
            fraction=cell.fraction,
        )
        for stage in stages
    ]


def distillation_of(bench: Bench, cell: Cell) -> DistillConfig:
    """Return how a cell is distilled: fewer bits, smaller steps while numbers are rounded."""
    options = bench.job.distillation
    if cell.fraction is None or bench.quantise == AFTER or (cell.bits or WHOLE) >= FULL_RATE_BITS:
        return options
    share = (cell.bits or WHOLE) / FULL_RATE_BITS
    return replace(
        options,
        learning_rate=options.learning_rate * share,
        delta_learning_rate=options.delta_learning_rate * share,
    )


def _still(student: nn.Module) -> nn.Module:
    return student.requires_grad_(False).eval()


def _make(bench: Bench, cell: Cell, layer: Layer) -> Made:
    assert cell.bits is not None
    if cell.fraction is None:
        return _quantized(layer, method(cell.method).quantize(layer, cell.bits))
    budget = bench.layer_budget(cell.fraction)
    student = compress_within(method(cell.method).compress, layer, budget, cell.bits)
    student = student.float().to(bench.job.device)
    if bench.job.device.startswith("cuda"):
        multiply_grouped(student)
    return _structural(bench, student, cell.bits)


def compress_within(
    compress: Callable[[Layer, int], nn.Module], layer: Layer, budget: int, bits: float
) -> nn.Module:
    """Return the student of the most numbers that take at most ``budget`` bytes at ``bits`` bits.

    Its index map comes on top: for it a merging method would lose a whole expert. Raises
    ``TooSmallError``.
    """
    numbers = int(8 * budget / bits_per_number(bits))
    while True:
        student = compress(layer, numbers)
        taken = numbers_bytes(student, bits)
        if taken <= budget:
            return student
        held = sum(parameter.numel() for parameter in routed_part(student).parameters())
        numbers = min(numbers * budget // taken, held - 1)


def multiply_grouped(student: nn.Module) -> None:
    """Let native experts modules multiply all experts at once, not one after the other.

    The products are the same; on an accelerator a loop over experts would wait for each.
    """
    for module in student.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(module, "gate_up_proj"):
            config._experts_implementation = "grouped_mm"


def _quantized(layer: Layer, student: Any) -> Made:
    def finish(trained: Any) -> nn.Module:
        trained.round_scales()
        return trained

    top_k = _top_k(layer)
    taken = Footprint(layer.numbers, student.active_parameters(top_k), student.stored_bytes())
    return Made(student, finish, taken)


def _structural(bench: Bench, student: Any, bits: float) -> Made:
    taken = Footprint(
        sum(parameter.numel() for parameter in routed_part(student).parameters()),
        student.active_parameters(bench.job.reader.shape.top_k),
        student_bytes(student, bits),
    )

    def in_whole(trained: nn.Module) -> nn.Module:
        round_to(routed_part(trained).parameters(), bench.whole)
        return trained

    if bits == WHOLE:
        return Made(student, in_whole, taken)
    if bench.quantise == AFTER:
        return Made(student, lambda m: RoundedStudent(m, bits, bench.whole).finished(), taken)
    return Made(RoundedStudent(student, bits, bench.whole), RoundedStudent.finished, taken)


def _top_k(layer: Layer) -> int:
    return layer.call.index_TK.shape[1]
