"""What a size costs is told: an honest forecast of the energy lost, and the plan in plain words."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import teacher, wish
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.families import MoeShape
from moefuse.fusion.advice import advise, kept_share, mean_bits, percent_kept
from moefuse.fusion.allocate import LOSS
from moefuse.fusion.plan import make_plan, settled_plan
from moefuse.fusion.plan_neurons import choices_of
from moefuse.planning import _common_words
from moefuse.sizes import LayerPlan, Plan

SHAPE = MoeShape((1, 2), experts=8, top_k=2, shared_experts=1, hidden=64, intermediate=48)
LITE = MoeShape(tuple(range(1, 27)), 64, 6, shared_experts=2, hidden=2048, intermediate=1408)
DEMO = MoeShape(tuple(range(1, 6)), 64, 6, shared_experts=2, hidden=160, intermediate=64)


def planned(shape: MoeShape, itemsize: int = 2, **size: Any) -> Plan:
    return make_plan(teacher(shape, itemsize), wish(**size), FactorConfig())


def energies(seed: int) -> dict[int, Tensor]:
    """Return random energies of SHAPE's neurons; one expert was never chosen."""
    generator = torch.Generator().manual_seed(seed)
    found = {layer: (2 * torch.randn(8, 48, generator=generator)).exp() for layer in SHAPE.layers}
    found[1][seed % 8] = 0
    return found


def words(shape: MoeShape = SHAPE, *, shared: int = 0, **neurons: int) -> str | None:
    """Advise on a plan whose layers have ``neurons`` by bits (``b2=5``: 5 at 2 bits)."""
    own = {bits[1:]: count for bits, count in neurons.items()}
    layers = dict.fromkeys(shape.layers, LayerPlan(neurons=own, shared=shared))
    return advise(shape, layers, 2)


# The energy lost.


