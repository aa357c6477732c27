"""D2-MoE: one shared base expert, and a low-rank delta of its own for each expert.

Gu et al., "Delta Decompression for MoE-based LLMs Compression" (2025). For each of gate, up and
down, with W_e the matrix of expert e, F_e its diagonal Fisher information, X_e its inputs::

    base    = sum_e F_e * W_e / sum_e F_e          element by element
    delta_e = W_e - base  ~  B_e A_e               B_e A_e S_e = truncated SVD of delta_e S_e
    S_e S_e^T = X_e^T X_e / tokens

What is as in the paper and what is not:

- The paper's Fisher information is of the language model's loss. A rival sees one layer, so this is
  that of the layer's own output under unit Gaussian noise: the squared derivatives of every output
  by the weight, summed over outputs and over the recorded tokens that chose the expert.
- The paper takes the Cholesky factor for S. ``whitened_low_rank`` takes the symmetric root, which
  gives the same two factors: ``B = U s^(1/2)``, ``A = s^(1/2) V^T S^(-1) = s^(-1/2) U^T delta``,
  and U and s are those of ``delta S S^T delta^T``, whichever root is taken.
- Moments are damped by ``DAMPING``. An expert with fewer tokens than its matrices have inputs is
  whitened as if every recorded token had chosen it.
- Semi-dynamic pruning of the base is left out. Its dynamic part chooses columns anew for each
  batch, which saves computing and no storage; its static part would thin out the one base, a small
  share of the numbers.

The three deltas have one rank, at least 1; where the rest of the budget is enough, down and then up
get one more.

Shape suffixes: N tokens that chose an expert, E experts, D hidden width, F neurons of an expert,
O outputs and I inputs of a matrix, R rank of a delta.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError
from moefuse.mathematics.experts import Experts, ExpertsCall, Gating
from moefuse.mathematics.lowrank import damped, whitened_low_rank
from moefuse.modeling.modeling_moefuse import FusedExperts, expert_linear

DAMPING = 0.01
"""Share of the identity that is mixed into a second moment."""


class Matrices(NamedTuple):
    """One tensor for each matrix of an expert: gate and up (F, D), down (D, F)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class Ranks(NamedTuple):
    """The ranks of an expert's three deltas."""

    gate: int
    up: int
    down: int


