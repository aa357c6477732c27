"""Bits go where they spare most: within the budget, and no other choice loses less."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefuse.fusion.allocate import FULL, LOSS, LOW_BITS, allocate, neuron_bytes, predicted_loss
from moefuse.modeling.modeling_moefuse import make_rows

HIDDEN = 32
Chosen = dict[int, Tensor]


def spread(*shape: int, seed: int = 0) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).exp()


def cost(chosen: Chosen, choices: tuple[str, ...], itemsize: int = 2, hidden: int = HIDDEN) -> int:
    sizes = [neuron_bytes(hidden, bits, itemsize) for bits in choices]
    return sum(sizes[number] for part in chosen.values() for number in part.flatten().tolist())


def whole(count: int, itemsize: int = 2, hidden: int = HIDDEN) -> int:
    return count * neuron_bytes(hidden, "16", itemsize)


@pytest.mark.parametrize("bits", LOW_BITS[1:])
@pytest.mark.parametrize("hidden", [7, 8, 32, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_neuron_takes_what_its_rows_take(bits: str, hidden: int, dtype: torch.dtype) -> None:
    rows, more = (make_rows(bits, 3, count, hidden).to(dtype) for count in (4, 5))

    sizes = [sum(tensor.nbytes for tensor in r.state_dict().values()) for r in (rows, more)]

    assert neuron_bytes(hidden, bits, dtype.itemsize) == sizes[1] - sizes[0]


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=5),
    st.floats(0, 1.2),
    st.sampled_from([FULL, LOW_BITS, ("0", "2"), ("0", "1", "4", "16")]),
    st.sampled_from([2, 4]),
    st.sampled_from([4, 8, 32, 45]),
)
@settings(max_examples=100, deadline=None)
def test_no_other_choice_at_the_same_cost_loses_less(
    energies: list[float], share: float, choices: tuple[str, ...], itemsize: int, hidden: int
) -> None:
    energy = {0: torch.tensor([energies], dtype=torch.float64)}
    budget = int(share * whole(len(energies), itemsize, hidden))

    chosen = allocate(energy, hidden, budget, choices, itemsize)

    spent = cost(chosen, choices, itemsize, hidden)
    assert spent <= budget
    sizes = [neuron_bytes(hidden, bits, itemsize) for bits in choices]
    ours = sum(e * LOSS[choices[n]] for e, n in zip(energies, chosen[0][0].tolist(), strict=True))
    for other in product(range(len(choices)), repeat=min(len(energies), 4)):
        numbers = [*other, *chosen[0][0].tolist()[len(other) :]]
        if sum(sizes[n] for n in numbers) <= spent:
            lost = sum(e * LOSS[choices[n]] for e, n in zip(energies, numbers, strict=True))
            assert ours <= lost * (1 + 1e-9) + 1e-12


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_more_budget_never_loses_more(first: int, second: int, seed: int) -> None:
    energies = {1: spread(3, 4, seed=seed), 5: spread(3, 4, seed=seed + 1)}
    low, high = sorted((first, second))

    losses = [
        predicted_loss(
            energies, allocate(energies, HIDDEN, whole(24) * part // 60, LOW_BITS, 2), LOW_BITS
        )
        for part in (low, high)
    ]

    assert losses[1] <= losses[0] <= 1
    assert losses[1] == 0 or high < 60


@pytest.mark.parametrize("choices", [FULL, LOW_BITS])
def test_the_budget_is_spent_up_to_one_neuron(choices: tuple[str, ...]) -> None:
    energies = {layer: spread(8, 16, seed=layer) for layer in range(3)}
    for budget in range(0, whole(3 * 8 * 16), 1999):
        left = budget - cost(allocate(energies, HIDDEN, budget, choices, 2), choices)
        assert 0 <= left < whole(1)


def test_layers_compete() -> None:
    weak, strong = spread(4, 8), 1000 * spread(4, 8)

    chosen = allocate({1: weak, 2: strong}, HIDDEN, whole(16), FULL, 2)

    assert (chosen[1].sum(), chosen[2].sum()) == (0, 16)
    kept, left = strong[chosen[2] == 1], strong[chosen[2] == 0]
    assert kept.min() > left.max()


def test_neurons_of_equal_energy_are_taken_in_their_order() -> None:
    chosen = allocate({3: torch.ones(2, 4)}, HIDDEN, whole(3), FULL, 2)

    assert chosen[3].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]


def test_neurons_of_no_energy_come_last_and_share_what_is_left() -> None:
    energy_EF = torch.cat([torch.zeros(1, 4), spread(1, 4)])
    room = whole(4) + 4 * neuron_bytes(HIDDEN, "2", 2)

    chosen = allocate({0: energy_EF}, HIDDEN, room, LOW_BITS, 2)

    assert [LOW_BITS[n] for n in chosen[0].flatten().tolist()] == ["2"] * 4 + ["16"] * 4


@pytest.mark.parametrize("choices", [FULL, LOW_BITS])
def test_without_any_energy_neurons_are_taken_in_their_order(choices: tuple[str, ...]) -> None:
    energies = {0: torch.zeros(2, 3)}

    found = [allocate(energies, HIDDEN, whole(n), choices, 2)[0] for n in (0, 3, 6)]

    assert not found[0].any()
    assert cost({0: found[1]}, choices) <= whole(3)
    assert torch.equal(found[1].flatten().sort(descending=True).values, found[1].flatten())
    assert (found[2] == len(choices) - 1).all()
    assert predicted_loss(energies, {0: found[0]}, choices) == 1
    assert predicted_loss(energies, {0: found[2]}, choices) == 0


def test_tiny_and_huge_energies_do_not_overflow() -> None:
    energy_EF = torch.tensor([[1e-38, 1e38, 1e-30, 0.0]])

    chosen = allocate({0: energy_EF}, HIDDEN, whole(2), FULL, 2)

    assert chosen[0].tolist() == [[0, 1, 1, 0]]


def test_a_budget_of_nothing_keeps_nothing() -> None:
    for budget in (-5, 0, neuron_bytes(HIDDEN, "1", 2) - 1):
        assert not allocate({0: spread(2, 3)}, HIDDEN, budget, LOW_BITS, 2)[0].any()
