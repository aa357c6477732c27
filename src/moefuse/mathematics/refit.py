"""Deltas that make up for what became of their base.

An expert of group g has the matrix ``s_e W_g + B_e A_e``. When ``W_g`` becomes ``W'_g``, rounded,
its delta is found anew as the best one of the same rank for what is then left of the same expert::

    B' A' = the rank-R matrix next to  B_e A_e + s_e (W_g - W'_g)

by expected output error where the second moment of the inputs is known (``mathematics.lowrank``),
by weights where it is not.

Shape suffixes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor

from moefuse.mathematics.lowrank import damped, low_rank, whitened_low_rank

DAMPING = 0.01
"""Share of the identity mixed into a moment, since text seen may lack directions."""


def refitted(
    b_OR: Tensor,
    a_RI: Tensor,
    lost_OI: Tensor,
    moment_II: Tensor | None = None,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """Return the delta's factors anew, fp32, of the shapes that they have.

    ``lost_OI`` is what the base lost, the expert's scale applied; ``moment_II`` the second moment
    of this expert's inputs.
    """
    left_OI = (lost_OI.float() + b_OR.float() @ a_RI.float()).double()
    rank = b_OR.shape[1]
    if moment_II is None:
        b, a = low_rank(left_OI, rank)
    else:
        b, a = whitened_low_rank(left_OI, rank, damped(moment_II.double(), damping))
    return b.to(torch.float32), a.to(torch.float32)
