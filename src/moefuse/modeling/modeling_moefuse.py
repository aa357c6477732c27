"""Fused experts: what takes the place of a Mixture-of-Experts layer's routed experts.

This file travels inside every checkpoint that moefuse writes, so it imports nothing but torch and
transformers. There are two forms, and that of checkpoints of 2025 (``MultiplexedExperts``).

``FusedExperts``: a few shared base experts and one small delta for every original expert. For
expert e of group g = g(e)::

    h_te = s_e * (Wgu_g x_t) + delta_gate_up_e(x_t) + b_e
    z_te = w_te * gating(gate half of h_te, up half of h_te)        usually act(gate) * up
    y_t  = sum_g Wd_g (sum over chosen e in g of z_te) + sum over chosen e of delta_down_e(z_te)
           + sum over chosen e of w_te * c_e                  where down projections have biases

The base weights of a group run once per (token, group) however many of its members were chosen,
because the down projection is linear and members are summed before it. The router is the
teacher's. One stable sort of the (token, slot) rows by expert serves all deltas. Rows are gathered
with ``index_select``, whose gradient is summed in one order; that of ``x[index]`` is not.

``NeuronExperts``: every expert keeps neurons of its own, as many as it is worth, at as many bits as
each is worth, and all experts share a few more, of which each has its own gains::

    neuron_f(x) = gating(gate_f . x, up_f . x) * down_f       plus their biases, if there are any
    y_t = sum over chosen e of w_te (sum over own f of e of neuron_f(x_t)
                                     + sum over shared f of gain_ef neuron_f(x_t) + c_e)

Shape suffixes: T tokens, K experts chosen per token, N = T * K rows, P (token, group) pairs,
E original experts, G groups, D hidden width, F expert intermediate width, R rank of a delta,
O own neurons of one expert, S shared neurons, M rows of a matrix, I their width, V numbers that
one code stands for, B bytes.
"""

import itertools
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any
from weakref import WeakValueDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

