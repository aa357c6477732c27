"""Recorded launches, repeated: the same as computed anew, and never where they do not hold."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numeric import assert_close
from random_experts import GATINGS, Sizes, random_call, random_experts
from test_fused_experts import KINDS
from test_neuron_experts import Sizes as NeuronSizes
from test_neuron_experts import naive_neurons, random_layer
from test_neuron_experts import random_call as random_neuron_call
from torch import Tensor, nn
from triton_ways import DEVICE, by_triton, poisoned  # noqa: F401

from moefuse.errors import UserError
from moefuse.modeling import kernels
from moefuse.modeling.kernels import launching, repeating, triton_pairs
from moefuse.modeling.naive import naive_forward

pytestmark = pytest.mark.usefixtures("by_triton", "poisoned")

SIZES = Sizes(tokens=5, rank=4, hidden=8, intermediate=12)


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls that are repeated."""
    found: list[int] = []
    usual = launching.Recording.repeat

    def repeat(recording: launching.Recording, *given: Tensor) -> Tensor:
        found.append(len(recording.launches))
        return usual(recording, *given)

    monkeypatch.setattr(launching.Recording, "repeat", repeat)
    return found


def call_of(sizes: Sizes = SIZES, seed: int = 0) -> list[Tensor]:
    """Make a call on the device."""
    return [tensor.to(DEVICE) for tensor in random_call(sizes, seed=seed)]


def slowly(module: Any, call: list[Tensor]) -> Tensor:
    """Compute the same by the slow twin."""
    twin = copy.deepcopy(module).cpu().float()
    return naive_forward(twin, *(tensor.cpu() for tensor in call))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
@torch.no_grad()
def test_another_call_of_the_same_shapes_is_repeated(
    rank: int, options: dict[str, Any], repeats: list[int]
) -> None:
    sizes = Sizes(tokens=5, rank=rank)
    module = random_experts(sizes, **options).to(DEVICE)
    module(*call_of(sizes))
    assert repeats == []

    found = [module(*call_of(sizes, seed)) for seed in (1, 2)]

    assert repeats == [5 if rank else 4] * 2
    for seed, y_TD in zip((1, 2), found, strict=True):
        assert_close(y_TD.cpu(), slowly(module, call_of(sizes, seed)))
        repeating._known.clear()
        assert torch.equal(module(*call_of(sizes, seed)), y_TD)


@pytest.mark.parametrize("kinds", [{"bits": ("1.6", "3")}, {"bits": ("2",), "biased": True}])
@torch.no_grad()
def test_neurons_at_few_bits_are_repeated(kinds: dict[str, Any], repeats: list[int]) -> None:
    sizes = NeuronSizes(**kinds)
    module, _ = random_layer(sizes)
    module.to(DEVICE)
    module(*(tensor.to(DEVICE) for tensor in random_neuron_call(sizes, 0)))
    call = random_neuron_call(sizes, 1)

    y_TD = module(*(tensor.to(DEVICE) for tensor in call))

    assert len(repeats) == 1
    assert_close(y_TD.cpu(), naive_neurons(module.cpu(), *call))


def _set_anew(module: Any) -> None:
    linear = module.bases[1].down_proj
    linear.weight = nn.Parameter(linear.weight + 1)


def _move_data(module: Any) -> None:
    module.delta.down_b.data = module.delta.down_b.data * 2


def _regroup(module: Any) -> None:
    module.group_of_expert.copy_(module.group_of_expert.flip(0))


def _gate_otherwise(module: Any) -> None:
    module.gating = GATINGS["clamped"]


def _new_base(module: Any) -> None:
    module.bases[0] = copy.deepcopy(module.bases[1])


def _no_delta(module: Any) -> None:
    module.delta = None


CHANGES = [_set_anew, _move_data, _regroup, _gate_otherwise, _new_base, _no_delta]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_layer_is_looked_at_anew(
    change: Callable[[Any], None], repeats: list[int]
) -> None:
    module = random_experts(SIZES, scale=True).to(DEVICE)
    module(*call_of())
    change(module)

    y_TD = module(*call_of())

    assert repeats == []
    assert_close(y_TD.cpu(), slowly(module, call_of()))
    assert_close(module(*call_of()), y_TD)
    assert len(repeats) == 1


@torch.no_grad()
def test_weights_loaded_in_place_of_others_are_looked_at_anew(repeats: list[int]) -> None:
    module = random_experts(SIZES, scale=True).to(DEVICE)
    module(*call_of())
    names = dict(module.named_parameters())
    state = {k: v + 0.5 if k in names else v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)

    y_TD = module(*call_of())

    assert repeats == []
    assert_close(y_TD.cpu(), slowly(module, call_of()))


