"""Fused experts with random weights and random calls of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import ClampedGating, PlainGating


@dataclass(frozen=True)
class Sizes:
    """T, E, K, G, R, D, F of a random layer; ``hit`` is how many experts any token chooses."""

    tokens: int = 9
    experts: int = 8
    top_k: int = 3
    groups: int = 3
    rank: int = 4
    hidden: int = 7
    intermediate: int = 5
    hit: int = 8


GATINGS = {
    "plain": PlainGating(torch.nn.functional.silu),
    "clamped": ClampedGating(alpha=1.7, limit=1.0),
}

STRANGE: list[tuple[Callable[[Any], Any], str]] = [
    (lambda module: module.bases[0].double(), "weights are torch.float64"),
    (lambda module: setattr(module, "delta", torch.nn.Identity()), "low-rank deltas alone"),
    (
        lambda module: setattr(module.bases[0], "down_proj", torch.nn.Identity()),
        "a base is a Identity",
    ),
    (lambda module: module.__delattr__("bases"), "not of own neurons"),
]
"""What makes of a module one that no fast way of its bases computes, and what is told then."""


def random_experts(
    sizes: Sizes,
    *,
    seed: int = 0,
    may_be_empty: bool = False,
    gating: str = "plain",
    **options: Any,
) -> FusedExperts:
    """Return a module none of whose parameters is zero, one or shared.

    Groups are of unequal size; with ``may_be_empty`` some may have no member at all.
    """
    made = FusedExperts(
        sizes.hidden,
        sizes.intermediate,
        sizes.experts,
        sizes.groups,
        sizes.rank,
        GATINGS[gating],
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
        group_of_expert = torch.randint(sizes.groups, (sizes.experts,), generator=generator)
        if not may_be_empty:
            group_of_expert[: sizes.groups] = torch.randperm(sizes.groups, generator=generator)
        made.group_of_expert.copy_(group_of_expert)
    return made


def random_call(sizes: Sizes, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (T, D) inputs, (T, K) distinct experts and (T, K) weights."""
    generator = torch.Generator().manual_seed(seed + 1)
    x_TD = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    available = torch.randperm(sizes.experts, generator=generator)[: sizes.hit]
    rows = [
        available[torch.randperm(sizes.hit, generator=generator)[: sizes.top_k]]
        for _ in range(sizes.tokens)
    ]
    index_TK = torch.stack(rows) if rows else torch.zeros(0, sizes.top_k, dtype=torch.int64)
    w_TK = torch.rand(sizes.tokens, sizes.top_k, generator=generator)
    return x_TD, index_TK, w_TK
