"""MoBE: matrices made of a factor of the expert's own and a mixture of bases all experts share.

Chen et al., "MoBE: Mixture-of-Basis-Experts for Compressing MoE-based LLMs" (2025). Gate and up of
expert e are, each with factors and bases of its own kind::

    W_e  ~  A_e f(sum_m alpha_em B_m)      A_e (F, r), B_m (r, D), sum_m alpha_em = 1

f is tanh, one of the two the authors use; with this few steps the other, SiLU, erred more. As in
the authors' code the weights are divided by their standard deviation, which ends up in A (their
mean, next to nothing, is left in), alpha is a softmax while it is fitted and plain numbers
afterwards, and Adam minimises the mean squared error of all experts' weights at a rate of 0.07.
What differs:

- ``STEPS`` steps instead of tens of thousands, the rate falling linearly to zero.
- The start. As theirs, it deals the experts out to the bases in order and decomposes each basis's
  experts, stacked; but a basis starts where f of it gives the leading right singular vectors, and A
  as the least-squares solution. Nothing is random, so ``layer.seed`` is not used.

The paper has r = F and about one basis for four experts, and takes away a quarter of a model. Here:

1. r is the largest, up to min(D, F) and at least 1, with which E / 4 bases fit; then there are as
   many bases as fit, up to E. All factored projections have the same r and number of bases.
2. The paper's own form, in which down matrices stay as they are, is used whenever r = min(D, F)
   and E / 4 bases fit.
3. Otherwise down is factored as well, which is not in the paper, and mirrored, so that what is
   shared is again the side of width D: ``W_e ~ f(sum_m alpha_em B_m) A_e`` with B_m (D, r) and
   A_e (r, F).

Shape suffixes: T tokens, K experts chosen per token, N = T * K rows sorted by expert, E experts,
D hidden width, F neurons of an expert, O outputs and I inputs of a matrix, M bases, R rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError
from moefuse.baselines._biases import Biases
from moefuse.mathematics.experts import ExpertBiases, Gating
from moefuse.modeling.modeling_moefuse import expert_linear

STEPS = 250
LEARNING_RATE = 0.07
EXPERTS_PER_BASIS = 4
OWN_SHARE = 0.75
"""How much of an expert's mixture is its own basis at the start."""
PEAK = 0.9
"""The largest value in a row of f(basis) at the start, within the range of f."""


@dataclass(frozen=True)
class Size:
    """The rank r, the number of bases, and whether down matrices stay as they are."""

    rank: int
    bases: int
    keeps_down: bool


@dataclass(frozen=True)
class Factors:
    """``own_EOR`` (E, O, R), ``mixture_EM`` (E, M) and ``bases_MRI`` (M, R, I) of E matrices."""

    own_EOR: Tensor
    mixture_EM: Tensor
    bases_MRI: Tensor

    def mirrored(self) -> "Factors":
        """Return the factors of the transposed matrices: own (E, R, O), bases (M, I, R)."""
        return Factors(self.own_EOR.mT, self.mixture_EM, self.bases_MRI.mT)