@torch.no_grad()
def test_weights_whose_values_change_where_they_are_are_read_anew(repeats: list[int]) -> None:
    module = random_experts(SIZES, scale=True, bias=True).to(DEVICE)
    module(*call_of())
    for parameter in module.parameters():
        parameter.mul_(0.7)

    y_TD = module(*call_of())

    assert len(repeats) == 1
    assert_close(y_TD.cpu(), slowly(module, call_of()))


class Adapted(nn.Linear):
    """A linear layer that is more than its weight."""


class Packed(nn.Parameter):
    """A weight that is not what its numbers say."""


def _adapt(module: Any) -> None:
    module.bases[0].gate_up_proj.__class__ = Adapted


def _pack(module: Any) -> None:
    linear = module.bases[0].gate_up_proj
    linear.weight = Packed(linear.weight.data)


@pytest.mark.parametrize(
    ("change", "told"),
    [(_adapt, "a base is a Adapted"), (_pack, "a weight is a Packed, not a plain tensor")],
)
@torch.no_grad()
def test_a_layer_that_became_more_than_its_weights_is_refused(
    change: Callable[[Any], None], told: str
) -> None:
    module = random_experts(SIZES).to(DEVICE)
    module(*call_of())
    change(module)

    with pytest.raises(UserError, match=told):
        module(*call_of())


@torch.no_grad()
def test_a_copy_is_a_layer_of_its_own(repeats: list[int]) -> None:
    module = random_experts(SIZES).to(DEVICE)
    module(*call_of())
    other = copy.deepcopy(module)
    other.bases[0].down_proj.weight.add_(1)

    y_TD = other(*call_of())

    assert repeats == []
    assert_close(y_TD.cpu(), slowly(other, call_of()))


def test_what_gradients_are_wanted_of_is_not_repeated(repeats: list[int]) -> None:
    module = random_experts(SIZES).to(DEVICE)
    with torch.no_grad():
        module(*call_of())

    module(*call_of()).sum().backward()

    assert repeats == []
    assert module.bases[0].down_proj.weight.grad is not None


@torch.no_grad()
def test_autocast_is_not_passed_over() -> None:
    module = random_experts(SIZES).to(DEVICE)
    module(*call_of())

    with (
        torch.autocast(DEVICE, dtype=torch.bfloat16),
        pytest.raises(UserError, match="autocast is on"),
    ):
        module(*call_of())


@torch.no_grad()
def test_inputs_that_lie_otherwise_are_computed_anew(repeats: list[int]) -> None:
    module = random_experts(SIZES).to(DEVICE)
    x_TD, index_TK, w_TK = call_of()
    expected = module(x_TD, index_TK, w_TK)
    in_pieces = torch.stack([x_TD, x_TD], 1)[:, 0]
    askew = torch.cat([x_TD.flatten()[:1], x_TD.flatten()])[1:].view(x_TD.shape)

    assert_close(module(in_pieces, index_TK, w_TK), expected)
    assert_close(module(askew, index_TK, w_TK), expected)
    assert repeats == []
    assert_close(module(x_TD, index_TK, w_TK), expected)
    assert len(repeats) == 1


@torch.no_grad()
def test_what_is_not_launches_alone_is_not_recorded(
    repeats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_pairs, "MANY_ROWS", 1)
    monkeypatch.setattr(triton_pairs, "MOST_SHARE", 1.0)
    sizes = Sizes(tokens=20, rank=0)
    module = random_experts(sizes).to(DEVICE)

    for seed in (0, 1):
        y_TD = module(*call_of(sizes, seed))
        assert_close(y_TD.cpu(), slowly(module, call_of(sizes, seed)))

    assert repeats == []


@torch.no_grad()
def test_few_rows_and_few_shapes_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeating, "MOST_ROWS", 12)
    monkeypatch.setattr(repeating, "MOST_SHAPES", 2)
    module = random_experts(SIZES).to(DEVICE)

    known = []
    for tokens in (1, 2, 3, 4, 5):
        module(*call_of(Sizes(tokens=tokens, hidden=8, intermediate=12)))
        known.append(len(repeating._known[module][1]))

    assert known == [1, 2, 1, 2, 2]


def test_a_recording_goes_with_its_layer_and_keeps_no_weight() -> None:
    module = random_experts(SIZES).to(DEVICE)
    with torch.no_grad():
        module(*call_of())
    (recording,) = repeating._known[module][1].values()
    weights = {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    assert not weights & {tensor.data_ptr() for tensor in recording.kept}
    before = len(repeating._known)

    del module

    assert len(repeating._known) == before - 1
    assert kernels.INSTALLED
