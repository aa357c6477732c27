"""How the earlier public attempt makes its fused experts: groups, bases, adapters, sizes.

The recipe of the repository moe-pruner of G. Olympie (2025), whose checkpoints are published, and
the variants that its README lists:

| its name | here |
|---|---|
| top-k pruning | ``frequency``: the experts that most tokens chose, with their rows of the router |
| activation clustering | the grouping of all ``multiplex-*`` but the next |
| state clustering | ``multiplex-output-clusters`` |
| progressive merge | ``multiplex-halving`` |
| multiplexage | ``multiplex-bases-only`` |
| fused LoRA | ``multiplex-fused-lora`` |
| mixture of LoRA | ``multiplex-mixture-of-lora``, the full recipe |
| multi-SLERP, SCE, naive averaging | the full recipe, ``multiplex-sce``, ``multiplex-mean`` |

What its code does, kept here though it costs quality: members are merged with their neurons
unaligned, differences being taken from the first member; the singular values of a member's
difference from the base are divided by their mean, which throws away how large the difference is,
and the adapter is then scaled, output by output, to a tenth of the base's (``rescale``); the
routing projection, and all of a fused LoRA, start as random numbers of standard deviation 0.02.

Not as in its code: its clusterings of the first two variants also merge the router's rows, where
here the teacher's router stays; the decomposition is exact, not randomised; and a single token is
not denied its adapters.

Shape suffixes: E experts, M members of a group, S sampled tokens, C of them at a time, D hidden
width, F neurons, O outputs, I inputs, R rank, Q = M * R.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing import (
    AdaptedLinear,
    Lora,
    MultiplexedExperts,
    MultiplexedGroup,
)
from moefuse.mathematics.clustering import canonical
from moefuse.mathematics.lowrank import low_rank
from moefuse.mathematics.merging import multi_slerp, sce_merge

NOISE = 0.02
"""Standard deviation of what starts as random numbers."""
SELECTED = 0.15
"""Share of coordinates that SCE selects, as in the recipe's multiplexing code."""
TOKENS = 2048
"""Calibration tokens that adapters are scaled on, at most."""
STATE_TOKENS = 256
"""Calibration tokens that outputs are compared on, at most."""
CHUNK = 32
"""Tokens whose outputs of every expert are held at once."""
TINY = 1e-12

Adapters = Literal["mixture", "fused"]


@dataclass(frozen=True)
class Recipe:
    """A variant: how members (M, O, I) become a base (O, I), how alike experts are (E, E) fp64,
    and which adapters are added, if any."""

    merge: Callable[[Tensor], Tensor]
    affinity: Callable[[Layer], Tensor]
    adapters: Adapters | None


@dataclass(frozen=True)
class Size:
    """What a budget buys: bases, the adapters' rank, and whether the routing projection fits."""

    groups: int
    rank: int
    routed: bool


def slerp_from_first(members_MOI: Tensor) -> Tensor:
    """Merge by multi-SLERP on the sphere around the first member."""
    return multi_slerp(members_MOI, origin=members_MOI[0])


def sce_from_first(members_MOI: Tensor) -> Tensor:
    """Merge the members' differences from the first by SCE."""
    return sce_merge(members_MOI, members_MOI[0], SELECTED)


def coactivation(layer: Layer) -> Tensor:
    """Return how many tokens chose both of two experts, (E, E) fp64."""
    return layer.statistics.coactivation_EE


def output_states(layer: Layer) -> Tensor:
    """Return the mean over tokens of the cosine of two experts' outputs, (E, E) fp64."""
    count = len(layer.experts.gate_up_EFD)

    def run(x_CD: Tensor) -> Tensor:
        return torch.stack([layer.experts.run(expert, x_CD) for expert in range(count)])

    return mean_cosine(run, layer.call.x_TD[:STATE_TOKENS])


def mean_cosine(run: Callable[[Tensor], Tensor], x_SD: Tensor) -> Tensor:
    """Return the mean over tokens of the cosine of every two outputs, fp64 on the CPU.

    ``run`` maps tokens (C, D) to all outputs for them, (E, C, D).
    """
    total_EE = 0.0
    for x_CD in x_SD.split(CHUNK):
        output_ECD = run(x_CD).double()
        unit_ECD = output_ECD / output_ECD.norm(dim=-1, keepdim=True).clamp_min(TINY)
        total_EE = total_EE + torch.einsum("ecd,fcd->ef", unit_ECD, unit_ECD)
    return torch.as_tensor(total_EE / len(x_SD)).cpu()


