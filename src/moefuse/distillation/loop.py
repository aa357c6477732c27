"""Distil one layer: a student module learns the teacher's MoE output on real inputs.

Fed with the teacher's inputs, layers do not depend on each other; end-to-end errors that build up
over layers are healing's to mend. The student is any module that is called like a Transformers
experts module; rivals are distilled by this same loop.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
    metric_root_DD: Tensor | None = None,
) -> DistillResult:
    """Train ``student`` in place on the recorded ``call``; deterministic for one seed.

    ``progress`` wraps the steps to show how far they are. ``metric_root_DD`` (D, D) multiplies
    outputs before they are compared: the root of a metric that says which errors count. The student
    goes back to where it began should the held-back tokens show that it became worse; one without
    parameters, of a layer that got no neurons, stays as it is.
    """
    if metric_root_DD is not None:
        call = replace(call, y_TD=call.y_TD.float() @ metric_root_DD)
        student = _Felt(student, metric_root_DD)
    device = call.x_TD.device.type
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(call.x_TD), generator=generator)
    held = max(1, round(len(order) * options.held_back))
    aside, training = call.rows(order[:held]), order[held:]
    power = power_of(call)
    before = measure(student, aside, power, options.batch_tokens)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}

    groups = _parameter_groups(student, options)
    if not groups:
        return DistillResult(before, before, [])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps, options.warmup)
    )
    losses: list[Tensor] = []
    for _ in progress(range(options.steps)):
        rows = training[torch.randint(len(training), (options.batch_tokens,), generator=generator)]
        part = call.rows(_sent(rows, call.x_TD.device))
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            output_TD = student_output(student, part)
        loss = relative_error(output_TD, part.y_TD, power)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    after = measure(student, aside, power, options.batch_tokens)
    if not after < before:
        student.load_state_dict(start)
        after = before
    return DistillResult(before, after, [float(loss) for loss in losses])


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Return ``rows`` on a device that is not waited for; its steps follow without a gap."""
    if device.type != "cuda":
        return rows
    return rows.pin_memory().to(device, non_blocking=True)


class _Felt(nn.Module):
    """A student whose output is seen through a metric's root."""

    def __init__(self, student: nn.Module, root_DD: Tensor) -> None:
        super().__init__()
        self.student, self.root_DD = student, root_DD

    def forward(self, *given: Tensor) -> Tensor:
        return self.student(*given) @ self.root_DD


def metric_root(metric_DD: Tensor, damping: float) -> Tensor:
    """Return ``R`` (D, D) with ``R R^T`` the metric over its mean eigenvalue, damped.

    ``damping`` is added to every eigenvalue, so that no direction counts for nothing. A metric of
    zeros, of a layer that the logits do not feel, leaves all directions alike. fp32, on the
    metric's device.
    """
    scaled_DD = metric_DD.double() / metric_DD.double().diagonal().mean().clamp_min(1e-300)
    eye_DD = torch.eye(len(metric_DD), dtype=torch.float64, device=metric_DD.device)
    return torch.linalg.cholesky(scaled_DD + damping * eye_DD).float()


def _parameter_groups(student: nn.Module, options: DistillConfig) -> list[dict]:
    """Give bases, deltas, scales, neurons and low-bit rows their own learning rates."""
    rates = {
        r"delta\..*\.latent$": options.code_learning_rate,
        r"delta\.": options.delta_learning_rate,
        r"scale|(\w+_)?bias|gain\.weight": options.scale_learning_rate,
        r"(shared|gain)\.(latent|codebook|scale)$": options.shared_code_learning_rate,
        r".*\.(latent|codebook|scale)$": options.code_learning_rate,
        r"own\..*\.weight$": options.neuron_learning_rate,
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for full_name, parameter in student.named_parameters():
        name = full_name.removeprefix("student.")
        if parameter.requires_grad:
            found = (rate for pattern, rate in rates.items() if re.match(pattern, name))
            groups.setdefault(next(found, options.learning_rate), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": 0.0} for rate, group in groups.items()]
