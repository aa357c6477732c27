"""Distil one layer: a student module learns the teacher's MoE output on real inputs.

Fed with the teacher's inputs, layers do not depend on each other; end-to-end errors that build up
over layers are healing's to mend. The student is any module that is called like a Transformers
experts module; rivals are distilled by this same loop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefuse.checkpoint.streaming import ExpertsCall
from moefuse.distillation.losses import relative_error


@dataclass(frozen=True)
class DistillOptions:
    """How a layer is distilled.

    ``steps`` of AdamW over batches of ``batch_tokens`` tokens; ``learning_rate`` is the peak for
    matrices of typical size 1/sqrt(width), reached after ``warmup`` (share of the steps) and
    annealed by a cosine to zero; ``held_back`` is the share of tokens that only measure.
    """

    steps: int = 400
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    delta_learning_rate: float = 2e-3
    warmup: float = 0.05
    held_back: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class DistillResult:
    """Relative errors on the held-back tokens before and after, and the losses of the steps."""

    before: float
    after: float
    losses: list[float]


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak rate at ``step``: linear up, then a cosine down to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def rows_of(call: ExpertsCall, rows: Tensor) -> ExpertsCall:
    """Return the tokens ``rows`` (integers) of a recorded call."""
    return ExpertsCall(**{name: tensor[rows] for name, tensor in vars(call).items()})


def student_output(student: nn.Module, call: ExpertsCall) -> Tensor:
    """Run a student on a recorded call: (T, D)."""
    return student(call.x_TD, call.index_TK.long(), call.weight_TK)


@torch.no_grad()
def measure(student: nn.Module, call: ExpertsCall, power: float, batch_tokens: int) -> float:
    """Return the student's relative error over all tokens of ``call``."""
    total = 0.0
    for rows in torch.arange(len(call.x_TD)).split(batch_tokens):
        part = rows_of(call, rows)
        error = relative_error(student_output(student, part), part.y_TD, power)
        total += float(error) * len(rows)
    return total / len(call.x_TD)


def distill_layer(
    student: nn.Module,
    call: ExpertsCall,
    options: DistillOptions,
    progress: Callable[[int, float], None] | None = None,
) -> DistillResult:
    """Train ``student`` in place on the recorded ``call``; deterministic for one seed.

    ``progress(step, loss)`` is called after every step. The weights that served best on the
    held-back tokens stay, so that distilling never makes a student worse.
    """
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(call.x_TD), generator=generator)
    held = max(1, round(len(order) * options.held_back))
    aside, training = rows_of(call, order[:held]), order[held:]
    power = float(call.y_TD.float().square().mean().clamp_min(1e-30))
    before = measure(student, aside, power, options.batch_tokens)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    optimizer = torch.optim.AdamW(_parameter_groups(student, options), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps, options.warmup)
    )
    losses: list[float] = []
    for step in range(options.steps):
        rows = training[torch.randint(len(training), (options.batch_tokens,), generator=generator)]
        part = rows_of(call, rows)
        loss = relative_error(student_output(student, part), part.y_TD, power)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step, losses[-1])
    after = measure(student, aside, power, options.batch_tokens)
    if not after < before:
        student.load_state_dict(start)
        after = before
    return DistillResult(before, after, losses)


def _parameter_groups(student: nn.Module, options: DistillOptions) -> list[dict]:
    deltas = [p for n, p in student.named_parameters() if "delta." in n]
    others = [p for n, p in student.named_parameters() if "delta." not in n]
    rates = ((others, options.learning_rate), (deltas, options.delta_learning_rate))
    return [
        {"params": params, "lr": rate, "weight_decay": 0.0} for params, rate in rates if params
    ]
