"""Second moments of what each expert's matrices receive, on its own calibration tokens.

Shape suffixes: T tokens, N rows of one expert, E experts, D hidden width, F intermediate width,
I inputs of a matrix.
"""

import torch
from torch import Tensor

from moefuse.mathematics.experts import Experts, ExpertsCall

SHARED_TOKENS = 2048
"""An expert with few tokens is run on this many of the layer's."""


@torch.no_grad()
def input_moments(call: ExpertsCall, experts: Experts) -> tuple[Tensor, Tensor]:
    """Return the mean of x x^T over each expert's tokens, (E, D, D), and that of z z^T, (E, F, F).

    fp32. x and z, what the teacher's gate and up and its down projection receive, are taken times
    the routing weight, since a token's error counts in the layer's output times that. An expert
    with fewer tokens than a matrix has inputs is filled up to that many with the mean of the
    layer's tokens, taken times the layer's root mean square routing weight.
    """
    shared_TD = call.x_TD[:SHARED_TOKENS].float()
    shared_weight = call.weight_TK.float().square().mean().sqrt()
    x_moments, z_moments = [], []
    for expert in range(len(experts.gate_up_EFD)):
        token_N, slot_N = (call.index_TK == expert).nonzero(as_tuple=True)
        x_ND = call.x_TD[token_N].float()
        weight_N1 = call.weight_TK[token_N, slot_N, None].float()
        z_NF = experts.neurons(expert, x_ND)
        few = len(token_N) < max(x_ND.shape[1], z_NF.shape[1])
        x_TD = shared_TD if few else shared_TD[:0]
        z_TF = experts.neurons(expert, x_TD)
        x_moments.append(_filled_moment(x_ND * weight_N1, x_TD * shared_weight))
        z_moments.append(_filled_moment(z_NF * weight_N1, z_TF * shared_weight))
    return torch.stack(x_moments), torch.stack(z_moments)


def _filled_moment(own_NI: Tensor, shared_TI: Tensor) -> Tensor:
    """Return the mean of own rows, filled up to I rows with the mean of shared ones."""
    missing = max(0, own_NI.shape[1] - len(own_NI))
    total_II = own_NI.T @ own_NI
    if missing:
        total_II = total_II + shared_TI.T @ shared_TI * (missing / len(shared_TI))
    return total_II / (len(own_NI) + missing)
