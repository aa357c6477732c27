"""From bytes to neurons: budgets that hold for the true modules, and mistakes that are told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import teacher, wish
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.errors import UserError
from moefuse.families import MoeShape
from moefuse.fusion.allocate import FULL, LOW_BITS, predicted_loss
from moefuse.fusion.plan import Teacher, expert_budget, make_plan
from moefuse.fusion.plan_neurons import (
    choices_of,
    forecast,
    least_bytes,
    most_bytes,
    settle,
    uses_neurons,
)
from moefuse.sizes import LayerPlan, Plan, layer_bytes, make_experts

SHAPE = MoeShape((1, 2, 3), experts=8, top_k=2, shared_experts=1, hidden=64, intermediate=48)
NUMBERS = 3 * 8 * 3 * 64 * 48
LARGE = MoeShape((0, 1), experts=16, top_k=2, shared_experts=1, hidden=256, intermediate=256)
ALL_ROUTED = replace(LARGE, shared_experts=0)


def planned(given: Teacher, **size: Any) -> Plan:
    return make_plan(given, wish(**size), FactorConfig())


def energies(shape: MoeShape, seed: int = 0) -> dict[int, Tensor]:
    """Return energies that differ between layers; one expert was never chosen."""
    found = {}
    for layer in shape.layers:
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        spread_EF = torch.randn(shape.experts, shape.intermediate, generator=generator)
        found[layer] = (1.6 * spread_EF + layer).exp()
        found[layer][seed % shape.experts] = 0
    return found


def true_bytes(shape: MoeShape, plans: dict[int, LayerPlan], dtype: torch.dtype) -> int:
    """Count the tensors that are written for layers of ``plans``."""
    total = 0
    for plan in plans.values():
        for tensor in make_experts(shape, plan, "cpu").state_dict().values():
            cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
            total += cast.nbytes
    return total


# Which form.


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"params": "4B"}, True),
        ({"bytes": "4GB"}, True),
        ({"expert_bits": 0.0}, True),
        ({"groups": 4}, False),
        ({"params": "4B", "groups": 4}, False),
        ({"bytes": "4GB", "rank": 0}, False),
        ({"params": "4B", "form": "low-rank"}, False),
        ({"params": "4B", "form": "neurons"}, True),
        ({}, False),
    ],
)
def test_a_budget_alone_means_own_neurons(size: dict[str, Any], expected: bool) -> None:
    assert uses_neurons(wish(**size)) is expected


def test_bits_are_chosen_unless_they_are_given_or_parameters_count() -> None:
    assert choices_of(wish(bytes="1GB")) == LOW_BITS
    assert choices_of(wish(bytes="1GB", bits="16")) == FULL
    assert choices_of(wish(bytes="1GB", bits="2")) == ("0", "2")
    assert choices_of(wish(params="1B")) == FULL


# Budgets.


@given(
    st.floats(0.05, 18),
    st.sampled_from([2, 4]),
    st.sampled_from(["auto", "1", "2", "4", "16"]),
    st.sampled_from(["model", "layer"]),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_true_bytes_never_exceed_the_budget(
    expert_bits: float, itemsize: int, bits: str, spread: str, seed: int
) -> None:
    size = wish(expert_bits=expert_bits, bits=bits, spread=spread)
    least = least_bytes(SHAPE, size, itemsize)
    budget = max(int(NUMBERS * expert_bits / 8), least)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32

    chosen, plans = settle(SHAPE, energies(SHAPE, seed), budget, size, itemsize)

    assert true_bytes(SHAPE, plans, dtype) <= budget
    assert sum(layer_bytes(SHAPE, plan, itemsize) for plan in plans.values()) == true_bytes(
        SHAPE, plans, dtype
    )
    assert spread == "layer" or any(sum(plan.neurons.values()) for plan in plans.values())  # type: ignore[union-attr]
    choices = choices_of(size)
    for layer, plan in plans.items():
        counts = torch.bincount(chosen[layer].flatten(), minlength=len(choices)).tolist()
        found = {b: n for b, n in zip(choices[1:], counts[1:], strict=True) if n}
        assert plan.neurons == found
        assert plan.shared + sum(found.values()) <= SHAPE.experts * SHAPE.intermediate


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("expert_bits", [0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 4.0, 8.0, 12.0])
@pytest.mark.parametrize("bits", ["auto", "16"])
def test_the_budget_is_used(expert_bits: float, bits: str, itemsize: int) -> None:
    budget = int(2 * 16 * 3 * 256 * 256 * expert_bits / 8)

    _, plans = settle(LARGE, energies(LARGE), budget, wish(expert_bits=1.0, bits=bits), itemsize)

    used = sum(layer_bytes(LARGE, plan, itemsize) for plan in plans.values())
    assert 0.98 * budget <= used <= budget


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("bits", ["auto", "16"])
def test_with_all_their_bytes_all_neurons_are_whole(bits: str, itemsize: int) -> None:
    budget = expert_budget(teacher(SHAPE, itemsize=itemsize), wish(expert_bits=99.0, bits=bits))
    assert budget == most_bytes(SHAPE, itemsize)

    chosen, plans = settle(
        SHAPE, energies(SHAPE), budget, wish(expert_bits=99.0, bits=bits), itemsize
    )

    for layer, plan in plans.items():
        assert plan.neurons == {"16": 8 * 48}
        assert plan.shared == 0
        assert (chosen[layer] == len(choices_of(wish(bits=bits, expert_bits=1.0))) - 1).all()


def test_a_small_budget_pays_for_few_codebooks() -> None:
    """In a small layer a codebook costs as much as many neurons."""
    budget = int(NUMBERS * 1.0 / 8)
    size = wish(expert_bits=1.0)

    chosen, plans = settle(SHAPE, energies(SHAPE), budget, size, 2)

    used = {bits for plan in plans.values() for bits in plan.neurons or {}}
    assert 1 <= len(used) <= 3
    for bits in ("1", "2", "4", "16"):
        alone = wish(expert_bits=1.0, bits=bits)
        other, _ = settle(SHAPE, energies(SHAPE), budget, alone, 2)
        assert predicted_loss(energies(SHAPE), chosen, LOW_BITS) <= 1e-9 + predicted_loss(
            energies(SHAPE), other, choices_of(alone)
        )


def test_a_budget_may_be_spread_within_layers() -> None:
    size = wish(expert_bits=4.0, spread="layer", bits="16")

    _, plans = settle(SHAPE, energies(SHAPE), NUMBERS // 2, size, 2)
    _, competing = settle(SHAPE, energies(SHAPE), NUMBERS // 2, wish(expert_bits=4.0, bits="16"), 2)

    assert len({plan.neurons["16"] for plan in plans.values()}) == 1  # type: ignore[index]
    assert competing[3].neurons["16"] > competing[1].neurons["16"]  # type: ignore[index]


# Shared neurons.


@pytest.mark.parametrize("itemsize", [2, 4])
def test_shared_neurons_where_little_is_kept(itemsize: int) -> None:
    def shared(expert_bits: float, **size: Any) -> int:
        budget = int(2 * 16 * 3 * 256 * 256 * expert_bits / 8)
        _, plans = settle(LARGE, energies(LARGE), budget, wish(expert_bits=1.0, **size), itemsize)
        return plans[0].shared

    assert (shared(0.5), shared(1.0)) == (256, 0)
    assert shared(8.0, bits="16") == 256
    assert 0 < shared(0.1) < 256, "never more than half of the budget"
    assert (shared(1.0, shared=7), shared(0.5, shared=0)) == (7, 0)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_without_shared_experts_shared_neurons_may_take_the_whole_budget(itemsize: int) -> None:
    whole, numbers = wish(expert_bits=1.0, bits="16"), 2 * 16 * 3 * 256 * 256
    for share in (1 / 64, 1 / 16, 1 / 2):
        budget = int(numbers * itemsize * share)
        _, plans = settle(ALL_ROUTED, energies(ALL_ROUTED), budget, whole, itemsize)
        taken = sum(layer_bytes(ALL_ROUTED, plan, itemsize) for plan in plans.values())
        kept = 16 * 256 * share

        assert 0.95 * budget <= taken <= budget
        assert all(plan.shared == min(512, plan.shared) for plan in plans.values())
        _, asked = settle(
            ALL_ROUTED,
            energies(ALL_ROUTED),
            budget,
            wish(expert_bits=1.0, bits="16", shared=3),
            itemsize,
        )
        taken = sum(layer_bytes(ALL_ROUTED, plan, itemsize) for plan in asked.values())
        assert 0.95 * budget <= taken <= budget and asked[0].shared == 3
        if kept < 512:
            assert all(plan.shared > 0.95 * kept / (1 + 16 / 768) for plan in plans.values())


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        (0.25, {"1"}),
        (0.6, {"1"}),
        (0.7, {"1.33"}),
        (0.9, {"1.6"}),
        (1.2, {"1.6"}),
        (1.5, {"1.6", "2"}),
        (1.9, {"1.6", "2"}),
    ],
)
def test_while_neurons_are_lost_the_others_have_few_bits(bits: float, widths: set[str]) -> None:
    budget = int(2 * 16 * 3 * 256 * 256 * bits / 8)
    chosen, plans = settle(LARGE, energies(LARGE), budget, wish(expert_bits=bits), 2)
    assert {w for plan in plans.values() for w in plan.neurons or {}} == widths
    assert {LOW_BITS[int(c)] for part in chosen.values() for c in part.unique()} == {"0"} | widths

    more = int(2 * 16 * 3 * 256 * 256 * 2.5 / 8)
    _, richer = settle(LARGE, energies(LARGE), more, wish(expert_bits=2.5), 2)
    assert {w for plan in richer.values() for w in plan.neurons or {}} > {"2"}
    assert all(sum((plan.neurons or {}).values()) == 16 * 256 for plan in richer.values())


@pytest.mark.parametrize(
    ("bits", "widths"),
    [
        (1.1, {"1", "1.14"}),
        (1.3, {"1.14", "1.33"}),
        (1.5, {"1.33", "1.6"}),
        (1.9, {"1.6", "2"}),
    ],
)
def test_without_shared_experts_all_are_kept_while_they_can_have_a_bit(
    bits: float, widths: set[str]
) -> None:
    budget = int(2 * 16 * 3 * 256 * 256 * bits / 8)
    _, plans = settle(ALL_ROUTED, energies(ALL_ROUTED), budget, wish(expert_bits=bits), 2)
    assert {w for plan in plans.values() for w in plan.neurons or {}} == widths
    assert all(sum((plan.neurons or {}).values()) == 16 * 256 for plan in plans.values())
    taken = sum(layer_bytes(ALL_ROUTED, plan, 2) for plan in plans.values())
    assert 0.98 * budget <= taken <= budget

    less = int(2 * 16 * 3 * 256 * 256 * 0.9 / 8)
    _, fewer = settle(ALL_ROUTED, energies(ALL_ROUTED), less, wish(expert_bits=0.9), 2)
    assert {w for plan in fewer.values() for w in plan.neurons or {}} == {"1"}
    assert any(sum((plan.neurons or {}).values()) < 16 * 256 for plan in fewer.values())


def test_more_shared_neurons_than_the_budget_holds_are_told_before_work() -> None:
    with pytest.raises(UserError, match=r"--shared is 100000, and that many .* share fewer\.$"):
        planned(teacher(SHAPE), expert_bits=1.0, shared=100_000)


# Forecasts.


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("bits", ["auto", "2", "16"])
def test_a_forecast_keeps_the_budget_too(bits: str, itemsize: int) -> None:
    for expert_bits in (0.3, 1.0, 4.0, 8.0, 15.9):
        budget = int(2 * 16 * 3 * 256 * 256 * expert_bits / 8)

        plans, _ = forecast(LARGE, budget, wish(expert_bits=1.0, bits=bits), itemsize)

        used = sum(layer_bytes(LARGE, plan, itemsize) for plan in plans.values())
        assert list(plans) == [0, 1]
        assert used <= budget
        assert used >= 0.97 * budget or (bits == "2" and expert_bits > 2)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_parameters_and_bytes_are_those_asked_for(itemsize: int) -> None:
    large = teacher(LARGE, itemsize)

    by_count, by_bytes = planned(large, params="3M"), planned(large, bytes="3MB")

    assert 0.98 * 3e6 < by_count.parameters <= 3e6
    assert 0.98 * 3e6 < by_bytes.bytes <= 3e6
    assert set(by_count.layers[0].neurons or {}) == {"16"}


# Mistakes.


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"expert_bits": 0.01}, r"--expert-bits 0\.01 is too small: 0\.000 B parameters"),
        ({"expert_bits": 0.0}, r"--expert-bits 0\.0 is too small"),
        ({"bytes": "9KB"}, r"--bytes 9KB is too small"),
        ({"params": "100"}, r"--params 100 is too small"),
        ({"form": "neurons"}, r"--form neurons needs a budget: give --params, --bytes or"),
    ],
)
def test_a_wish_that_cannot_be_met_is_told_in_a_sentence(size: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        planned(teacher(SHAPE), **size)

    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("bits", ["auto", "1", "4", "16"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_least_budget_keeps_a_few_neurons(bits: str, itemsize: int) -> None:
    size = wish(expert_bits=1.0, bits=bits)

    _, plans = settle(SHAPE, energies(SHAPE), least_bytes(SHAPE, size, itemsize), size, itemsize)

    assert sum(sum((plan.neurons or {}).values()) for plan in plans.values()) >= 1
