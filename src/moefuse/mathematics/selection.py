"""Choosing few of many features so that a least squares fit to targets leaves least.

Shape suffixes: N rows, C candidate features, S chosen ones, D targets.
"""

import torch
from torch import Tensor


def forward_selection(
    feature_NC: Tensor, target_ND: Tensor, count: int, *, ridge: float
) -> tuple[Tensor, Tensor]:
    """Choose features one after another, each the one that explains most of what is left.

    Orthogonal least squares (Chen, Billings and Luo, "Orthogonal least squares methods and their
    application to non-linear system identification", 1989): feature c explains
    ``|r^T z|^2 / |z|^2`` of the residuals r, z being what the chosen ones leave of it. The Gram
    matrix is factored column by column as in a pivoted Cholesky decomposition, so that it is never
    there as a whole. ``ridge``, a share of the mean squared feature, is added to every square.

    ``feature_NC`` (N, C) and ``target_ND`` (N, D) are fp32. Returns the chosen features in the
    order of their choice, (S,) int64, S being ``count`` or C if that is less, and the coefficients
    of the ridge regression of the targets on them, (S, D) in the targets' dtype. Of equal worth
    the first feature comes first.
    """
    squared_C = feature_NC.square().sum(0).double()
    damping = ridge * float(squared_C.mean()) + torch.finfo(torch.float32).tiny
    left_C = squared_C + damping
    aimed_CD = (feature_NC.T @ target_ND).double()
    factor_CS = aimed_CD.new_zeros(len(left_C), min(count, len(left_C)))
    free_C = torch.ones_like(left_C, dtype=torch.bool)
    right_CD = aimed_CD.clone()
    chosen: list[int] = []
    for step in range(factor_CS.shape[1]):
        worth_C = right_CD.square().sum(1) / left_C.clamp_min(damping)
        pick = int(torch.where(free_C, worth_C, -1.0).argmax())
        column_C = (feature_NC.T @ feature_NC[:, pick]).double()
        column_C[pick] += damping
        column_C -= factor_CS[:, :step] @ factor_CS[pick, :step]
        column_C /= left_C[pick].clamp_min(damping).sqrt()
        factor_CS[:, step] = column_C
        right_CD -= torch.outer(column_C, right_CD[pick] / left_C[pick].clamp_min(damping).sqrt())
        left_C -= column_C.square()
        free_C[pick] = False
        chosen.append(pick)
    chosen_S = torch.tensor(chosen, dtype=torch.long, device=feature_NC.device)
    lower_SS = factor_CS[chosen_S]
    solution_SD = torch.cholesky_solve(aimed_CD[chosen_S], lower_SS) if chosen else aimed_CD[:0]
    return chosen_S, solution_SD.to(target_ND.dtype)