class MixedBases(nn.Module):
    """One projection of all experts: ``own`` 3-D, ``mixture`` (E, M), ``bases`` 3-D.

    Not mirrored, the rows pass the mixed bases first, then the expert's own factor.
    """

    def __init__(self, factors: Factors, *, mirrored: bool = False) -> None:
        super().__init__()
        self.is_mirrored = mirrored
        stored = factors.mirrored() if mirrored else factors
        self.own = nn.Parameter(stored.own_EOR.contiguous())
        self.mixture = nn.Parameter(stored.mixture_EM)
        self.bases = nn.Parameter(stored.bases_MRI.contiguous())

    def active_parameters(self, top_k: int) -> int:
        """Return all bases and the own factors and mixtures of ``top_k`` experts."""
        one = self.own[0].numel() + self.mixture[0].numel()
        return self.bases.numel() + min(top_k, len(self.own)) * one

    def forward(self, x_NI: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return (N, O) for rows sorted by expert."""
        mixed = mixed_bases(self.mixture, self.bases)
        first, second = (self.own, mixed) if self.is_mirrored else (mixed, self.own)
        inner_NR = expert_linear(x_NI, first, rows_per_expert)
        return expert_linear(inner_NR, second, rows_per_expert)


class KeptProjection(nn.Module):
    """One projection of all experts as the teacher has it: ``weight`` (E, O, I)."""

    def __init__(self, weight_EOI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_EOI.clone())

    def active_parameters(self, top_k: int) -> int:
        """Return the numbers of ``top_k`` experts."""
        return min(top_k, len(self.weight)) * self.weight[0].numel()

    def forward(self, x_NI: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return (N, O) for rows sorted by expert."""
        return expert_linear(x_NI, self.weight, rows_per_expert)


class BasisExperts(nn.Module):
    """The student: a drop-in for a Transformers experts module.

    Rows pass the two factors one after the other; only the bases are mixed beforehand. For a
    batch's rows that takes fewer multiplications than multiplying out every expert's matrices.
    """

    def __init__(
        self,
        gate_proj: MixedBases,
        up_proj: MixedBases,
        down_proj: MixedBases | KeptProjection,
        gating: Gating,
        biases: ExpertBiases | None,
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.gating = gating
        self.biases = Biases(biases)

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes.

        With k = min(top_k, E), ``M r D + k (F r + M)`` for each projection that is factored: all
        bases, and the own factors and mixtures of the chosen experts; ``k D F`` for one that is
        kept.
        """
        projections = (self.gate_proj, self.up_proj, self.down_proj, self.biases)
        return sum(projection.active_parameters(top_k) for projection in projections)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output, (T, D), in the dtype of ``x_TD``."""
        expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
        token_N = order_N // index_TK.shape[1]
        weight_N = weight_TK.reshape(-1).index_select(0, order_N)
        experts = len(self.gate_proj.own)
        rows_per_expert = torch.bincount(expert_N, minlength=experts).tolist()
        x_ND = x_TD.index_select(0, token_N)
        projections = (self.gate_proj, self.up_proj)
        h_NF = torch.cat([projection(x_ND, rows_per_expert) for projection in projections], -1)
        gate_NF, up_NF = self.biases.with_gate_up(h_NF, expert_N).chunk(2, dim=-1)
        z_NF = (self.gating(gate_NF, up_NF) * weight_N.unsqueeze(-1)).to(x_TD.dtype)
        y_ND = self.down_proj(z_NF, rows_per_expert)
        y_ND = self.biases.with_down(y_ND, expert_N, weight_N.unsqueeze(-1))
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token_N, y_ND.float())
        return y_TD.to(x_TD.dtype)


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Return the student of the largest rank and most bases that ``numbers`` numbers hold.

    Raises ``TooSmallError`` where rank 1 and one basis take more.
    """
    experts = layer.experts
    gate_EFD, up_EFD = experts.gate_up_EFD.float().chunk(2, dim=1)
    down_EDF = experts.down_EDF.float()
    size = size_within(numbers, *gate_EFD.shape)
    gate, up = (MixedBases(fit(matrix, size.rank, size.bases)) for matrix in (gate_EFD, up_EFD))
    down: MixedBases | KeptProjection
    if size.keeps_down:
        down = KeptProjection(down_EDF)
    else:
        down = MixedBases(fit(down_EDF.mT, size.rank, size.bases), mirrored=True)
    return BasisExperts(gate, up, down, experts.gating, experts.biases)


def size_within(numbers: int, experts: int, intermediate: int, hidden: int) -> Size:
    """Return rank and bases by the rule at the top of this file; raises ``TooSmallError``.

    E matrices take ``E F r + M (r D + E)`` numbers.
    """
    usual = max(1, experts // EXPERTS_PER_BASIS)
    full = min(intermediate, hidden)

    def rank_and_bases(each: int) -> tuple[int, int]:
        fits = (each - usual * experts) // (experts * intermediate + usual * hidden)
        rank = max(1, min(fits, full))
        bases = (each - experts * intermediate * rank) // (rank * hidden + experts)
        return rank, min(bases, experts)

    kept = experts * hidden * intermediate
    rank, bases = rank_and_bases((numbers - kept) // 2)
    if rank == full and bases >= usual:
        return Size(rank, bases, keeps_down=True)
    rank, bases = rank_and_bases(numbers // 3)
    if bases < 1:
        least = 3 * (experts * intermediate + hidden + experts)
        raise TooSmallError(f"{numbers} numbers hold no basis of rank 1; one takes {least}.")
    return Size(rank, bases, keeps_down=False)


def fit(matrix_EOI: Tensor, rank: int, bases: int) -> Factors:
    """Return the factors of E matrices, found by Adam on the error of the matrices; fp32."""
    deviation = matrix_EOI.std()
    target_EOI = matrix_EOI / deviation
    logits_EM, bases_MRI = starting_bases(target_EOI, rank, bases)
    mixed_ERI = mixed_bases(logits_EM.softmax(1), bases_MRI)
    own_EOR = target_EOI @ torch.linalg.pinv(mixed_ERI)
    trained = [tensor.requires_grad_() for tensor in (own_EOR, logits_EM, bases_MRI)]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        product_EOI = own_EOR @ mixed_bases(logits_EM.softmax(1), bases_MRI)
        optimizer.zero_grad()
        nn.functional.mse_loss(product_EOI, target_EOI).backward()
        optimizer.step()
        schedule.step()
    own_EOR, logits_EM, bases_MRI = (tensor.detach() for tensor in trained)
    return Factors(own_EOR * deviation, logits_EM.softmax(1), bases_MRI)


def starting_bases(matrix_EOI: Tensor, rank: int, bases: int) -> tuple[Tensor, Tensor]:
    """Return mixture logits (E, M) and bases (M, R, I) that begin as singular vectors."""
    experts = len(matrix_EOI)
    basis_E = torch.arange(experts, device=matrix_EOI.device) * bases // experts
    starts = []
    for basis in range(bases):
        stacked = matrix_EOI[basis_E == basis].flatten(0, 1)
        vectors_RI = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]
        starts.append(vectors_RI / vectors_RI.abs().amax(1, keepdim=True))
    logits_EM = matrix_EOI.new_zeros(experts, bases)
    # Softmax of x and M - 1 zeros gives OWN_SHARE where e^x = (M - 1) OWN_SHARE / (1 - OWN_SHARE).
    own = math.log(max(bases - 1, 1) * OWN_SHARE / (1 - OWN_SHARE))
    logits_EM[torch.arange(experts), basis_E] = own
    return logits_EM, torch.atanh(PEAK * torch.stack(starts))


def mixed_bases(mixture_EM: Tensor, bases_MRI: Tensor) -> Tensor:
    """Return ``f(sum_m alpha_em B_m)`` for every expert, (E, R, I)."""
    return torch.tensordot(mixture_EM, bases_MRI, dims=1).tanh()
