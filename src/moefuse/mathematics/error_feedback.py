"""Rounding that mends as it goes: what one column's rounding did wrong, later columns make up for.

Frantar et al., "GPTQ" (2022). The squared output error of a matrix is ``tr(E H E^T)`` with E its
rounding error and H the second moment of its inputs. Columns are rounded one after another; after
each, the best change of the columns not yet rounded is its error times the column's row of U, the
upper Cholesky factor of H^-1, over that row's diagonal (section 3.3, steps 2 and 3).

Shape suffixes: E experts, O outputs, I inputs, B inputs of one block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Round = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rounds one column (E, O): returns its codes and the numbers that these stand for."""
DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal of H, so that it can be inverted."""
TINY = 1e-12


def feedback_factor(moment_EII: Tensor, damping: float = DAMPING) -> Tensor:
    """Return U, the upper Cholesky factor of the damped moment's inverse, (E, I, I).

    ``moment_EII`` is the second moment of each expert's inputs in any unit, symmetric and not
    negative. Where it is all zero the factor is a multiple of the identity: nothing is fed back.
    """
    mean_E11 = moment_EII.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity_II = torch.eye(moment_EII.shape[-1], dtype=moment_EII.dtype, device=moment_EII.device)
    damped_EII = moment_EII + (damping * mean_E11).clamp_min(TINY) * identity_II
    inverse_EII = torch.cholesky_inverse(torch.linalg.cholesky(damped_EII))
    return torch.linalg.cholesky(inverse_EII, upper=True)


@torch.no_grad()
def round_with_feedback(
    weight_EOI: Tensor, factor_EII: Tensor, block: int, begin: Callable[[Tensor], Round]
) -> Tensor:
    """Round ``weight_EOI`` (E, O, I) column by column and return its codes, uint8 of its shape.

    ``factor_EII`` is what ``feedback_factor`` gave. Before each ``block`` of columns, ``begin``
    sees them as they then are, (E, O, B), and returns the function that rounds its columns.
    """
    codes_EOI = torch.empty(weight_EOI.shape, dtype=torch.uint8, device=weight_EOI.device)
    # Inputs first: a column is then contiguous, and so are those after it.
    left_IEO = weight_EOI.permute(2, 0, 1).contiguous()
    factor_IIE1 = factor_EII.permute(1, 2, 0).unsqueeze(-1).contiguous()
    for start in range(0, len(left_IEO), block):
        stop = min(start + block, len(left_IEO))
        round_column = begin(left_IEO[start:stop].permute(1, 2, 0).contiguous())
        error_BEO = torch.empty_like(left_IEO[start:stop])
        for column in range(start, stop):
            codes_EO, value_EO = round_column(left_IEO[column])
            codes_EOI[..., column] = codes_EO
            error_EO = (left_IEO[column] - value_EO) / factor_IIE1[column, column]
            left_IEO[column + 1 : stop].addcmul_(
                error_EO, factor_IIE1[column, column + 1 : stop], value=-1
            )
            error_BEO[column - start] = error_EO
        later_EBI = factor_EII[:, start:stop, stop:]
        left_IEO[stop:] -= torch.einsum("beo,ebi->ieo", error_BEO, later_EBI)
    return codes_EOI
