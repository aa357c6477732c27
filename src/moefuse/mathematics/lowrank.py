"""The best low-rank approximation of a matrix, by weight error or by expected output error.

Plain: the truncated singular value decomposition (Eckart-Young). Whitened: with ``S`` the second
moment of the inputs, ``E |(M - B A) x|^2 = |(M - B A) S^(1/2)|_F^2``, so truncate the
decomposition of ``M S^(1/2)`` and undo the root on A. Raw second moments are dominated by a few
directions, so ``damped`` mixes in a multiple of the identity.

Shape suffixes: O outputs, I inputs, R rank; leading dimensions are batches.
"""

import torch
from torch import Tensor

TINY = 1e-12


def low_rank(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``b`` (..., O, R) and ``a`` (..., R, I) whose product is closest to the matrix.

    Singular values are split evenly between the two factors. R above min(O, I) is padded with
    zeros, so that every rank has one shape.
    """
    if not rank:
        return matrix_OI[..., :, :0].clone(), matrix_OI[..., :0, :].clone()
    u_OM, s_M, v_MI = torch.linalg.svd(matrix_OI, full_matrices=False)
    kept = min(rank, s_M.shape[-1])
    root_R = s_M[..., :kept].sqrt()
    b_OR = u_OM[..., :kept] * root_R.unsqueeze(-2)
    a_RI = v_MI[..., :kept, :] * root_R.unsqueeze(-1)
    missing = rank - kept
    b_OR = torch.nn.functional.pad(b_OR, (0, missing))
    return b_OR, torch.nn.functional.pad(a_RI, (0, 0, 0, missing))


def symmetric_root(moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a symmetric positive matrix and that root's inverse, (I, I) each.

    Eigenvalues below a millionth of a millionth of the largest count as that.
    """
    values_I, vectors_II = torch.linalg.eigh(moment_II)
    floor = (values_I[..., -1:] * TINY).clamp_min(TINY)
    root_I = torch.maximum(values_I, floor).sqrt()
    root_II = (vectors_II * root_I.unsqueeze(-2)) @ vectors_II.mT
    inverse_II = (vectors_II / root_I.unsqueeze(-2)) @ vectors_II.mT
    return root_II, inverse_II


def whitened_low_rank(matrix_OI: Tensor, rank: int, moment_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors, as ``low_rank`` does, that minimise the expected output error.

    ``moment_II`` (I, I) is the second moment of the inputs, symmetric and positive.
    """
    root_II, inverse_II = symmetric_root(moment_II)
    b_OR, a_RI = low_rank(matrix_OI @ root_II, rank)
    return b_OR, a_RI @ inverse_II


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """Mix a second moment with the identity of equal trace: 0 leaves it, 1 gives the identity."""
    size = moment_II.shape[-1]
    mean = moment_II.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity_II = torch.eye(size, dtype=moment_II.dtype, device=moment_II.device)
    return (1.0 - damping) * moment_II + damping * mean * identity_II


def expected_error(error_OI: Tensor, moment_II: Tensor) -> Tensor:
    """Return ``E |error x|^2`` for inputs of second moment ``moment_II``; shape (...)."""
    return ((error_OI @ moment_II) * error_OI).sum((-2, -1))
