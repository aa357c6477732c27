"""Distil one layer: a student module learns the teacher's MoE output on real inputs.

Fed with the teacher's inputs, layers do not depend on each other; end-to-end errors that build up
over layers are healing's to mend. The student is any module that is called like a Transformers
experts module; rivals are distilled by this same loop.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from moefuse.config import DistillConfig
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.losses import measure, power_of, relative_error, student_output


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


def distill_layer(
    student: nn.Module,
    call: ExpertsCall,
    options: DistillConfig,
    *,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> DistillResult:
    """Train ``student`` in place on the recorded ``call``; deterministic for one seed.

    ``progress`` wraps the steps to show how far they are. The student goes back to where it began
    should the held-back tokens show that it became worse.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(call.x_TD), generator=generator)
    held = max(1, round(len(order) * options.held_back))
    aside, training = call.rows(order[:held]), order[held:]
    power = power_of(call)
    before = measure(student, aside, power, options.batch_tokens)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    optimizer = torch.optim.AdamW(
        _parameter_groups(student, options), betas=(0.9, 0.95), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps, options.warmup)
    )
    losses: list[float] = []
    for _ in progress(range(options.steps)):
        rows = training[torch.randint(len(training), (options.batch_tokens,), generator=generator)]
        part = call.rows(rows)
        loss = relative_error(student_output(student, part), part.y_TD, power)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    after = measure(student, aside, power, options.batch_tokens)
    if not after < before:
        student.load_state_dict(start)
        after = before
    return DistillResult(before, after, losses)


def _parameter_groups(student: nn.Module, options: DistillConfig) -> list[dict]:
    """Give bases, deltas, scales, neurons and low-bit rows their own learning rates."""
    rates = {
        r"delta\.": options.delta_learning_rate,
        r"scale|bias|gain\.weight": options.scale_learning_rate,
        r".*\.(latent|codebook|scale)$": options.code_learning_rate,
        r"(own\..*|shared)\.weight$": options.neuron_learning_rate,
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            found = (rate for pattern, rate in rates.items() if re.match(pattern, name))
            groups.setdefault(next(found, options.learning_rate), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": 0.0} for rate, group in groups.items()]
