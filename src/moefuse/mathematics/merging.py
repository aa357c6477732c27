"""One tensor out of several of the same shape: their mean, their mean on a sphere, or SCE.

Every function takes the members stacked along the first dimension, (M, ...) floats, compares them
coordinate by coordinate as they are (neurons are not aligned) and returns (...) in their dtype.

Shape suffixes: M members, N coordinates of a member; a name without one has a member's own shape.
"""

import torch
from torch import Tensor

from moefuse.errors import UserError

TINY = 1e-30
ITERATIONS = 100
CONVERGED = 1e-8
"""Radians of a step of the mean on the sphere that fp64 inner products no longer resolve."""
CANCELLED = 1e-6
"""Length of a mean of unit vectors below which its direction is rounding."""


def mean_merge(members: Tensor) -> Tensor:
    """Return the plain mean of the members, (...)."""
    return members.mean(0)


def multi_slerp(
    members: Tensor, weight_M: Tensor | None = None, origin: Tensor | None = None
) -> Tensor:
    """Return the spherical interpolation of any number of members, (...).

    SLERP between two vectors walks along the great circle through their directions. Its
    generalisation is the Karcher mean, the direction u on the unit sphere that minimises the sum of
    ``weight_m * angle(u, direction_m)^2`` (Buss and Fillmore, "Spherical averages and applications
    to spherical splines and interpolation", 2001), here given the weighted mean of the members'
    lengths. Of two members it is ``slerp(t)`` with t the second's weight. mergekit's ``multislerp``
    stops where this begins, at the direction of the weighted mean of directions: the same for two
    members of equal weight.

    ``weight_M`` (M,) positive, equal by default, need not sum to one; ``origin`` (...) is the
    sphere's centre, zero by default. A member that lies on it has no direction and counts for the
    length alone. Raises ``UserError`` where the directions cancel each other.
    """
    centre = torch.zeros_like(members[0]) if origin is None else origin
    flat_MN = (members - centre).flatten(1)
    norm_M = flat_MN.norm(dim=1)
    share_M = torch.ones_like(norm_M) if weight_M is None else weight_M.to(norm_M)
    share_M = share_M / share_M.sum()
    if not norm_M.any():
        return centre.clone()
    unit_MN = flat_MN / norm_M.clamp_min(TINY)[:, None]
    gram_MM = unit_MN.double() @ unit_MN.double().T
    mixture_M = _karcher_mean(gram_MM, (share_M * (norm_M > 0)).double()).to(unit_MN)
    merged_N = (share_M @ norm_M) * (mixture_M @ unit_MN)
    return merged_N.reshape(centre.shape) + centre


def sce_merge(members: Tensor, origin: Tensor, selected: float) -> Tensor:
    """Merge the members' differences from ``origin`` (...) by SCE: select, calculate, erase.

    Wan et al., "FuseChat: Knowledge Fusion of Chat Models" (2024, arXiv 2408.07990), section 3.3,
    on one matrix:

    1. select: of the coordinates where differences vary, the share ``selected`` (0 to 1) of
       greatest variance over the members; all other differences become zero;
    2. calculate: a member counts for the mean square of its differences that are left;
    3. erase: at each coordinate, differences whose sign is not that of the members' sum.

    What is left is averaged with those weights, at each coordinate over the members not erased
    there, and added to ``origin``. As mergekit's ``sce`` does, all coordinates are kept where
    ``selected`` is 1 or more, and a sum of zero counts as positive.
    """
    delta_MN = (members - origin).flatten(1)
    if selected < 1:
        delta_MN = delta_MN * _most_varied(delta_MN, selected)
    weight_M = delta_MN.square().mean(1)
    if not weight_M.any():
        return origin.clone()
    sign_N = torch.where(delta_MN.sum(0) >= 0, 1.0, -1.0).to(delta_MN)
    weight_MN = weight_M[:, None] / weight_M.sum() * (delta_MN.sign() == sign_N)
    merged_N = (weight_MN * delta_MN).sum(0) / weight_MN.sum(0).clamp_min(TINY)
    return origin + merged_N.reshape(origin.shape)


def _most_varied(delta_MN: Tensor, selected: float) -> Tensor:
    """Return ones (N,) at the share of coordinates of greatest variance, zeros elsewhere."""
    variance_N = delta_MN.var(0, unbiased=False)
    count = int(selected * int(variance_N.count_nonzero()))
    mask_N = torch.zeros_like(variance_N)
    mask_N[variance_N.sort(descending=True, stable=True).indices[:count]] = 1.0
    return mask_N


def _karcher_mean(gram_MM: Tensor, share_M: Tensor) -> Tensor:
    """Return the Karcher mean of unit vectors as coefficients (M,) fp64 of those vectors.

    The mean and every tangent at it are combinations of the members, so their inner products
    ``gram_MM`` (M, M) fp64 are all that the iteration needs. A step goes to the weighted mean of
    the members in the tangent space: log map, mean, exponential map.
    """
    share_M = share_M / share_M.sum()
    length = _length(gram_MM, share_M)
    if length < CANCELLED:
        raise UserError(
            "The directions of the tensors to merge by multi_slerp cancel each other, so that no "
            "direction is their mean; merge them by mean_merge instead."
        )
    mean_M = share_M / length
    for _ in range(ITERATIONS):
        cosine_M = (gram_MM @ mean_M).clamp(-1.0, 1.0)
        # The log map stretches a tangent of length sin(angle) to that of the arc, angle.
        pull_M = share_M / torch.sinc(cosine_M.acos() / torch.pi)
        tangent_M = pull_M - (pull_M @ cosine_M) * mean_M
        step = _length(gram_MM, tangent_M)
        if step < CONVERGED:
            break
        mean_M = step.cos() * mean_M + step.sin() / step * tangent_M
        mean_M = mean_M / _length(gram_MM, mean_M)
    return mean_M


def _length(gram_MM: Tensor, mixture_M: Tensor) -> Tensor:
    return (mixture_M @ gram_MM @ mixture_M).clamp_min(0.0).sqrt()