class LowRankPair(nn.Module):
    """The product ``B_e A_e`` for every expert: ``a`` (E, R, I) and ``b`` (E, O, R)."""

    def __init__(self, experts: int, outputs: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(experts, rank, inputs))
        self.b = nn.Parameter(torch.empty(experts, outputs, rank))

    def forward(self, x_NI: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return (N, O) for rows sorted by expert."""
        inner_NR = expert_linear(x_NI, self.a, rows_per_expert)
        return expert_linear(inner_NR, self.b, rows_per_expert)


class SeparateDeltas(nn.Module):
    """Deltas whose gate and up share nothing, called as ``FusedExperts`` calls its delta."""

    def __init__(self, experts: int, hidden: int, intermediate: int, ranks: Ranks) -> None:
        super().__init__()
        self.gate_proj = LowRankPair(experts, intermediate, hidden, ranks.gate)
        self.up_proj = LowRankPair(experts, intermediate, hidden, ranks.up)
        self.down_proj = LowRankPair(experts, hidden, intermediate, ranks.down)

    def gate_up(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to gate and up, (N, 2F), for rows sorted by expert."""
        projections = (self.gate_proj, self.up_proj)
        return torch.cat([delta(x_ND, rows_per_expert) for delta in projections], dim=-1)

    def down(self, z_NF: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to the output, (N, D), for rows sorted by expert."""
        return self.down_proj(z_NF, rows_per_expert)


class DeltaExperts(FusedExperts):
    """The student: fused experts of one group, with deltas of three ranks.

    The base's parameters are (2F, D) and (D, F); those of the deltas are ``SeparateDeltas``'s.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        ranks: Ranks,
        gating: Gating,
        *,
        biased: bool = False,
    ) -> None:
        super().__init__(hidden, intermediate, experts, 1, 0, gating, bias=biased, down_bias=biased)
        self.delta = SeparateDeltas(experts, hidden, intermediate, ranks)

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes.

        ``3 F D + min(top_k, E) (F + D) (R_gate + R_up + R_down)``: the base and the deltas of the
        chosen experts.
        """
        base = sum(parameter.numel() for parameter in self.bases.parameters())
        biases = [bias for bias in (self.bias, self.down_bias) if bias is not None]
        one = sum(parameter[0].numel() for parameter in (*self.delta.parameters(), *biases))
        return base + min(top_k, self.num_experts) * one


@torch.no_grad()
def compress(layer: Layer, numbers: int) -> nn.Module:
    """Return the base and deltas of the largest ranks that ``numbers`` numbers hold.

    Raises ``TooSmallError`` where the base and deltas of rank 1 take more.
    """
    experts = layer.experts
    count, double_intermediate, hidden = experts.gate_up_EFD.shape
    intermediate = double_intermediate // 2
    ranks = ranks_within(numbers, count, hidden, intermediate)
    base = fisher_weighted_mean(experts, layer.call)
    with torch.device(experts.gate_up_EFD.device):
        student = DeltaExperts(
            count, hidden, intermediate, ranks, experts.gating, biased=experts.biases is not None
        )
    if experts.biases is not None and student.bias is not None and student.down_bias is not None:
        student.bias.copy_(experts.biases.gate_up_EF)
        student.down_bias.copy_(experts.biases.down_ED)
    shared = student.bases[0]
    shared.get_parameter("gate_up_proj.weight").copy_(torch.cat([base.gate, base.up]))
    shared.get_parameter("down_proj.weight").copy_(base.down)
    pairs = (student.delta.gate_proj, student.delta.up_proj, student.delta.down_proj)
    for expert in range(count):
        own = matrices_of(experts, expert)
        moments = whitening_moments(experts, layer.call, expert)
        for pair, matrix_OI, base_OI, moment_II in zip(pairs, own, base, moments, strict=True):
            b_OR, a_RI = whitened_low_rank(matrix_OI - base_OI, pair.a.shape[1], moment_II)
            pair.a[expert], pair.b[expert] = a_RI, b_OR
    return student


def ranks_within(numbers: int, experts: int, hidden: int, intermediate: int) -> Ranks:
    """Return the largest ranks, as equal as can be, whose deltas and base fit ``numbers``.

    No rank is above min(D, F), at which a delta can be anything. Raises ``TooSmallError``.
    """
    base, one_rank = 3 * hidden * intermediate, experts * (hidden + intermediate)
    each, more = divmod((numbers - base) // one_rank, 3)
    if each < 1:
        raise TooSmallError(
            f"{numbers} numbers hold no base with a delta for each of {experts} experts; the "
            f"smallest takes {base + 3 * one_rank}."
        )
    full = min(hidden, intermediate)
    return Ranks(
        gate=min(each, full), up=min(each + (more > 1), full), down=min(each + (more > 0), full)
    )


def matrices_of(experts: Experts, expert: int) -> Matrices:
    """Return one expert's weights, fp64."""
    gate_FD, up_FD = experts.gate_up_EFD[expert].double().chunk(2)
    return Matrices(gate_FD, up_FD, experts.down_EDF[expert].double())


def fisher_weighted_mean(experts: Experts, call: ExpertsCall) -> Matrices:
    """Return the shared base, fp64: every element's mean over experts, weighed by ``fisher``.

    An element that no recorded token bears upon gets the plain mean.
    """
    count = len(experts.gate_up_EFD)
    weighted, total, plain = (
        [torch.zeros_like(matrix) for matrix in matrices_of(experts, 0)] for _ in range(3)
    )
    for expert in range(count):
        pairs = zip(matrices_of(experts, expert), fisher(experts, call, expert), strict=True)
        for place, (matrix, weight) in enumerate(pairs):
            weighted[place] += weight * matrix
            total[place] += weight
            plain[place] += matrix / count
    sums = zip(weighted, total, plain, strict=True)
    return Matrices(*(torch.where(below > 0, above / below, mean) for above, below, mean in sums))


def fisher(experts: Experts, call: ExpertsCall, expert: int) -> Matrices:
    """Return one expert's diagonal Fisher information of the layer's output, fp64.

    With g and u what gate and up give, z(g, u) the neurons' values (act(g) u in most families), w
    the routing weight and ``|Wd_f|`` the norm of neuron f's column of the down matrix, the sums
    over the N tokens that chose the expert are::

        down  (d, f)  w^2 z_f^2
        up    (f, d)  w^2 |Wd_f|^2 (dz_f/du_f)^2 x_d^2
        gate  (f, d)  w^2 |Wd_f|^2 (dz_f/dg_f)^2 x_d^2
    """
    own = matrices_of(experts, expert)
    chosen_TK = call.index_TK == expert
    rows = chosen_TK.any(1).nonzero().flatten()
    weight_N1 = (call.weight_TK.double() * chosen_TK).sum(1)[rows].unsqueeze(1)
    x_ND = call.x_TD[rows].double()
    z_NF, by_gate_NF, by_up_NF = _with_slopes(experts, expert, own, x_ND)
    column_F1 = own.down.square().sum(0).unsqueeze(1)
    return Matrices(
        gate=column_F1 * ((weight_N1 * by_gate_NF).square().T @ x_ND.square()),
        up=column_F1 * ((weight_N1 * by_up_NF).square().T @ x_ND.square()),
        down=(weight_N1 * z_NF).square().sum(0).expand_as(own.down),
    )


def _gate_and_up(
    experts: Experts, expert: int, own: Matrices, x_ND: Tensor
) -> tuple[Tensor, Tensor]:
    gate_NF, up_NF = x_ND @ own.gate.T, x_ND @ own.up.T
    if experts.biases is not None:
        gate_F, up_F = experts.biases.gate_up_EF[expert].double().chunk(2)
        gate_NF, up_NF = gate_NF + gate_F, up_NF + up_F
    return gate_NF, up_NF


def _with_slopes(
    experts: Experts, expert: int, own: Matrices, x_ND: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return an expert's neurons' values and their derivatives by gate and by up, (N, F) each."""
    with torch.enable_grad():
        gate_NF, up_NF = (
            part.detach().requires_grad_() for part in _gate_and_up(experts, expert, own, x_ND)
        )
        z_NF = experts.gating(gate_NF, up_NF)
        by_gate_NF, by_up_NF = torch.autograd.grad(z_NF.sum(), (gate_NF, up_NF))
    return z_NF.detach(), by_gate_NF, by_up_NF


def whitening_moments(experts: Experts, call: ExpertsCall, expert: int) -> Matrices:
    """Return the damped second moments of what an expert's matrices receive, fp64.

    For gate and up (D, D) that of the tokens which chose the expert, for down (F, F) that of its
    neurons' values on them; of all recorded tokens where fewer than max(D, F) chose it.
    """
    own = matrices_of(experts, expert)
    chosen_T = (call.index_TK == expert).any(1)
    enough = int(chosen_T.sum()) >= max(own.gate.shape)
    x_ND = (call.x_TD[chosen_T] if enough else call.x_TD).double()
    z_NF = experts.gating(*_gate_and_up(experts, expert, own, x_ND))
    x_DD, z_FF = (damped(v.T @ v / len(v), DAMPING) for v in (x_ND, z_NF))
    return Matrices(gate=x_DD, up=x_DD, down=z_FF)