CLASS_PREFIX = "Moefuse"
MODEL_TYPE_PREFIX = "moefuse_"
NATIVE_NAMES: tuple[dict[str, str], ...] = (
    configuration_auto.CONFIG_MAPPING_NAMES,  # type: ignore[reportPrivateImportUsage]
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
"""Class names of native configurations, base models and language models by model type."""


Gating = Callable[[Tensor, Tensor], Tensor]
"""What joins the gate and the up half of an expert's neurons, of any one shape, to their values."""


class PlainGating:
    """``act(gate) * up`` with the teacher's elementwise activation."""

    linear_in_up, up_offset = True, 0.0

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.activation = activation

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the neurons' values."""
        return self.activation(gate) * up


class ClampedGating:
    """``(u + 1) * g * sigmoid(alpha * g)``, g at most ``limit`` and u between minus it and it."""

    linear_in_up, up_offset = False, 1.0

    def __init__(self, alpha: float, limit: float) -> None:
        self.alpha, self.limit = alpha, limit

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the neurons' values."""
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


GATINGS: dict[str, Callable[..., Any]] = {"clamped": ClampedGating}
"""Gatings other than the plain one by the ``kind`` that a family's settings name."""


def gating_of(native: Any, settings: dict[str, Any] | None) -> Any:
    """Make the gating of a native experts module: the plain one unless ``settings`` name a kind.

    ``settings`` hold that ``kind`` and the arguments that its class takes.
    """
    if settings is None:
        return PlainGating(native.act_fn)
    return GATINGS[settings["kind"]](**{k: v for k, v in settings.items() if k != "kind"})


@cache
def installed_kernels() -> Callable[..., Tensor | None] | None:
    """Find kernels that an installed package offers by the entry point ``moefuse.kernels``.

    They take fused experts and their call, and return its output, or None to have it computed
    plainly. A package that is named but cannot be found is as good as not installed; one that lacks
    a part of itself is broken, and says so.
    """
    for entry in entry_points(group="moefuse.kernels"):
        package = entry.module.split(".")[0]
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            found = hasattr(sys.modules.get(package), "__path__")
            if found or (error.name or "").split(".")[0] != package:
                raise
    return None


MOST_FILLED = 4
"""How many rows, of those there are, a batched product may have when experts are filled up."""


def expert_linear(x_NI: Tensor, weight_EOI: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Apply expert e's matrix to its rows.

    ``x_NI`` holds the rows sorted by expert, ``rows_per_expert`` how many belong to each of the E
    experts (their sum is N). Returns (N, O) in the dtype of ``x_NI``.
    """
    filled = max(rows_per_expert, default=0) * len(rows_per_expert)
    if x_NI.is_cuda and 0 < filled <= MOST_FILLED * len(x_NI):
        return padded_linear(x_NI, weight_EOI, rows_per_expert)
    used = [expert for expert, rows in enumerate(rows_per_expert) if rows]
    if not used:
        return x_NI.new_zeros(0, weight_EOI.shape[1])
    parts = x_NI.split([rows_per_expert[expert] for expert in used])
    weights = weight_EOI.unbind(0)
    products = [
        nn.functional.linear(part, weights[expert])
        for part, expert in zip(parts, used, strict=True)
    ]
    return torch.cat(products)


def padded_linear(x_NI: Tensor, weight_EOI: Tensor, rows_per_expert: list[int]) -> Tensor:
    """Do what ``expert_linear`` does by one batched product, experts filled up to the longest.

    A GPU takes longer to be told of a product for every expert than to compute a few more rows.
    """
    rows_E = torch.tensor(rows_per_expert, device=x_NI.device)
    longest = max(rows_per_expert)
    start_E = torch.arange(len(rows_per_expert), device=x_NI.device) * longest
    shift_E = start_E - (rows_E.cumsum(0) - rows_E)
    shift_N = shift_E.repeat_interleave(rows_E, output_size=len(x_NI))
    place_N = torch.arange(len(x_NI), device=x_NI.device) + shift_N
    padded = x_NI.new_zeros(len(rows_per_expert) * longest, x_NI.shape[1])
    x_ECI = padded.index_copy(0, place_N, x_NI).view(len(rows_per_expert), longest, -1)
    y_ECO = x_ECI @ weight_EOI.mT
    return y_ECO.flatten(0, 1).index_select(0, place_N)


FEW_ROWS = range(4, 32)


def of_few_rows(linear: nn.Module, x_PI: Tensor) -> Tensor:
    """Apply a linear layer to rows, the other way round where fp32 rows on a CPU are few.

    ``(W x^T)^T`` and ``x W^T`` are one product, but MKL was seen to take 1.5 and 3.3 ms for them
    with a base of 2816 x 2048 and 15 rows, 1.8 and 2.0 with 20, 1.5 and 0.9 with 3. A layer that is
    more than its weight (quantised, adapted, offloaded or watched by hooks) is called as it is.
    """
    on_cpu = x_PI.device.type == "cpu" and x_PI.dtype == torch.float32
    if torch.is_grad_enabled() or not on_cpu or len(x_PI) not in FEW_ROWS:
        return linear(x_PI)
    if not is_plain_linear(linear) or torch.is_autocast_enabled("cpu"):
        return linear(x_PI)
    weight: Any = linear.weight
    return (weight @ x_PI.T.contiguous()).T


def is_plain_linear(module: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Tell whether calling ``module`` does no more than to multiply by its weight of ``dtype``."""
    watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if type(module) is not nn.Linear or watched or module.bias is not None:
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.dtype == dtype


def weight_of_experts(index_TK: Tensor, weight_TK: Tensor, experts: int) -> Tensor:
    """Return the routing weights of all E experts, 0 where one was not chosen: (T, E) fp32."""
    weight_TE = torch.zeros(len(index_TK), experts, device=index_TK.device)
    return weight_TE.scatter_add(1, index_TK.long(), weight_TK.float())


FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
"""What low-rank deltas are made of; see ``LowRankDelta``."""


class LowRankDelta(nn.Module):
    """Deltas ``B_e A_e``: gate and up share one A; down has a pair of its own.

    Parameters: ``gate_up_a`` (E, R, D), ``gate_up_b`` (E, 2F, R), ``down_a`` (E, R, F),
    ``down_b`` (E, D, R); the down pair's R is at most what its matrix can have, min(D, F).
    """

    def __init__(self, experts: int, hidden: int, intermediate: int, rank: int) -> None:
        super().__init__()
        self.gate_up_a = nn.Parameter(torch.empty(experts, rank, hidden))
        self.gate_up_b = nn.Parameter(torch.empty(experts, 2 * intermediate, rank))
        down_rank = min(rank, hidden, intermediate)
        self.down_a = nn.Parameter(torch.empty(experts, down_rank, intermediate))
        self.down_b = nn.Parameter(torch.empty(experts, hidden, down_rank))

    def reset_parameters(self) -> None:
        """Start as LoRA does: A small and random, B zero, so that the delta is nothing."""
        for a in (self.gate_up_a, self.down_a):
            nn.init.normal_(a, std=a.shape[-1] ** -0.5)
        for b in (self.gate_up_b, self.down_b):
            nn.init.zeros_(b)

    def gate_up(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to gate and up, (N, 2F), for rows sorted by expert."""
        inner_NR = expert_linear(x_ND, self.gate_up_a, rows_per_expert)
        return expert_linear(inner_NR, self.gate_up_b, rows_per_expert)

    def down(self, z_NF: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to the output, (N, D), for rows sorted by expert."""
        inner_NR = expert_linear(z_NF, self.down_a, rows_per_expert)
        return expert_linear(inner_NR, self.down_b, rows_per_expert)


class CodedLowRankDelta(LowRankDelta):
    """``LowRankDelta`` with factors of few bits, for use without gradients.

    Every expert's R rows of each A, and R columns of each B, have a scale of their own; they are
    ``gate_up_in`` (E, R, D), ``gate_up_out`` (E, R, 2F), ``down_in`` (E, R, F) and ``down_out``
    (E, R, D). Those of the chosen experts alone are decoded.
    """

    def __init__(
        self, experts: int, hidden: int, intermediate: int, rank: int, *, bits: str
    ) -> None:
        nn.Module.__init__(self)
        down_rank = min(rank, hidden, intermediate)
        self.gate_up_in = CodedRows(bits, experts, rank, hidden)
        self.gate_up_out = CodedRows(bits, experts, rank, 2 * intermediate)
        self.down_in = CodedRows(bits, experts, down_rank, intermediate)
        self.down_out = CodedRows(bits, experts, down_rank, hidden)

    def reset_parameters(self) -> None:
        """Start as nothing."""
        for outer in (self.gate_up_out, self.down_out):
            nn.init.zeros_(outer.scale)

    @property
    def gate_up_a(self) -> Tensor:
        """The factor A of gate and up, (E, R, D)."""
        return self.gate_up_in.read_parts(slice(None))

    @property
    def gate_up_b(self) -> Tensor:
        """The factor B of gate and up, (E, 2F, R)."""
        return self.gate_up_out.read_parts(slice(None)).mT

    @property
    def down_a(self) -> Tensor:
        """The factor A of down, (E, R, F)."""
        return self.down_in.read_parts(slice(None))

    @property
    def down_b(self) -> Tensor:
        """The factor B of down, (E, D, R)."""
        return self.down_out.read_parts(slice(None)).mT

    def gate_up(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to gate and up, (N, 2F), for rows sorted by expert."""
        return _of_chosen(x_ND, self.gate_up_in, self.gate_up_out, rows_per_expert)

    def down(self, z_NF: Tensor, rows_per_expert: list[int]) -> Tensor:
        """Return what the deltas add to the output, (N, D), for rows sorted by expert."""
        return _of_chosen(z_NF, self.down_in, self.down_out, rows_per_expert)


def _of_chosen(
    x_NI: Tensor, inner: "CodedRows", outer: "CodedRows", rows_per_expert: list[int]
) -> Tensor:
    chosen = [expert for expert, rows in enumerate(rows_per_expert) if rows]
    chosen_U = torch.tensor(chosen, dtype=torch.int64, device=x_NI.device)
    rows = [rows_per_expert[expert] for expert in chosen]
    inner_NR = expert_linear(x_NI, inner.read_parts(chosen_U).to(x_NI.dtype), rows)
    if not chosen:
        return x_NI.new_zeros(0, outer.width)
    return expert_linear(inner_NR, outer.read_parts(chosen_U).mT.to(x_NI.dtype), rows)


DELTA_KINDS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "low_rank": LowRankDelta,
    **{f"low_rank_{bits}_bits": partial(CodedLowRankDelta, bits=bits) for bits in ("4", "8")},
}


class OpaqueExperts(nn.Module):
    """Experts that stand in a compiled graph as one operation, which is not looked into.

    How many rows an expert gets is known only when it runs, so a graph that must be whole, as
    vLLM's has to be, cannot hold what ``compute`` does. Without gradients ``forward`` is therefore
    one operator when compiled; ``number`` tells it which module it stands for. With gradients, and
    where nothing is compiled, ``compute`` is called, which asks ``fast_compute`` first.
    """

    fast_compute: Callable[..., Tensor | None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._take_number()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has weights of its own, and so needs a number of its own."""
        super().__setstate__(state)
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)
        _experts_by_number[self.number] = self

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output; see ``forward``."""
        if self.fast_compute is not None:
            y_TD = self.fast_compute(self, hidden_states, top_k_index, top_k_weights)
            if y_TD is not None:
                return y_TD
        return self.plain_compute(hidden_states, top_k_index, top_k_weights)

    def plain_compute(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the routed experts' output with PyTorch alone."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output, (T, D), in the dtype of ``hidden_states``.

        ``hidden_states`` is (T, D); ``top_k_index`` (T, K) integers below E; ``top_k_weights``
        (T, K) floats.
        """
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return _opaque(hidden_states, top_k_index, top_k_weights, self.number)
        return self.compute(hidden_states, top_k_index, top_k_weights)


_numbers = itertools.count()
_experts_by_number: WeakValueDictionary[int, OpaqueExperts] = WeakValueDictionary()


# This file may be loaded more than once in a process, as moefuse's own and as checkpoints'; each
# keeps modules of its own, so each needs an operator of its own.
@torch.library.custom_op("moefuse::" + re.sub(r"\W", "_", __name__), mutates_args=())
def _opaque(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, number: int
) -> Tensor:
    y_TD = _experts_by_number[number].compute(hidden_states, top_k_index, top_k_weights)
    return y_TD.contiguous()


@_opaque.register_fake
def _opaque_shape(hidden_states: Tensor, *_: Tensor | int) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


class BaseExpert(nn.Module):
    """The weights that the members of one group share, as plain linear layers.

    ``gate_up_proj`` maps D to 2F (gate first), ``down_proj`` maps F to D. They are ``nn.Linear``
    so that quantisers find them.
    """

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)


class FusedExperts(OpaqueExperts):
    """A drop-in for a Transformers experts module: E experts made of G bases and E deltas.

    Arguments: ``hidden`` D, ``intermediate`` F, ``experts`` E, ``groups`` G, ``rank`` R (0: no
    delta), ``gating`` the teacher's, ``delta`` a name in ``DELTA_KINDS``, ``scale`` and ``bias``
    whether every expert has a scale and a bias of its own for its 2F neurons, ``down_bias`` whether
    it has one for its D outputs.
    """

    group_of_expert: Tensor

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: int,
        groups: int,
        rank: int,
        gating: Gating,
        *,
        delta: str = "low_rank",
        scale: bool = False,
        bias: bool = False,
        down_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.gating = gating
        self.fast_compute = installed_kernels()
        self.bases = nn.ModuleList(BaseExpert(hidden, intermediate) for _ in range(groups))
        self.delta: Any = DELTA_KINDS[delta](experts, hidden, intermediate, rank) if rank else None
        self.scale = nn.Parameter(torch.ones(experts, 2 * intermediate)) if scale else None
        self.bias = nn.Parameter(torch.zeros(experts, 2 * intermediate)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if down_bias else None
        self.register_buffer("group_of_expert", torch.arange(experts) % groups)

    def reset_parameters(self) -> None:
        """Make the module usable without a checkpoint: random bases, deltas of nothing."""
        if isinstance(self.delta, LowRankDelta):
            self.delta.reset_parameters()
        for base in self.bases:
            for linear in base.children():
                nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]

    def plain_compute(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the routed experts' output with PyTorch alone."""
        tokens, top_k = top_k_index.shape
        expert_N, order_N = top_k_index.reshape(-1).sort(stable=True)
        token_N = order_N // top_k
        weight_N = top_k_weights.reshape(-1).index_select(0, order_N)
        rows_per_expert = torch.bincount(expert_N, minlength=self.num_experts).tolist()
        group_N = self.group_of_expert[expert_N]

        pair_N, token_P, pairs_per_group = self.pairs(group_N, token_N, tokens)
        x_PD = hidden_states.index_select(0, token_P)
        base_PF = self._bases(x_PD, pairs_per_group, "gate_up_proj")
        h_NF = base_PF.index_select(0, pair_N)
        if self.scale is not None:
            h_NF = h_NF * self.scale.index_select(0, expert_N)
        if self.delta is not None:
            x_ND = hidden_states.index_select(0, token_N)
            h_NF = h_NF + self.delta.gate_up(x_ND, rows_per_expert)
        if self.bias is not None:
            h_NF = h_NF + self.bias.index_select(0, expert_N)
        gate_NF, up_NF = h_NF.chunk(2, dim=-1)
        z_NF = (self.gating(gate_NF, up_NF) * weight_N.unsqueeze(-1)).to(h_NF.dtype)

        z_PF = z_NF.new_zeros(token_P.shape[0], z_NF.shape[1]).index_add(0, pair_N, z_NF)
        y_PD = self._bases(z_PF, pairs_per_group, "down_proj")
        y_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        y_TD = y_TD.index_add(0, token_P, y_PD.float())
        if self.delta is not None:
            y_ND = self.delta.down(z_NF, rows_per_expert)
            y_TD = y_TD.index_add(0, token_N, y_ND.float())
        if self.down_bias is not None:
            weight_TE = weight_of_experts(top_k_index, top_k_weights, self.num_experts)
            y_TD = y_TD + weight_TE @ self.down_bias.float()
        return y_TD.to(hidden_states.dtype)

    def pairs(
        self, group_N: Tensor, token_N: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """List the (token, group) pairs that occur, sorted by group.

        Returns each row's pair (N,), each pair's token (P,), and how many pairs each group has.
        """
        hit_GT = torch.zeros(len(self.bases), tokens, dtype=torch.bool, device=token_N.device)
        hit_GT[group_N, token_N] = True
        number_GT = hit_GT.reshape(-1).cumsum(0).reshape(hit_GT.shape) - 1
        token_P = hit_GT.nonzero()[:, 1]
        return number_GT[group_N, token_N], token_P, hit_GT.sum(1).tolist()

    def _bases(self, x_PI: Tensor, pairs_per_group: list[int], name: str) -> Tensor:
        """Apply each group's base layer ``name`` to its pairs, (P, I) to (P, O)."""
        parts = x_PI.split(pairs_per_group)
        outputs = [
            of_few_rows(getattr(base, name), part)
            for base, part in zip(self.bases, parts, strict=True)
            if part.shape[0]
        ]
        if not outputs:
            return x_PI.new_zeros(0, getattr(self.bases[0], name).out_features)
        return torch.cat(outputs)


class MixtureDelta(nn.Module):
    """Adapters of an older layout, for one projection: every member has its own, mixed by shares.

    ``delta(u_p) = sum over chosen members e of  s_pe * b_e (a_e u_p)``. Parameters: ``a``
    (E, R, I), ``b`` (E, O, R).
    """

    def __init__(self, experts: int, groups: int, rank: int, inner: int, outer: int) -> None:  # noqa: ARG002
        super().__init__()
        self.a = nn.Parameter(torch.zeros(experts, rank, inner))
        self.b = nn.Parameter(torch.zeros(experts, outer, rank))

    def forward(self, u_PI: Tensor, rows: "ChosenMembers") -> Tensor:
        """Return what is added to a projection of (P, I), (P, O)."""
        inner_NR = expert_linear(u_PI.index_select(0, rows.pair_N), self.a, rows.rows_per_expert)
        outer_NO = expert_linear(inner_NR, self.b, rows.rows_per_expert)
        mixed_NO = (outer_NO * rows.share_N.unsqueeze(-1)).to(u_PI.dtype)
        return u_PI.new_zeros(len(u_PI), self.b.shape[1]).index_add(0, rows.pair_N, mixed_NO)


class MaskedDelta(nn.Module):
    """Adapters of an older layout, for one projection: one a group, its ranks weighed by members.

    ``delta(u_p) = b_g ((sum over chosen members e of s_pe mask_e) * (a_g u_p))``. Parameters: ``a``
    (G, R, I), ``b`` (G, O, R), ``mask`` (E, R).
    """

    def __init__(self, experts: int, groups: int, rank: int, inner: int, outer: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(groups, rank, inner))
        self.b = nn.Parameter(torch.zeros(groups, outer, rank))
        self.mask = nn.Parameter(torch.zeros(experts, rank))

    def forward(self, u_PI: Tensor, rows: "ChosenMembers") -> Tensor:
        """Return what is added to a projection of (P, I), (P, O)."""
        mask_NR = self.mask.index_select(0, rows.expert_N) * rows.share_N.unsqueeze(-1)
        zero_PR = u_PI.new_zeros(len(u_PI), self.mask.shape[1])
        mask_PR = zero_PR.index_add(0, rows.pair_N, mask_NR.to(u_PI.dtype))
        inner_PR = expert_linear(u_PI, self.a, rows.pairs_per_group) * mask_PR
        return expert_linear(inner_PR, self.b, rows.pairs_per_group)


class ChosenMembers:
    """Which members of its groups a token chose: rows sorted by expert, pairs by group.

    ``share_N`` are the members' shares s of a pair (their softmax), ``weight_P`` the sum of their
    weights. Shares below ``least`` count as nothing.
    """

    def __init__(
        self,
        expert_N: Tensor,
        pair_N: Tensor,
        weight_N: Tensor,
        rows_per_expert: list[int],
        pairs_per_group: list[int],
        least: float,
    ) -> None:
        self.expert_N, self.pair_N = expert_N, pair_N
        self.rows_per_expert, self.pairs_per_group = rows_per_expert, pairs_per_group
        pairs = sum(pairs_per_group)
        # A member whose weight is zero counts as one that was not chosen.
        known_N = weight_N.float().masked_fill(weight_N == 0, -1e9)
        top_P = known_N.new_full((pairs,), -torch.inf).scatter_reduce(0, pair_N, known_N, "amax")
        part_N = (known_N - top_P.index_select(0, pair_N)).exp()
        total_P = part_N.new_zeros(pairs).index_add(0, pair_N, part_N)
        share_N = part_N / total_P.index_select(0, pair_N)
        self.share_N = share_N.masked_fill(share_N <= least, 0) if least else share_N
        self.weight_P = part_N.new_zeros(pairs).index_add(0, pair_N, weight_N.float())


MULTIPLEXED: dict[str, tuple[type[nn.Module], float]] = {
    "multiplexed_mixture": (MixtureDelta, 0.0),
    "multiplexed_later_mixture": (MixtureDelta, 1e-6),
    "multiplexed_lora": (MaskedDelta, 0.0),
}
"""Kinds of adapters of the older layout, and the share up to which a member's count as nothing."""


class MultiplexDelta(nn.Module):
    """All adapters of a layer in the older layout; ``shift`` (E, D) is what members add to x."""

    def __init__(
        self, kind: str, experts: int, groups: int, rank: int, hidden: int, intermediate: int
    ) -> None:
        super().__init__()
        made, _ = MULTIPLEXED[kind]
        self.shift = nn.Parameter(torch.zeros(experts, hidden))
        self.gate = made(experts, groups, rank, hidden, intermediate)
        self.up = made(experts, groups, rank, hidden, intermediate)
        self.down = made(experts, groups, rank, intermediate, hidden)


class MultiplexedExperts(FusedExperts):
    """Experts of checkpoints in the layout of March and April 2025, as its formula has them.

    For a group g that a token chose members of, with weights v_j and c their sum::

        s = softmax over the chosen j of v_j          x' = x + sum_j s_j shift_j
        L(u) = W_g u + delta(u)                       for gate, up and down
        y_g = c * L_down( act(L_gate(x')) * L_up(x') )

    Members are mixed before the non-linearity, so no rank makes this a sum of the original
    experts; it is here for compatibility and comparison. ``kind`` is a name in ``MULTIPLEXED``.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: int,
        groups: int,
        rank: int,
        gating: Gating,
        *,
        kind: str,
    ) -> None:
        super().__init__(hidden, intermediate, experts, groups, 0, gating)
        self.delta = MultiplexDelta(kind, experts, groups, rank, hidden, intermediate)
        _, self.least = MULTIPLEXED[kind]

    def compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the routed experts' output; see ``forward``."""
        tokens, top_k = top_k_index.shape
        expert_N, order_N = top_k_index.reshape(-1).sort(stable=True)
        token_N = order_N // top_k
        rows_per_expert = torch.bincount(expert_N, minlength=self.num_experts).tolist()
        group_N = self.group_of_expert[expert_N]
        pair_N, token_P, pairs_per_group = self.pairs(group_N, token_N, tokens)
        weight_N = top_k_weights.reshape(-1).index_select(0, order_N)
        rows = ChosenMembers(
            expert_N, pair_N, weight_N, rows_per_expert, pairs_per_group, self.least
        )
        shift_ND = self.delta.shift.index_select(0, expert_N) * rows.share_N.unsqueeze(-1)
        x_PD = hidden_states.index_select(0, token_P)
        x_PD = x_PD.index_add(0, pair_N, shift_ND.to(x_PD.dtype))
        gate_PF, up_PF = self._bases(x_PD, pairs_per_group, "gate_up_proj").chunk(2, dim=-1)
        gate_PF = gate_PF + self.delta.gate(x_PD, rows)
        z_PF = self.gating(gate_PF, up_PF + self.delta.up(x_PD, rows))
        y_PD = self._bases(z_PF, pairs_per_group, "down_proj") + self.delta.down(z_PF, rows)
        y_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        y_TD = y_TD.index_add(0, token_P, y_PD.float() * rows.weight_P.unsqueeze(-1))
        return y_TD.to(hidden_states.dtype)


CODED: dict[str, tuple[int, int]] = {
    "1": (8, 8),
    "1.14": (7, 8),
    "1.33": (6, 8),
    "1.6": (5, 8),
    "2": (4, 8),
    "3": (2, 6),
    "4": (2, 8),
    "8": (1, 8),
}
"""By bits of a number: how many neighbours one code stands for, and the bits of that code."""


class PlainRows(nn.Module):
    """Rows as they are: ``weight`` (parts * rows, width), one part after another.

    A matrix, because vLLM takes a module named ``experts`` that holds nothing but 3-D parameters
    for an ordinary Mixture-of-Experts layer and puts its own in its place.
    """

    def __init__(self, parts: int, rows: int, width: int) -> None:
        super().__init__()
        self.shape = (parts, rows, width)
        self.weight = nn.Parameter(torch.empty(parts * rows, width))

    def read(self, start: int, stop: int) -> Tensor:
        """Return some of the rows, (parts, stop - start, width)."""
        return self.weight.view(self.shape)[:, start:stop]


class CodedRows(nn.Module):
    """Rows of few bits: codes name the entries of one codebook, and every row has a scale.

    ``codes`` (parts, rows, B) bytes, ``codebook`` (entries, V), ``scale`` (parts, rows).
    """

    codes: Tensor

    def __init__(self, bits: str, parts: int, rows: int, width: int) -> None:
        super().__init__()
        self.vector, self.code_bits = CODED[bits]
        self.width = width
        self.count = -(-width // self.vector)
        row_bytes = -(-self.count * self.code_bits // 8)
        self.codebook = nn.Parameter(torch.zeros(2**self.code_bits, self.vector))
        self.scale = nn.Parameter(torch.ones(parts, rows))
        self.register_buffer("codes", torch.zeros(parts, rows, row_bytes, dtype=torch.uint8))

    def read(self, start: int, stop: int) -> Tensor:
        """Return some of the rows, (parts, stop - start, width), in the dtype of the scales."""
        return self._decoded(self.codes[:, start:stop], self.scale[:, start:stop])

    def read_parts(self, part_U: Tensor | slice) -> Tensor:
        """Return all rows of some parts, (U, rows, width), in the dtype of the scales."""
        return self._decoded(self.codes[part_U], self.scale[part_U])

    def _decoded(self, packed_PMB: Tensor, scale_PM: Tensor) -> Tensor:
        code_PMC = unpack_codes(packed_PMB, self.code_bits, self.count)
        rows_PMI = self.codebook[code_PMC].flatten(-2)[..., : self.width]
        return rows_PMI * scale_PM.unsqueeze(-1)


def unpack_codes(packed_B: Tensor, code_bits: int, count: int) -> Tensor:
    """Return the codes, (..., count) int64, of ``packed_B`` (..., B) bytes.

    Codes of 8 bits are the bytes; four codes of 6 bits fill three bytes, the first code lowest.
    """
    if code_bits == 8:
        return packed_B.long()
    padded = nn.functional.pad(packed_B, (0, -packed_B.shape[-1] % 3)).long()
    low, middle, high = padded.unflatten(-1, (-1, 3)).unbind(-1)
    word = low + (middle << 8) + (high << 16)
    return torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], -1).flatten(-2)[
        ..., :count
    ]


def make_rows(bits: str, parts: int, rows: int, width: int) -> nn.Module:
    """Make room for (parts, rows, width) numbers of ``bits`` bits; "16" is the model's dtype."""
    if bits == "16":
        return PlainRows(parts, rows, width)
    return CodedRows(bits, parts, rows, width)


def by_bits(neurons: dict[str, int]) -> list[str]:
    """Return the numbers of bits in the order in which their neurons lie, the fewest first."""
    return sorted(neurons, key=float)


def own_name(bits: str) -> str:
    """Return what the rows of so many bits are called in the module: ``bits1_6`` for "1.6"."""
    return "bits" + bits.replace(".", "_")


class NeuronExperts(OpaqueExperts):
    """A drop-in for a Transformers experts module: own neurons at unequal bits, shared neurons.

    Arguments: ``hidden`` D, ``experts`` E, ``gating`` the teacher's, ``neurons`` how many of the
    layer's neurons have how many bits, ``shared`` S, ``shared_bits`` and ``gain_bits`` the bits of
    the shared neurons and of their gains, ``biased`` whether gate, up and down have biases, which
    are not coded. Neurons of one number of bits lie one expert after another; ``widths`` (number of
    bit widths, E) says how many each expert has.
    """

    widths: Tensor

    def __init__(
        self,
        hidden: int,
        experts: int,
        gating: Gating,
        *,
        neurons: dict[str, int],
        shared: int = 0,
        shared_bits: str = "16",
        gain_bits: str = "16",
        biased: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.gating = gating
        self.fast_compute = installed_kernels()
        # A saved configuration has its keys in the order of the alphabet, 16 before 2.
        self.own = nn.ModuleDict(
            {own_name(bits): make_rows(bits, 3, neurons[bits], hidden) for bits in by_bits(neurons)}
        )
        self.shared = make_rows(shared_bits, 3, shared, hidden) if shared else None
        self.gain = make_rows(gain_bits, 1, experts, shared) if shared else None
        own_bias = {own_name(bits): PlainRows(2, neurons[bits], 1) for bits in by_bits(neurons)}
        self.own_bias = nn.ModuleDict(own_bias) if biased else None
        self.shared_bias = PlainRows(2, shared, 1) if shared and biased else None
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden)) if biased else None
        self.register_buffer("widths", torch.zeros(len(neurons), experts, dtype=torch.int32))

    def reset_parameters(self) -> None:
        """Make the module usable without a checkpoint: random plain rows, codes of nothing."""
        for module in self.modules():
            if isinstance(module, PlainRows):
                nn.init.normal_(module.weight, std=0.02)

    def plain_compute(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the routed experts' output with PyTorch alone."""
        y_TD = torch.zeros_like(hidden_states, dtype=torch.float32)
        expert_N, order_N = top_k_index.reshape(-1).sort(stable=True)
        token_N = order_N // top_k_index.shape[1]
        if len(token_N):
            weight_N = top_k_weights.reshape(-1).index_select(0, order_N)
            rows_per_expert = torch.bincount(expert_N, minlength=self.num_experts).tolist()
            y_ND = self._own(hidden_states, token_N, weight_N, rows_per_expert)
            y_TD = y_TD.index_add(0, token_N, y_ND.float())
        if self.shared is not None or self.down_bias is not None:
            weight_TE = weight_of_experts(top_k_index, top_k_weights, self.num_experts)
            if self.shared is not None:
                y_TD = y_TD + self._shared(hidden_states, weight_TE).float()
            if self.down_bias is not None:
                y_TD = y_TD + weight_TE @ self.down_bias.float()
        return y_TD.to(hidden_states.dtype)

    def _own(
        self, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, rows_per_expert: list[int]
    ) -> Tensor:
        """Return what every row's expert makes of it with its own neurons, (N, D)."""
        widths = self.widths.tolist()
        starts = [0] * len(widths)
        outputs, row = [], 0
        for expert, rows in enumerate(rows_per_expert):
            spans = [
                (start, start + width[expert]) for start, width in zip(starts, widths, strict=True)
            ]
            starts = [stop for _, stop in spans]
            if rows:
                x_ND = x_TD.index_select(0, token_N[row : row + rows])
                y_ND = self._neurons(x_ND, spans, weight_N[row : row + rows])
                outputs.append(y_ND)
                row += rows
        return torch.cat(outputs)

    def _neurons(self, x_ND: Tensor, spans: list[tuple[int, int]], weight_N: Tensor) -> Tensor:
        y_ND = torch.zeros_like(x_ND)
        own: Any = self.own.items()
        for (name, rows), (start, stop) in zip(own, spans, strict=True):
            if stop > start:
                gate_OD, up_OD, down_OD = rows.read(start, stop).to(x_ND.dtype).unbind(0)
                bias: Any = self.own_bias[name] if self.own_bias is not None else None
                bias_PO1 = None if bias is None else bias.read(start, stop)
                z_NO = self._joined(x_ND, gate_OD, up_OD, bias_PO1)
                y_ND = y_ND + (z_NO * weight_N.unsqueeze(-1)).to(x_ND.dtype) @ down_OD
        return y_ND

    def _shared(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """Return what the shared neurons add, (T, D): they run once, whoever was chosen."""
        shared: Any = self.shared
        gain: Any = self.gain
        bias: Any = self.shared_bias
        rows: Tensor = shared.read(0, None).to(x_TD.dtype)
        gate_SD, up_SD, down_SD = rows.unbind(0)
        gain_TS = weight_TE.to(x_TD.dtype) @ gain.read(0, None)[0].to(x_TD.dtype)
        bias_PS1 = None if bias is None else bias.read(0, None)
        z_TS = self._joined(x_TD, gate_SD, up_SD, bias_PS1) * gain_TS
        return z_TS @ down_SD

    def _joined(
        self, x_ND: Tensor, gate_OD: Tensor, up_OD: Tensor, bias_PO1: Tensor | None
    ) -> Tensor:
        """Return the values of some neurons, (N, O); ``bias_PO1`` (2, O, 1) of gate and up."""
        gate_NO, up_NO = x_ND @ gate_OD.T, x_ND @ up_OD.T
        if bias_PO1 is not None:
            gate_O, up_O = bias_PO1.to(x_ND.dtype).squeeze(-1).unbind(0)
            gate_NO, up_NO = gate_NO + gate_O, up_NO + up_O
        return self.gating(gate_NO, up_NO)


def fused_experts_like(native: Any, layer: dict[str, Any], form: dict[str, Any]) -> nn.Module:
    """Make the fused module that takes the place of a native Transformers experts module.

    ``native`` holds ``gate_up_proj`` (E, 2F, D) or, where ``form`` says ``transposed``, (E, D, 2F);
    ``layer`` is that layer's entry in the ``moefuse`` block of ``config.json`` and ``form`` the
    block's ``experts``, empty for most families.
    """
    experts, double_intermediate, hidden = native.gate_up_proj.shape
    if form.get("transposed"):
        double_intermediate, hidden = hidden, double_intermediate
    gating, biased = gating_of(native, form.get("gating")), form.get("biased", False)
    if layer.get("delta") in MULTIPLEXED:
        return MultiplexedExperts(
            hidden,
            double_intermediate // 2,
            experts,
            layer["groups"],
            layer["rank"],
            gating,
            kind=layer["delta"],
        )
    if layer.get("neurons") is not None:
        return NeuronExperts(
            hidden,
            experts,
            gating,
            neurons=layer["neurons"],
            shared=layer["shared"],
            shared_bits=layer["shared_bits"],
            gain_bits=layer["gain_bits"],
            biased=biased,
        )
    return FusedExperts(
        hidden,
        double_intermediate // 2,
        experts,
        layer["groups"],
        layer["rank"],
        gating,
        delta=layer["delta"],
        scale=layer["scale"],
        bias=layer["bias"] or biased,
        down_bias=biased,
    )


def _fuse_modules(model: nn.Module, config: PreTrainedConfig) -> None:
    """Put fused experts in the place of every native experts module below ``model``."""
    layers, form = config.moefuse["layers"], config.moefuse.get("experts", {})
    for name, module in list(model.named_modules()):
        native = getattr(module, "experts", None)
        if not isinstance(getattr(native, "gate_up_proj", None), nn.Parameter):
            continue
        number = next(part for part in name.split(".") if part.isdigit())
        fused: Any = fused_experts_like(native, layers[number], form)
        fused.reset_parameters()
        module.experts = fused


class _FusedInit:
    """First among a fused class's bases: builds the native model, then swaps its experts."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _fuse_modules(self, config)  # type: ignore[arg-type]


def _subclass(native: type, bases: tuple[type, ...], **attributes: Any) -> type:
    name = CLASS_PREFIX + native.__name__
    return type(name, bases, {"__module__": __name__, "__doc__": native.__doc__, **attributes})


@cache
def fused_classes(
    model_type: str,
) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Derive the fused configuration, base model and causal language model of a native family.

    ``model_type`` is the teacher's own, for example ``deepseek_v2``. The fused model type is
    another one, so that no tool takes a fused checkpoint for the native architecture and fills the
    missing experts with random numbers.
    """
    native_config: Any = configuration_auto.CONFIG_MAPPING[model_type]
    native_model: Any = modeling_auto.MODEL_MAPPING[native_config]
    native_causal: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[native_config]
    config = _subclass(native_config, (native_config,), model_type=MODEL_TYPE_PREFIX + model_type)
    model = _subclass(native_model, (_FusedInit, native_model), config_class=config)
    causal = _subclass(native_causal, (_FusedInit, native_causal), config_class=config)
    for cls, auto_class in (
        (config, "AutoConfig"),
        (model, "AutoModel"),
        (causal, "AutoModelForCausalLM"),
    ):
        cls.register_for_auto_class(auto_class)
    return config, model, causal


def _names_own_class(native_name: str, model_type: str) -> bool:
    """Tell whether a class belongs to a model type, and not only stands in for the lack of one."""
    native: Any = getattr(transformers, native_name)
    config: Any = configuration_auto.CONFIG_MAPPING[model_type]
    return native is config or getattr(native, "config_class", None) is config


def __getattr__(name: str) -> type:
    """Find a fused class by name, which is how ``auto_map`` in ``config.json`` asks for it."""
    native_name = name.removeprefix(CLASS_PREFIX)
    for names in NATIVE_NAMES:
        for model_type, candidate in names.items():
            if candidate == native_name != name and _names_own_class(candidate, model_type):
                classes = {cls.__name__: cls for cls in fused_classes(model_type)}
                return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
