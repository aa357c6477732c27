"""The student of the earlier public attempt: bases, and adapters mixed before the non-linearity.

For one token x with the router's chosen experts and weights w, let v_j be w of member j of a group,
0 where it was not chosen, and c the sum of v_j. A group with c = 0 contributes nothing, otherwise::

    s    = softmax over the chosen members of v
    x'   = x + P s
    L(u) = W u + delta(u)                                           for gate, up and down alike
    y    = c * down.L( act(gate.L(x')) * up.L(x') )

    delta(u), mixture of LoRA:   scaling * sum over members j of s_j B_j (A_j u)
    delta(u), fused LoRA:        scaling * B ( (M s) * (A u) )

so a token passes a group's non-linearity once, whichever and however many members it chose. That is
the recipe of the published checkpoints, named by its authors expert multiplexing and mixture of
LoRA. Their code drops all deltas where a group receives exactly one token, as in decoding; the
formula is followed here instead, for one token as for many.

Shape suffixes: T tokens, K experts chosen per token, E experts, M members of a group, P tokens that
chose any of them, D hidden width, O outputs, I inputs, R rank, Q = M * R rows of a mixture's
factors, or R of a fused LoRA's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moefuse.mathematics.experts import ExpertsCall, Gating

ADAPTER_SHARE = 0.1
"""Mean absolute output that an adapter starts with, of that of its base weight."""
TINY = 1e-8


class Lora(nn.Module):
    """Low-rank adapters of one matrix, mixed by the group's routing weights.

    Parameters, fp32: ``a`` (Q, I), ``b`` (O, Q), ``scaling`` (O,). Without ``mixing`` each member
    has R rows of ``a`` and columns of ``b`` of its own, member by member (mixture of LoRA);
    with ``mixing`` (R, M) members share them and differ by their column of it (fused LoRA).
    """

    def __init__(self, a_QI: Tensor, b_OQ: Tensor, mixing_RM: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a_QI), nn.Parameter(b_OQ)
        self.mixing = None if mixing_RM is None else nn.Parameter(mixing_RM)
        self.scaling = nn.Parameter(torch.ones_like(b_OQ[:, 0]))

    def forward(self, u_PI: Tensor, s_PM: Tensor) -> Tensor:
        """Return what the adapters add to the base's output, (P, O)."""
        return self.scaling * self.mixed(u_PI, s_PM)

    def mixed(self, u_PI: Tensor, s_PM: Tensor) -> Tensor:
        """Return the same before it is scaled."""
        if self.mixing is None:
            gain_PQ = s_PM.repeat_interleave(len(self.a) // s_PM.shape[1], dim=1)
        else:
            gain_PQ = linear(s_PM, self.mixing)
        return linear(linear(u_PI, self.a) * gain_PQ, self.b)


class AdaptedLinear(nn.Module):
    """A base ``weight`` (O, I) fp32, its ``bias`` (O,) and ``adapter``, unless these are None."""

    def __init__(
        self, weight_OI: Tensor, adapter: Lora | None, bias_O: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI)
        self.bias = None if bias_O is None else nn.Parameter(bias_O)
        self.adapter = adapter

    def forward(self, u_PI: Tensor, s_PM: Tensor) -> Tensor:
        """Return the output, (P, O), of inputs (P, I) under routing weights (P, M)."""
        output_PO = linear(u_PI, self.weight, self.bias)
        return output_PO if self.adapter is None else output_PO + self.adapter(u_PI, s_PM)

    def rescale(self, u_PI: Tensor, s_PM: Tensor) -> None:
        """Scale each output of the adapter to ``ADAPTER_SHARE`` of the base's over those inputs."""
        if self.adapter is None:
            return
        base_O = linear(u_PI, self.weight, self.bias).abs().mean(0)
        added_O = self.adapter.mixed(u_PI, s_PM).abs().mean(0)
        self.adapter.scaling.copy_(ADAPTER_SHARE * base_O / added_O.clamp_min(TINY))


class MultiplexedGroup(nn.Module):
    """One fused expert: what the original experts ``members`` (M,) int64 have become.

    ``routing`` (D, M) is the projection P that is added to the input, or None.
    """

    members: Tensor

    def __init__(
        self,
        members_M: Tensor,
        gate: AdaptedLinear,
        up: AdaptedLinear,
        down: AdaptedLinear,
        routing_DM: Tensor | None,
        gating: Gating,
    ) -> None:
        super().__init__()
        self.register_buffer("members", members_M)
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.routing = None if routing_DM is None else nn.Parameter(routing_DM)
        self.gating = gating

    def forward(self, x_PD: Tensor, s_PM: Tensor) -> Tensor:
        """Return the group's output, (P, D), before it is weighted by c."""
        x_PD = self._told_routing(x_PD, s_PM)
        return self.down_proj(self._neurons(x_PD, s_PM), s_PM)

    @torch.no_grad()
    def rescale(self, x_PD: Tensor, s_PM: Tensor) -> None:
        """Scale all adapters to their share of the base, in the order in which they are used."""
        x_PD = self._told_routing(x_PD, s_PM)
        self.gate_proj.rescale(x_PD, s_PM)
        self.up_proj.rescale(x_PD, s_PM)
        self.down_proj.rescale(self._neurons(x_PD, s_PM), s_PM)

    def linears(self) -> tuple[AdaptedLinear, AdaptedLinear, AdaptedLinear]:
        """Return gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def active_numbers(self) -> tuple[int, int]:
        """Return the numbers that any token passes here, and those more for each chosen member."""
        total = sum(parameter.numel() for parameter in self.parameters())
        adapters = (linear.adapter for linear in self.linears())
        own = 0 if self.routing is None else self.routing.numel()
        for adapter in adapters:
            if adapter is not None:
                mixed = (adapter.a, adapter.b) if adapter.mixing is None else (adapter.mixing,)
                own += sum(parameter.numel() for parameter in mixed)
        return total - own, own // len(self.members)

    def _told_routing(self, x_PD: Tensor, s_PM: Tensor) -> Tensor:
        return x_PD if self.routing is None else x_PD + linear(s_PM, self.routing)

    def _neurons(self, x_PD: Tensor, s_PM: Tensor) -> Tensor:
        return self.gating(self.gate_proj(x_PD, s_PM), self.up_proj(x_PD, s_PM))


class MultiplexedExperts(nn.Module):
    """The routed experts of one layer as ``groups`` of multiplexed ones; the router stays.

    The groups' members are all E experts, each once.
    """

    def __init__(self, groups: list[MultiplexedGroup]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.num_experts = sum(len(group.members) for group in groups)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output, (T, D), of ``x_TD`` fp32.

        ``index_TK`` (T, K) int64 are the chosen experts, different ones for a token, ``weight_TK``
        (T, K) fp32 their positive weights.
        """
        y_TD = torch.zeros_like(x_TD)
        for group, token_P, s_PM, c_P in self._routes(index_TK, weight_TK):
            y_PD = c_P[:, None] * group(x_TD.index_select(0, token_P), s_PM)
            y_TD = y_TD.index_add(0, token_P, y_PD)
        return y_TD

    def rescale(self, call: ExpertsCall) -> None:
        """Scale the adapters to a tenth of their bases' outputs on the tokens of ``call``.

        Adapters of groups that no token of it chose keep their scaling.
        """
        for group, token_P, s_PM, _ in self._routes(call.index_TK.long(), call.weight_TK):
            group.rescale(call.x_TD.index_select(0, token_P), s_PM)

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes.

        That is when its ``top_k`` experts lie in as many groups as there are, and the largest.
        """
        counted = [group.active_numbers() for group in self.listed()]
        shared = sorted((shared for shared, _ in counted), reverse=True)[:top_k]
        return sum(shared) + min(top_k, self.num_experts) * max(own for _, own in counted)

    def listed(self) -> list[MultiplexedGroup]:
        """Return the groups, whose order means nothing."""
        return [group for group in self.groups if isinstance(group, MultiplexedGroup)]

    def _routes(
        self, index_TK: Tensor, weight_TK: Tensor
    ) -> Iterator[tuple[MultiplexedGroup, Tensor, Tensor, Tensor]]:
        """For each group that is chosen: its tokens (P,), s (P, M) and c (P,)."""
        v_TE = weight_TK.new_zeros(len(index_TK), self.num_experts)
        v_TE = v_TE.scatter(1, index_TK, weight_TK)
        for group in self.listed():
            v_TM = v_TE.index_select(1, group.members)
            token_P = v_TM.sum(1).nonzero().flatten()
            if len(token_P):
                v_PM = v_TM.index_select(0, token_P)
                s_PM = v_PM.masked_fill(v_PM == 0, -torch.inf).softmax(dim=1)
                yield group, token_P, s_PM, v_PM.sum(1)
