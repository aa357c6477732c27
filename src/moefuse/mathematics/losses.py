"""How far a student's layer is from the teacher's. Pure functions of outputs and modules.

Shape suffixes: T tokens, D hidden width.
"""

import torch
from torch import Tensor, nn

from moefuse.mathematics.experts import ExpertsCall


def relative_error(student_TD: Tensor, teacher_TD: Tensor, teacher_power: float) -> Tensor:
    """Return the mean squared error over the mean square of the teacher's output, a scalar.

    ``teacher_power`` is the mean of ``teacher^2`` over the whole calibration text, so that a batch
    weighs by its own size and 1.0 means no better than returning zeros.
    """
    return (student_TD.float() - teacher_TD.float()).square().mean() / teacher_power


def power_of(call: ExpertsCall) -> float:
    """Return the mean square of the teacher's output, never zero."""
    return float(call.y_TD.float().square().mean().clamp_min(1e-30))


def student_output(student: nn.Module, call: ExpertsCall) -> Tensor:
    """Run a student on a recorded call: (T, D)."""
    return student(call.x_TD, call.index_TK.long(), call.weight_TK)


@torch.no_grad()
def measure(student: nn.Module, call: ExpertsCall, power: float, batch_tokens: int) -> float:
    """Return the student's relative error over all tokens of ``call``."""
    total = 0.0
    for rows in torch.arange(len(call.x_TD)).split(batch_tokens):
        part = call.rows(rows)
        error = relative_error(student_output(student, part), part.y_TD, power)
        total += float(error) * len(rows)
    return total / len(call.x_TD)
