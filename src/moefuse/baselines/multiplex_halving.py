"""Progressive merge: halve the number of bases again and again, with training in between.

The earlier public attempt's README lists it among its variants. Each halving pairs the bases whose
outputs for the same tokens are most alike and merges each pair by SCE; then, if there are more
halvings to come, the student is trained for ``STEPS`` steps of Adam on the recorded tokens against
what the teacher's layer returned. After the last halving it is left as it is, for the arena to
distil as any other. All of the budget goes to bases, as in ``multiplex_bases_only``.

Not as in its code: the router stays, and a merged base keeps its members' columns of the routing
projection, where the code drops the second's row of the router; bases are trained themselves, not
low-rank adapters of them; and outputs are compared, where the code compares by mistake the inputs.

Shape suffixes: S sampled tokens, C of them at a time, D hidden width, N merged bases, O outputs,
I inputs.
"""

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer
from moefuse.baselines._multiplexing import AdaptedLinear, MultiplexedExperts, MultiplexedGroup
from moefuse.baselines._multiplexing_recipe import (
    STATE_TOKENS,
    Recipe,
    build,
    choose_size,
    equal_groups,
    mean_cosine,
    output_states,
    sce_from_first,
)
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.losses import power_of, relative_error, student_output
from moefuse.mathematics.merging import sce_merge

RECIPE = Recipe(sce_from_first, output_states, None)
STEPS = 30
"""Steps of training between two halvings."""
BATCH_TOKENS = 256
LEARNING_RATE = 2e-3
"""That of the arena's own distillation; the recipe's 3e-4 is for many more steps."""
SELECTED = 0.25
"""Share of coordinates that SCE selects of a pair, as in the recipe's halving code."""


def compress(layer: Layer, numbers: int) -> nn.Module:
    """Halve the layer's experts until they are a student of at most ``numbers`` numbers.

    Raises ``TooSmallError`` where they hold not even one base.
    """
    size = choose_size(layer, numbers, RECIPE.adapters)
    experts = len(layer.experts.gate_up_EFD)
    generator = torch.Generator().manual_seed(layer.seed)
    student = build(layer, torch.arange(experts), RECIPE, size)
    while len(student.groups) > size.groups:
        if len(student.groups) < experts:
            train(student, layer.call, generator)
        groups = max(size.groups, (len(student.groups) + 1) // 2)
        student = halved(student, layer.call.x_TD[:STATE_TOKENS], groups)
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
def halved(student: MultiplexedExperts, x_SD: Tensor, groups: int) -> MultiplexedExperts:
    """Merge the bases of ``student`` whose outputs for ``x_SD`` are most alike into ``groups``.

    ``groups`` is at least half of what there are, so that no more than two are merged.
    """
    bases = student.listed()

    def run(x_CD: Tensor) -> Tensor:
        unrouted = [x_CD.new_zeros(len(x_CD), len(base.members)) for base in bases]
        return torch.stack([base(x_CD, s_CM) for base, s_CM in zip(bases, unrouted, strict=True)])

    group_of_base = equal_groups(mean_cosine(run, x_SD), groups)
    numbers = [(group_of_base == group).nonzero().flatten().tolist() for group in range(groups)]
    return MultiplexedExperts([merged([bases[n] for n in chosen]) for chosen in numbers])


def merged(bases: list[MultiplexedGroup]) -> MultiplexedGroup:
    """Merge bases without adapters by SCE; their members keep their own routing columns."""

    def sce(name: str) -> AdaptedLinear:
        merged = {
            part: sce_merge(stacked, stacked[0], SELECTED)
            for part in ("weight", "bias")
            if getattr(bases[0].get_submodule(name), part) is not None
            for stacked in [torch.stack([base.get_parameter(f"{name}.{part}") for base in bases])]
        }
        return AdaptedLinear(merged["weight"], None, merged.get("bias"))

    members = torch.cat([base.members for base in bases])
    columns: list[Tensor] = [base.routing for base in bases if base.routing is not None]
    routing = torch.cat(columns, dim=1) if columns else None
    linears = sce("gate_proj"), sce("up_proj"), sce("down_proj")
    return MultiplexedGroup(members, *linears, routing, bases[0].gating)
