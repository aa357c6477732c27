"""The students of one cell: made within the budget, distilled, and rounded to what is stored."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moefuse.arena.bench import Bench, alone
from moefuse.arena.cells import AFTER, FUSED_BF16, OURS, WHOLE, Cell
from moefuse.arena.healing import Trainable, healed
from moefuse.arena.lowbit import (
    RoundedStudent,
    bits_per_number,
    numbers_bytes,
    round_to,
    student_bytes,
)
from moefuse.artifacts import read_tensors, write_tensors
from moefuse.baselines import Layer, TooSmallError, method
from moefuse.comparison import (
    DISTILLED,
    ONE_SHOT,
    Contender,
    Footprint,
    describe,
    fused,
    rounded,
    routed_part,
    total,
)
from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.distillation.own_inputs import InMemory
from moefuse.errors import UserError
from moefuse.mathematics.experts import ExpertsCall
from moefuse.pipeline import Job

SECONDS = "seconds"
"""Beside the tensors of a kept student: how long making it took."""
FULL_RATE_BITS = 8
"""From so many bits on, matrices that are rounded while they are trained learn at the full rate.

Pruned to 1/8 of the bytes (bundled teacher, 120 steps, seed 0), KL at rates of 1e-4, 3e-4, 1e-3
and 2e-3: 2 bits 0.150, 0.147, 0.155, 0.192 (0.174 one-shot), 4 bits 0.359, 0.323, 0.312, 0.338.
"""


def make_contenders(bench: Bench, cell: Cell) -> list[Contender]:
    """Make a cell's students at every stage; raises ``TooSmallError`` where none fits."""
    found, trainable = (_ours if cell.method in OURS else _rivals)(bench, cell)
    if bench.healing is None:
        return found
    return [*found, healed(bench.job, bench.healing, bench.teacher, found[-1], trainable)]


Found = tuple[list[Contender], dict[int, Trainable]]
"""Contenders in the order of their stages, and the last one's students as they are trained."""


def _ours(bench: Bench, cell: Cell) -> Found:
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
    found = [
        replace(fused(job, stage), method=cell.method, bits=cell.bits, fraction=cell.fraction)
        for stage in stages
    ]

    def finish(student: nn.Module) -> nn.Module:
        return rounded(student, job.stored)

    return found, {layer: Trainable(s, finish) for layer, s in found[-1].students.items()}


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


class KeptStudents:
    """A rival's distilled students in the file ``path``, for when their healing is interrupted.

    Without a path nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known = read_tensors(path) if path is not None and path.exists() else {}
        self.added: dict[str, Tensor] = {}

    def restore(self, layer: int, module: nn.Module) -> float | None:
        """Give ``module`` the weights that were kept; return the seconds that they took, or None
        where there are none."""
        start = f"{layer}."
        found = {n.removeprefix(start): t for n, t in self.known.items() if n.startswith(start)}
        if not found:
            return None
        seconds = float(found.pop(SECONDS))
        module.load_state_dict(found)
        return seconds

    def add(self, layer: int, module: nn.Module, seconds: float) -> None:
        """Remember a student as it is now."""
        if self.path is not None:
            state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            state[SECONDS] = torch.tensor(seconds, dtype=torch.float64)
            self.added |= {f"{layer}.{name}": tensor for name, tensor in state.items()}

    def write(self) -> None:
        """Write what was remembered, all layers at once."""
        if self.path is not None and self.added:
            write_tensors(self.path, self.added)


@dataclass(frozen=True)
class Made(Trainable):
    """One layer's student as it is trained, how it is finished, and what it takes stored."""

    footprint: Footprint


def _rivals(bench: Bench, cell: Cell) -> Found:
    job, options = bench.job, distillation_of(bench, cell)
    stages = (ONE_SHOT, DISTILLED) if options.steps else (ONE_SHOT,)
    students: dict[str, dict[int, nn.Module]] = {stage: {} for stage in stages}
    seconds, footprints = dict.fromkeys(stages, 0.0), []
    layers = job.reader.shape.layers
    own = job.own_inputs(InMemory()) if options.steps and job.on_own_inputs else None
    kept = KeptStudents(bench.kept_students(cell))
    trainable: dict[int, Trainable] = {}
    for layer in layers:
        start, call = time.monotonic(), bench.call(layer)
        described = replace(describe(job, layer, call), seed=cell.seed)
        with job.suited_threads():
            made = trainable[layer] = _make(bench, cell, described)
            footprints.append(made.footprint)
            students[ONE_SHOT][layer] = _still(made.finish(copy.deepcopy(made.module)))
            seconds[ONE_SHOT] += time.monotonic() - start
            if options.steps:
                started = own.call(layer) if own else call
                seconds[DISTILLED] += _distil(bench, cell, layer, made, started, kept, start)
                students[DISTILLED][layer] = _still(made.finish(made.module))
                if own and layer != layers[-1]:
                    own.take(students[DISTILLED][layer])
    kept.write()
    found = [
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
    return found, trainable


def _distil(
    bench: Bench,
    cell: Cell,
    layer: int,
    made: Made,
    call: ExpertsCall,
    kept: KeptStudents,
    start: float,
) -> float:
    """Distil one layer's student in place, or restore it; return its seconds from ``start`` on."""
    known = kept.restore(layer, made.module)
    if known is not None:
        return known
    distill_layer(
        made.module,
        call,
        distillation_of(bench, cell),
        seed=cell.seed + layer,
        metric_root_DD=bench.job.metric_root(layer),
    )
    seconds = time.monotonic() - start
    kept.add(layer, made.module, seconds)
    return seconds


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

    def after(trained: nn.Module) -> nn.Module:
        trained.requires_grad_(False)
        routed_part(trained).requires_grad_(True)
        return RoundedStudent(trained, bits, bench.whole).finished()

    if bench.quantise == AFTER:
        return Made(student, after, taken)
    return Made(RoundedStudent(student, bits, bench.whole), RoundedStudent.finished, taken)


def _top_k(layer: Layer) -> int:
    return layer.call.index_TK.shape[1]