def equal_groups(affinity_EE: Tensor, groups: int) -> Tensor:
    """Divide experts into groups of equal size, or of sizes one apart, the most alike first.

    A group starts at an expert of the most alike pair that is left and takes the expert most alike
    to its members, summed, until it is full. Returns ``group_of_expert`` (E,) int64.
    """
    experts = len(affinity_EE)
    alike_EE = affinity_EE.double().clone().fill_diagonal_(-torch.inf)
    left_E = torch.ones(experts, dtype=torch.bool)
    group_of_expert = torch.empty(experts, dtype=torch.int64)
    for group in range(groups):
        members: list[int] = []
        for _ in range(experts // groups + (group < experts % groups)):
            members.append(_next_member(alike_EE, left_E, members))
            left_E[members[-1]] = False
        group_of_expert[members] = group
    return canonical(group_of_expert)


def _next_member(alike_EE: Tensor, left_E: Tensor, members: list[int]) -> int:
    if members:
        score_E = alike_EE[members].sum(0)
    else:
        score_E = alike_EE.masked_fill(~left_E, -torch.inf).max(1).values
    candidates = left_E.nonzero().flatten()
    return int(candidates[score_E[candidates].argmax()])


def student_numbers(layer: Layer, size: Size, adapters: Adapters | None) -> int:
    """Count the numbers that a student of that size holds."""
    experts, double_intermediate, hidden = layer.experts.gate_up_EFD.shape
    intermediate = double_intermediate // 2
    numbers = size.groups * 3 * hidden * intermediate
    if size.routed:
        numbers += experts * hidden
    if size.rank:
        pairs = experts if adapters == "mixture" else size.groups
        numbers += pairs * 3 * size.rank * (hidden + intermediate)
        numbers += size.groups * (double_intermediate + hidden)
        numbers += 0 if adapters == "mixture" else 3 * experts * size.rank
    return numbers


def choose_size(layer: Layer, numbers: int, adapters: Adapters | None) -> Size:
    """Choose what fits ``numbers`` numbers; raises ``TooSmallError`` where no base does.

    With adapters, bases take half of the numbers and adapters of the highest rank that fits the
    rest. Without them, or where none of rank 1 fits, as many bases as fit beside the routing
    projection; where not even one does, the projection is left out.
    """
    room = layer.experts_within(numbers)
    _, double_intermediate, hidden = layer.experts.gate_up_EFD.shape

    def fits(size: Size) -> bool:
        return student_numbers(layer, size, adapters) <= numbers

    found: list[Size] = []
    if adapters:
        groups = max(1, room // 2)
        highest = min(hidden, double_intermediate // 2)
        found = [Size(groups, rank, routed=True) for rank in range(1, highest + 1)]
    fitting = [size for size in found if fits(size)]
    if not fitting:
        bare = [Size(groups, 0, routed=True) for groups in range(1, room + 1)]
        fitting = [size for size in bare if fits(size)]
    return fitting[-1] if fitting else Size(room, 0, routed=False)


@torch.no_grad()
def multiplex(layer: Layer, numbers: int, recipe: Recipe) -> MultiplexedExperts:
    """Make the student of at most ``numbers`` numbers; raises ``TooSmallError`` as told above."""
    size = choose_size(layer, numbers, recipe.adapters)
    group_of_expert = equal_groups(recipe.affinity(layer), size.groups)
    student = build(layer, group_of_expert, recipe, size)
    student.rescale(layer.call.rows(slice(0, TOKENS)))
    return student


@torch.no_grad()
def build(layer: Layer, group_of_expert: Tensor, recipe: Recipe, size: Size) -> MultiplexedExperts:
    """Make bases and adapters for given groups, (E,) int64, adapters not yet scaled."""
    generator = torch.Generator().manual_seed(layer.seed)
    groups = []
    for group in range(int(group_of_expert.max()) + 1):
        members_M = (group_of_expert == group).nonzero().flatten()
        groups.append(_make_group(layer, members_M, recipe, size, generator))
    return MultiplexedExperts(groups).to(layer.experts.gate_up_EFD.device)


def _make_group(
    layer: Layer, members_M: Tensor, recipe: Recipe, size: Size, generator: torch.Generator
) -> MultiplexedGroup:
    def adapted(members_MOI: Tensor, bias_MO: Tensor | None) -> AdaptedLinear:
        bias_O = None if bias_MO is None else recipe.merge(bias_MO)
        return _adapted(members_MOI, bias_O, recipe, size.rank, generator)

    experts = layer.experts.in_fp32()
    gate_MFD, up_MFD = experts.gate_up_EFD[members_M].chunk(2, dim=1)
    down_MDF = experts.down_EDF[members_M]
    gate_MF, up_MF, down_MD = None, None, None
    if experts.biases is not None:
        gate_MF, up_MF = experts.biases.gate_up_EF[members_M].chunk(2, dim=1)
        down_MD = experts.biases.down_ED[members_M]
    routing_DM = noise(down_MDF.shape[1], len(members_M), generator) if size.routed else None
    linears = adapted(gate_MFD, gate_MF), adapted(up_MFD, up_MF), adapted(down_MDF, down_MD)
    return MultiplexedGroup(members_M, *linears, routing_DM, experts.gating)


def _adapted(
    members_MOI: Tensor,
    bias_O: Tensor | None,
    recipe: Recipe,
    rank: int,
    generator: torch.Generator,
) -> AdaptedLinear:
    base_OI = recipe.merge(members_MOI)
    if not rank:
        return AdaptedLinear(base_OI, None, bias_O)
    if recipe.adapters == "mixture":
        adapter = Lora(*levelled_factors(members_MOI - base_OI, rank))
        return AdaptedLinear(base_OI, adapter, bias_O)
    members, outputs, inputs = members_MOI.shape
    a_RI, b_OR = noise(rank, inputs, generator), noise(outputs, rank, generator)
    return AdaptedLinear(base_OI, Lora(a_RI, b_OR, noise(rank, members, generator)), bias_O)


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
