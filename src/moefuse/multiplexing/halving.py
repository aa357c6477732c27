"""Progressive merge: halve the number of bases again and again, with training in between.

Each halving pairs the bases whose outputs for the same tokens are most alike and merges each pair;
then, if there are more halvings to come, the student is trained for ``STEPS`` steps of Adam on the
recorded tokens against what the teacher's layer returned.

Not as in the release's code: the router stays, and a merged base keeps its members' columns of the
routing projection, where the code drops the second's row of the router; bases are trained
themselves, not low-rank adapters of them; and outputs are compared, where the code compares by
mistake the inputs.

Shape suffixes: S sampled tokens, C of them at a time, D hidden width.
"""

import torch
from torch import Tensor, nn

from moefuse.mathematics.clustering import equal_groups
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import power_of, relative_error, student_output
from moefuse.mathematics.merging import mean_merge, sce_merge
from moefuse.mathematics.similarity import STATE_TOKENS, mean_cosine
from moefuse.multiplexing.recipe import Making, Merge, build, slerp_from_first
from moefuse.multiplexing.student import AdaptedLinear, MultiplexedExperts, MultiplexedGroup

STEPS = 30
"""Steps of training between two halvings."""
BATCH_TOKENS = 256
LEARNING_RATE = 2e-3
"""That of layer distillation; the recipe's 3e-4 is for many more steps."""
SELECTED = 0.25
"""Share of coordinates that SCE selects of a pair, as in the recipe's halving code."""


def sce_of_pair(members: Tensor) -> Tensor:
    """Merge the second of two members into the first by SCE."""
    return sce_merge(members, members[0], SELECTED)


PAIR_MERGES: dict[str, Merge] = {
    "sce": sce_of_pair,
    "slerp": slerp_from_first,
    "mean": mean_merge,
}
"""Merges that halving knows, by the release's word."""


def halve(
    experts: Experts,
    call: ExpertsCall,
    groups: int,
    seed: int,
    *,
    merge: Merge = sce_of_pair,
    routed: bool = True,
) -> MultiplexedExperts:
    """Halve a layer's experts until ``groups`` bases without adapters are left.

    ``call`` in fp32; ``routed`` says whether groups are told the routing by a projection. After the
    last halving nothing is trained.
    """
    each = torch.arange(len(experts.gate_up_EFD), device=experts.gate_up_EFD.device)
    student = build(experts, each, Making(merge, None, 0, routed), seed)
    generator = torch.Generator().manual_seed(seed)
    while len(student.groups) > groups:
        if len(student.groups) < len(each):
            train(student, call, generator)
        fewer = max(groups, (len(student.groups) + 1) // 2)
        student = halved(student, call.x_TD[:STATE_TOKENS], fewer, merge)
    return student


@torch.enable_grad()
def train(student: nn.Module, call: ExpertsCall, generator: torch.Generator) -> None:
    """Train ``student`` in place for ``STEPS`` steps on random tokens of ``call``."""
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    power = power_of(call)
    for _ in range(STEPS):
        part = call.rows(torch.randint(len(call.x_TD), (BATCH_TOKENS,), generator=generator))
        loss = relative_error(student_output(student, part), part.y_TD, power)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def halved(
    student: MultiplexedExperts, x_SD: Tensor, groups: int, merge: Merge = sce_of_pair
) -> MultiplexedExperts:
    """Merge the bases of ``student`` whose outputs for ``x_SD`` are most alike into ``groups``.

    ``groups`` is at least half of what there are, so that no more than two are merged.
    """
    bases = student.listed()

    def run(x_CD: Tensor) -> Tensor:
        unrouted = [x_CD.new_zeros(len(x_CD), len(base.members)) for base in bases]
        return torch.stack([base(x_CD, s_CM) for base, s_CM in zip(bases, unrouted, strict=True)])

    group_of_base = equal_groups(mean_cosine(run, x_SD), groups)
    numbers = [(group_of_base == group).nonzero().flatten().tolist() for group in range(groups)]
    return MultiplexedExperts([merged([bases[n] for n in chosen], merge) for chosen in numbers])


def merged(bases: list[MultiplexedGroup], merge: Merge) -> MultiplexedGroup:
    """Merge bases without adapters; their members keep their own routing columns."""

    def merged_linear(name: str) -> AdaptedLinear:
        parts = {
            part: merge(torch.stack([base.get_parameter(f"{name}.{part}") for base in bases]))
            for part in ("weight", "bias")
            if getattr(bases[0].get_submodule(name), part) is not None
        }
        return AdaptedLinear(parts["weight"], None, parts.get("bias"))

    members = torch.cat([base.members for base in bases])
    columns: list[Tensor] = [base.routing for base in bases if base.routing is not None]
    routing = torch.cat(columns, dim=1) if columns else None
    gate, up, down = (merged_linear(name) for name in ("gate_proj", "up_proj", "down_proj"))
    return MultiplexedGroup(members, gate, up, down, routing, bases[0].gating)
