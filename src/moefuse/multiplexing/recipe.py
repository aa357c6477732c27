"""How bases and adapters are made of the members of given groups.

The recipe of the repository moe-pruner of G. Olympie (2025), whose checkpoints are published. What
its code does is kept here, though it costs quality: members are merged with their neurons
unaligned, differences being taken from the first member; the singular values of a member's
difference from the base are divided by their mean, which throws away how large the difference is,
and the adapter is then scaled, output by output, to a tenth of the base's (``rescale``); the
routing projection, and all of a fused LoRA, start as random numbers of standard deviation 0.02.

Not as in its code: the decomposition is exact, not randomised.

Shape suffixes: E experts, M members of a group, D hidden width, F neurons, O outputs, I inputs,
R rank, Q = M * R.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moefuse.mathematics.experts import ExpertBiases, Experts
from moefuse.mathematics.lowrank import low_rank
from moefuse.mathematics.merging import mean_merge, multi_slerp, sce_merge
from moefuse.multiplexing.student import AdaptedLinear, Lora, MultiplexedExperts, MultiplexedGroup

NOISE = 0.02
"""Standard deviation of what starts as random numbers."""
SELECTED = 0.15
"""Share of coordinates that SCE selects, as in the recipe's multiplexing code."""
RESCALE_TOKENS = 2048
"""Calibration tokens that adapters are scaled on, at most."""
TINY = 1e-12

Adapters = Literal["mixture", "lora"]
"""One adapter for every member, mixed by its share, or one for a group, masked by its members."""
Merge = Callable[[Tensor], Tensor]
"""From members (M, ...) to what stands for them, (...)."""


@dataclass(frozen=True)
class Making:
    """How a group is made: what merges its members, which ``adapters`` of which ``rank`` come on
    top (none where it is 0), and whether it is told the routing by a projection."""

    merge: Merge
    adapters: Adapters | None
    rank: int
    routed: bool = True


def slerp_from_first(members_MOI: Tensor) -> Tensor:
    """Merge by multi-SLERP on the sphere around the first member."""
    return multi_slerp(members_MOI, origin=members_MOI[0])


def sce_from_first(members_MOI: Tensor) -> Tensor:
    """Merge the members' differences from the first by SCE."""
    return sce_merge(members_MOI, members_MOI[0], SELECTED)


MERGES: dict[str, Merge] = {
    "slerp": slerp_from_first,
    "sce": sce_from_first,
    "mean": mean_merge,
    "greedy": mean_merge,
}
"""Merges by the release's word. Of a greedy soup it is the mean of the members that are kept."""


@torch.no_grad()
def build(
    experts: Experts,
    group_of_expert: Tensor,
    making: Making,
    seed: int,
    kept: Callable[[Tensor], Tensor] | None = None,
) -> MultiplexedExperts:
    """Make bases and adapters for given groups, (E,) int64, adapters not yet scaled.

    ``kept`` says which of a group's members (M,) go into its base; all of them without.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for group in range(int(group_of_expert.max()) + 1):
        members_M = (group_of_expert == group).nonzero().flatten()
        based_M = members_M if kept is None else kept(members_M)
        bare = _bare_group(experts, members_M, based_M, making, generator)
        groups.append(with_adapters(bare, experts, making, generator))
    return MultiplexedExperts(groups).to(experts.gate_up_EFD.device)


def _bare_group(
    experts: Experts,
    members_M: Tensor,
    based_M: Tensor,
    making: Making,
    generator: torch.Generator,
) -> MultiplexedGroup:
    based = members_of(experts, based_M)
    hidden = based.down_EDF.shape[1]
    routing_DM = noise(hidden, len(members_M), generator) if making.routed else None
    gate, up, down = (
        AdaptedLinear(
            making.merge(weight_MOI), None, None if bias_MO is None else making.merge(bias_MO)
        )
        for weight_MOI, bias_MO in _projections(based)
    )
    return MultiplexedGroup(members_M, gate, up, down, routing_DM, experts.gating)


@torch.no_grad()
def with_adapters(
    bare: MultiplexedGroup, experts: Experts, making: Making, generator: torch.Generator
) -> MultiplexedGroup:
    """Return the group with the adapters that make up for what its bases are not, not yet scaled.

    ``bare`` has none; ``experts`` are the teacher's.
    """
    if not making.rank or making.adapters is None:
        return bare
    members = members_of(experts, bare.members)
    gate, up, down = (
        AdaptedLinear(
            base.weight.detach(),
            _adapter(weight_MOI, base.weight.detach(), making, generator),
            None if base.bias is None else base.bias.detach(),
        )
        for base, (weight_MOI, _) in zip(bare.linears(), _projections(members), strict=True)
    )
    routing_DM = None if bare.routing is None else bare.routing.detach()
    return MultiplexedGroup(bare.members, gate, up, down, routing_DM, bare.gating)


def members_of(experts: Experts, members_M: Tensor) -> Experts:
    """Return some of a layer's experts, in fp32."""
    biases = experts.biases
    if biases is not None:
        biases = ExpertBiases(biases.gate_up_EF[members_M], biases.down_ED[members_M])
    return replace(
        experts,
        gate_up_EFD=experts.gate_up_EFD[members_M],
        down_EDF=experts.down_EDF[members_M],
        biases=biases,
    ).in_fp32()


def _projections(members: Experts) -> list[tuple[Tensor, Tensor | None]]:
    """Return gate, up and down, (M, O, I), with their biases (M, O), None where there are none."""
    gate_MFD, up_MFD = members.gate_up_EFD.chunk(2, dim=1)
    if members.biases is None:
        return [(gate_MFD, None), (up_MFD, None), (members.down_EDF, None)]
    gate_MF, up_MF = members.biases.gate_up_EF.chunk(2, dim=1)
    return [(gate_MFD, gate_MF), (up_MFD, up_MF), (members.down_EDF, members.biases.down_ED)]


def _adapter(
    members_MOI: Tensor, base_OI: Tensor, making: Making, generator: torch.Generator
) -> Lora:
    if making.adapters == "mixture":
        return Lora(*levelled_factors(members_MOI - base_OI, making.rank))
    members, outputs, inputs = members_MOI.shape
    a_RI, b_OR = noise(making.rank, inputs, generator), noise(outputs, making.rank, generator)
    return Lora(a_RI, b_OR, noise(making.rank, members, generator)).to(base_OI.device)


def levelled_factors(delta_MOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor differences from a base, singular values divided by their mean over the rank.

    Returns ``a`` (M * R, I) and ``b`` (O, M * R), member by member.
    """
    b_MOR, a_MRI = low_rank(delta_MOI, rank)
    # A column of b has the root of its singular value as length.
    mean_M = b_MOR.square().sum(1).mean(1)
    root_M = mean_M.clamp_min(TINY).sqrt()[:, None, None]
    return (a_MRI / root_M).flatten(0, 1), (b_MOR / root_M).transpose(0, 1).flatten(1)


def noise(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return random numbers (rows, columns) fp32 of standard deviation ``NOISE``."""
    return NOISE * torch.randn(rows, columns, generator=generator)