@given(
    st.floats(
        1, 18
    ),  # in so small a layer the codebook of 1 bit alone takes half of 1 bit a number
    st.sampled_from(["auto", "1", "2", "16"]),
    st.sampled_from(["model", "layer"]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_loss_by_measured_energies_is_what_the_choices_lose(
    expert_bits: float, bits: str, spread: str, seed: int
) -> None:
    size, measured = wish(expert_bits=expert_bits, bits=bits, spread=spread), energies(seed)

    chosen, plan = settled_plan(teacher(SHAPE), measured, size)

    pairs = [
        (energy, LOSS[choices_of(size)[number]])
        for layer in SHAPE.layers
        for energy, number in zip(
            measured[layer].flatten().tolist(), chosen[layer].flatten().tolist(), strict=True
        )
    ]
    lost = sum(energy * loss for energy, loss in pairs) / sum(energy for energy, _ in pairs)
    assert plan.energy_lost == pytest.approx(lost, rel=1e-9, abs=1e-12)
    kept = sum(int((part > 0).sum()) for part in chosen.values())
    assert plan.neurons_kept == kept / (2 * 8 * 48)


@pytest.mark.parametrize("size", [{}, {"bits": "16"}, {"bits": "2"}, {"shared": 0}])
@pytest.mark.parametrize(("shape", "budgets"), [(LITE, 24), (DEMO, 48)])
def test_more_bytes_never_lose_more(shape: MoeShape, budgets: int, size: dict[str, Any]) -> None:
    sizes = [0.2 + 17 * (part / budgets) ** 2 for part in range(budgets + 1)]

    losses = [planned(shape, expert_bits=bits, **size).energy_lost for bits in sizes]

    told = [loss for loss in losses if loss is not None]
    assert len(told) == len(sizes)
    assert told == sorted(told, reverse=True)
    assert told[0] < 1
    assert told[-1] == pytest.approx(LOSS[size.get("bits", "16")])


@pytest.mark.parametrize("bits", ["auto", "16"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_with_all_their_bytes_nothing_is_lost(bits: str, itemsize: int) -> None:
    plan = planned(SHAPE, itemsize, expert_bits=99.0, bits=bits)

    assert (plan.energy_lost, plan.neurons_kept) == (0, 1)
    assert plan.mean_bits == 8 * itemsize
    assert plan.advice == "the teacher's own numbers"


@pytest.mark.parametrize(
    ("expert_bits", "lost"), [(2.1, 0.13), (3.0, 0.06), (4.0, 0.03), (6.0, 0.01), (12.0, 1e-4)]
)
def test_a_large_model_is_quantised_where_two_bits_for_all_fit(
    expert_bits: float, lost: float
) -> None:
    """Neurons at one width for all would lose more: 13% at 2 bits, 7% at 3, 4% at 4."""
    plan = planned(LITE, expert_bits=expert_bits)

    assert plan.neurons_kept == 1
    assert plan.energy_lost is not None and plan.energy_lost <= lost
    assert plan.advice is not None
    assert plan.advice.startswith("quantise, do not fuse: every neuron is kept, at ")


@pytest.mark.parametrize(("expert_bits", "kept"), [(1.95, 0.97), (1.0, 0.62), (0.5, 0.465)])
def test_a_large_models_plan_says_what_share_it_keeps(expert_bits: float, kept: float) -> None:
    plan = planned(LITE, expert_bits=expert_bits)

    assert plan.neurons_kept is not None and kept - 0.02 < plan.neurons_kept < kept + 0.02
    assert plan.advice is not None
    assert f"{percent_kept(plan.neurons_kept)} of the neurons are kept" in plan.advice
    assert plan.advice.startswith("prune and quantise")


def test_the_loss_of_bases_and_deltas_is_not_forecast() -> None:
    plan = planned(SHAPE, groups=2, rank=3)

    assert plan.energy_lost is plan.neurons_kept is plan.mean_bits is plan.advice is None
    assert kept_share(SHAPE, plan.layers) is mean_bits(plan.layers, 2) is None


# Plain words.


@pytest.mark.parametrize(
    ("neurons", "told"),
    [
        ({"b16": 384}, "the teacher's own numbers"),
        (
            {"b2": 192, "b4": 192},
            "quantise, do not fuse: every neuron is kept, at 3.0 bits on average",
        ),
        (
            {"b8": 192, "b16": 192},
            "quantise, do not fuse: every neuron is kept, at 12.0 bits on average",
        ),
        (
            {"b4": 383},
            "quantise, do not fuse: 99.7% of the neurons are kept, at 4.0 bits on average",
        ),
        (
            {"b4": 383, "shared": 1},
            "prune and quantise: 99.7% of the neurons are kept, at 4.0 bits on average, "
            "up to 1 a layer shared",
        ),
        (
            {"b1": 64, "b2": 32, "shared": 1408},
            "prune and quantise: 25.0% of the neurons are kept, at 1.3 bits on average, "
            "up to 1,408 a layer shared",
        ),
        ({"b16": 96}, "prune: 25.0% of the neurons are kept, in the teacher's own numbers"),
    ],
)
def test_plain_words(neurons: dict[str, int], told: str) -> None:
    assert words(**neurons) == told


def test_a_plan_that_keeps_nothing_is_told_too() -> None:
    assert mean_bits({1: LayerPlan(neurons={})}, 2) == 0
    assert "0.0% of the neurons are kept" in (words() or "")


@pytest.mark.parametrize(
    ("share", "told"), [(0.0, "0.0%"), (1e-5, "under 0.1%"), (0.5, "50.0%"), (0.99999, "99.9%")]
)
def test_a_share_is_never_told_larger_than_it_is(share: float, told: str) -> None:
    assert percent_kept(share) == told


def test_bits_are_those_of_the_checkpoints_dtype() -> None:
    layers = {1: LayerPlan(neurons={"8": 1, "16": 1})}

    assert (mean_bits(layers, 2), mean_bits(layers, 4)) == (12, 20)


def test_where_nothing_but_shared_neurons_is_left() -> None:
    layers = {1: LayerPlan(neurons={}, shared=7), 2: LayerPlan(neurons={}, shared=9)}
    shape = replace(SHAPE, layers=(1, 2))

    told = advise(shape, layers, 2)

    assert told == "share: up to 9 neurons a layer stand for all experts, none has its own"


def test_the_plan_as_json_has_it_all() -> None:
    told = planned(LITE, expert_bits=1.5).to_json()

    assert 0 < told["energy_lost"] < 0.2
    assert 0.7 < told["neurons_kept"] < 1
    assert 1.6 < told["mean_bits"] < 2
    assert re.fullmatch(
        r"prune and quantise: [0-9.]+% of the neurons are kept, at [0-9]\.[0-9] bits on average",
        told["advice"],
    )


def test_a_line_about_a_plan_of_shared_neurons_alone_names_no_bits() -> None:
    routed = MoeShape((1, 2), experts=8, top_k=2, shared_experts=0, hidden=64, intermediate=48)
    plan = planned(routed, expert_bits=1.0, bits="16")

    assert plan.neurons_kept == 0
    assert re.fullmatch(r"\d+ neurons a layer, all shared", _common_words(plan))
