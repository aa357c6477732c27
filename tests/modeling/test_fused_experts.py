"""The fused experts against their slow twin, and against themselves in other orders."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import BF16, assert_close
from random_experts import Sizes, random_call, random_experts
from torch import Tensor

from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import expert_linear, of_few_rows, padded_linear
from moefuse.modeling.naive import naive_forward

KINDS = [
    {"scale": False, "bias": False},
    {"scale": True, "bias": False},
    {"scale": False, "bias": True},
    {"scale": True, "bias": True},
    {"bias": True, "down_bias": True, "gating": "clamped"},
    {"scale": True, "down_bias": True, "gating": "clamped"},
]
Forward = Callable[[FusedExperts, Tensor, Tensor, Tensor], Tensor]


def plainly(module: FusedExperts, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    return module(x_TD, index_TK, w_TK)


def gradients(
    forward: Forward, module: FusedExperts, call: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Tensor]:
    """Return the output and the gradients of everything for one fixed loss."""
    x_TD, index_TK, w_TK = call[0].clone().requires_grad_(), call[1], call[2].clone()
    w_TK.requires_grad_()
    module.zero_grad(set_to_none=True)
    y_TD = forward(module, x_TD, index_TK, w_TK)
    towards_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(7))
    (y_TD.float() * towards_TD).sum().backward()
    named = {**dict(module.named_parameters()), "x_TD": x_TD, "w_TK": w_TK}
    # Weights that no token needed may have no gradient at all; that means zero.
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    return {"y_TD": y_TD.detach(), **found}


def assert_like_the_slow_twin(forward: Forward, drawn: tuple[Sizes, dict[str, Any], int]) -> None:
    """Compare outputs and gradients of one drawn layer."""
    sizes, options, seed = drawn
    module = random_experts(sizes, seed=seed, may_be_empty=True, **options)
    call = random_call(sizes, seed=seed)

    expected = gradients(naive_forward, module, call)
    actual = gradients(forward, module, call)

    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name].cpu(), expected[name])


@st.composite
def layers(draw: st.DrawFn) -> tuple[Sizes, dict[str, Any], int]:
    experts = draw(st.integers(1, 7))
    top_k = draw(st.integers(1, min(experts, 4)))
    sizes = Sizes(
        tokens=draw(st.sampled_from([1, 1, 2, 3, 8, 17])),
        experts=experts,
        top_k=top_k,
        groups=draw(st.integers(1, experts + 2)),
        rank=draw(st.sampled_from([0, 1, 2, 3, 5, 6, 11])),
        hidden=draw(st.integers(1, 9)),
        intermediate=draw(st.integers(1, 9)),
        hit=draw(st.integers(top_k, experts)),
    )
    return sizes, draw(st.sampled_from(KINDS)), draw(st.integers(0, 1000))


@given(layers())
@settings(max_examples=150, deadline=None)
def test_outputs_and_gradients_are_those_of_the_slow_twin(
    drawn: tuple[Sizes, dict[str, Any], int],
) -> None:
    assert_like_the_slow_twin(plainly, drawn)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_gives_no_output(rank: int, dtype: torch.dtype) -> None:
    sizes = Sizes(tokens=0, rank=rank)
    module = random_experts(sizes, scale=True, bias=True).to(dtype)
    x_TD, index_TK, w_TK = random_call(sizes)

    y_TD = module(x_TD.to(dtype), index_TK, w_TK)

    assert y_TD.shape == (0, sizes.hidden)
    assert y_TD.dtype == dtype


def test_a_group_without_members_takes_no_part() -> None:
    sizes = Sizes(groups=4)
    module = random_experts(sizes)
    module.group_of_expert.copy_(torch.tensor([0, 2, 0, 2, 3, 3, 3, 0]))
    call = random_call(sizes)
    before = gradients(plainly, module, call)
    assert_close(before["y_TD"], naive_forward(module, *call))
    assert not before["bases.1.gate_up_proj.weight"].any()
    with torch.no_grad():
        module.bases[1].gate_up_proj.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]

    assert torch.equal(module(*call), before["y_TD"])


def test_experts_that_no_token_chose_take_no_part() -> None:
    sizes = Sizes(top_k=2, hit=3)
    module = random_experts(sizes, scale=True, bias=True)
    call = random_call(sizes)
    idle = sorted(set(range(sizes.experts)) - set(call[1].unique().tolist()))
    before = gradients(plainly, module, call)
    assert len(idle) >= 5
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith("bases."):
                assert not before[name][idle].any()
                parameter[idle] = float("nan")

    assert torch.equal(module(*call), before["y_TD"])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_bf16_differs_from_the_slow_twin_by_rounding(rank: int, options: dict[str, bool]) -> None:
    sizes = Sizes(tokens=33, rank=rank, hidden=16, intermediate=12)
    module = random_experts(sizes, **options).to(torch.bfloat16)
    x_TD, index_TK, w_TK = random_call(sizes)
    x_TD = x_TD.to(torch.bfloat16)

    y_TD = module(x_TD, index_TK, w_TK)

    assert y_TD.dtype == torch.bfloat16
    assert_close(y_TD.float(), naive_forward(module, x_TD, index_TK, w_TK), BF16)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("rank", [0, 3])
def test_a_batch_equals_its_tokens_one_by_one(rank: int, options: dict[str, bool]) -> None:
    sizes = Sizes(tokens=21, rank=rank)
    module, (x_TD, index_TK, w_TK) = random_experts(sizes, **options), random_call(sizes)

    alone = [module(x_TD[t : t + 1], index_TK[t : t + 1], w_TK[t : t + 1]) for t in range(21)]

    assert_close(torch.cat(alone), module(x_TD, index_TK, w_TK))


@pytest.mark.parametrize("options", KINDS)
def test_a_shuffled_batch_gives_the_shuffled_output(options: dict[str, bool]) -> None:
    sizes = Sizes(tokens=21)
    module, (x_TD, index_TK, w_TK) = random_experts(sizes, **options), random_call(sizes)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))

    shuffled = module(x_TD[order], index_TK[order], w_TK[order])

    assert_close(shuffled, module(x_TD, index_TK, w_TK)[order])


def test_the_order_of_a_tokens_experts_does_not_matter() -> None:
    sizes = Sizes(tokens=21)
    module, (x_TD, index_TK, w_TK) = random_experts(sizes), random_call(sizes)

    assert_close(module(x_TD, index_TK.flip(1), w_TK.flip(1)), module(x_TD, index_TK, w_TK))


def test_permuting_the_neurons_of_a_group_changes_nothing() -> None:
    sizes = Sizes(tokens=21)
    module = random_experts(sizes, scale=True, bias=True)
    call = random_call(sizes)
    before = module(*call)
    width = sizes.intermediate
    state = module.state_dict()
    members = module.group_of_expert == 1
    assert members.any()
    order_F = torch.randperm(width, generator=torch.Generator().manual_seed(4))
    order_2F = torch.cat([order_F, order_F + width])

    def turn(name: str, change: Callable[[Tensor], Tensor]) -> None:
        state[name] = change(state[name].clone())

    turn("bases.1.gate_up_proj.weight", lambda w: w[order_2F])
    turn("bases.1.down_proj.weight", lambda w: w[:, order_F])
    for name in ("delta.gate_up_b", "scale", "bias"):
        turn(name, lambda w: torch.where(_at(members, w), w[:, order_2F], w))
    turn("delta.down_a", lambda w: torch.where(_at(members, w), w[:, :, order_F], w))
    turned = random_experts(sizes, seed=9, scale=True, bias=True)
    turned.load_state_dict(state)

    assert not torch.equal(turned.bases[1].down_proj.weight, module.bases[1].down_proj.weight)  # type: ignore[union-attr, arg-type]
    assert_close(turned(*call), before)


def _at(members_E: Tensor, like: Tensor) -> Tensor:
    return members_E.view(-1, *[1] * (like.ndim - 1))


def test_renumbering_the_experts_changes_nothing() -> None:
    sizes = Sizes(tokens=21)
    module = random_experts(sizes, scale=True, bias=True)
    x_TD, index_TK, w_TK = random_call(sizes)
    old_of_new = torch.randperm(sizes.experts, generator=torch.Generator().manual_seed(5))
    state = {
        name: tensor if name.startswith("bases.") else tensor[old_of_new]
        for name, tensor in module.state_dict().items()
    }
    renumbered = random_experts(sizes, seed=9, scale=True, bias=True)
    renumbered.load_state_dict(state)

    assert_close(
        renumbered(x_TD, old_of_new.argsort()[index_TK], w_TK), module(x_TD, index_TK, w_TK)
    )


def test_renumbering_the_groups_changes_nothing() -> None:
    sizes = Sizes(tokens=21)
    module = random_experts(sizes)
    call = random_call(sizes)
    old_of_new = torch.tensor([2, 0, 1])
    state = module.state_dict()
    new_state = dict(state)
    for new, old in enumerate(old_of_new.tolist()):
        for name in ("gate_up_proj.weight", "down_proj.weight"):
            new_state[f"bases.{new}.{name}"] = state[f"bases.{old}.{name}"].clone()
    new_state["group_of_expert"] = old_of_new.argsort()[module.group_of_expert]
    renumbered = random_experts(sizes, seed=9)
    renumbered.load_state_dict(new_state)

    assert_close(renumbered(*call), module(*call))


@pytest.mark.parametrize(
    ("threads", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (2, torch.float32)]
)
def test_running_twice_gives_the_same_bits(threads: int, dtype: torch.dtype) -> None:
    sizes = Sizes(
        tokens=300, experts=6, top_k=4, groups=2, rank=5, hidden=64, intermediate=48, hit=6
    )
    module = random_experts(sizes, scale=True, bias=True).to(dtype)
    x_TD, index_TK, w_TK = random_call(sizes)
    call = (x_TD.to(dtype), index_TK, w_TK)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, *others = (gradients(plainly, module, call) for _ in range(2))
    finally:
        torch.set_num_threads(usual)

    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_every_expert_is_a_function_of_its_own() -> None:
    """Two members of one group that a token chooses both go through the non-linearity apart."""
    sizes = Sizes(tokens=1, experts=2, top_k=2, groups=1, rank=2, hit=2)
    module = random_experts(sizes)
    x_TD = random_call(sizes)[0]
    index_TK, w_TK = torch.tensor([[0, 1]]), torch.tensor([[0.3, 0.7]])

    both = module(x_TD, index_TK, w_TK)

    one = module(x_TD, index_TK[:, :1], w_TK[:, :1])
    other = module(x_TD, index_TK[:, 1:], w_TK[:, 1:])
    assert_close(both, one + other)


def test_a_fresh_module_computes_its_bases_alone() -> None:
    """``reset_parameters`` makes deltas of nothing, so that a fresh model is usable."""
    sizes = Sizes()
    module = random_experts(sizes)
    module.reset_parameters()
    bare = random_experts(Sizes(rank=0), seed=9)
    bare.load_state_dict(
        {n: t for n, t in module.state_dict().items() if not n.startswith("delta.")}
    )
    call = random_call(sizes)

    assert module.delta is not None and all(p.isfinite().all() for p in module.parameters())
    assert module(*call).any()
    assert torch.equal(module(*call), bare(*call))


@pytest.mark.parametrize("rows", [[3, 0, 5, 1], [0, 0, 2], [4], [1, 1, 1, 7]])
def test_one_batched_product_is_those_of_one_expert_after_another(rows: list[int]) -> None:
    """What a GPU does for deltas; run here on the CPU."""
    generator = torch.Generator().manual_seed(sum(rows))
    x_NI = torch.randn(sum(rows), 6, generator=generator, requires_grad=True)
    weight_EOI = torch.randn(len(rows), 4, 6, generator=generator, requires_grad=True)
    towards_NO = torch.randn(sum(rows), 4, generator=generator)

    found = []
    for product in (expert_linear, padded_linear):
        y_NO = product(x_NI, weight_EOI, rows)
        found.append([y_NO, *torch.autograd.grad((y_NO * towards_NO).sum(), [x_NI, weight_EOI])])

    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 3, 4, 15, 31, 32])
@pytest.mark.parametrize("watched", [False, True])
def test_few_rows_give_what_the_linear_layer_does(rows: int, watched: bool) -> None:
    linear, x_PI = torch.nn.Linear(40, 24, bias=False), torch.randn(rows, 40)
    seen: list[int] = []
    if watched:
        linear.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))

    with torch.no_grad():
        y_PO = of_few_rows(linear, x_PI)

    assert seen == [rows] * watched
    assert_close(y_PO, x_PI @ linear.weight.T)


@pytest.mark.parametrize("what", ["nothing", "bias", "forward", "subclass", "half", "parameter"])
def test_few_rows_of_what_is_more_than_its_weight_are_given_to_the_layer(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = torch.nn.Linear(40, 24, bias=what == "bias")
    calls: list[int] = []

    def forward(layer: torch.nn.Linear, x_PI: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_PI))
        return torch.nn.functional.linear(x_PI.to(layer.weight.dtype), layer.weight, layer.bias)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    if what == "forward":
        linear.forward = lambda x_PI: forward(linear, x_PI)  # type: ignore[method-assign]
    if what == "half":
        linear = linear.half()
    if what == "subclass":
        linear.__class__ = type("Adapted", (torch.nn.Linear,), {})
    if what == "parameter":
        linear.weight.__class__ = type("Packed", (torch.nn.Parameter,), {})

    with torch.no_grad():
        of_few_rows(linear, torch.randn(5, 40))

    assert calls == ([] if what == "nothing" else [5])
