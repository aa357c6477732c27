"""What layer distillation minimises. Pure functions of outputs.

Shape suffixes: T tokens, D hidden width.
"""

from torch import Tensor


def relative_error(student_TD: Tensor, teacher_TD: Tensor, teacher_power: float) -> Tensor:
    """Return the mean squared error over the mean square of the teacher's output, a scalar.

    ``teacher_power`` is the mean of ``teacher^2`` over the whole calibration text, so that a batch
    weighs by its own size and 1.0 means no better than returning zeros.
    """
    return (student_TD.float() - teacher_TD.float()).square().mean() / teacher_power
