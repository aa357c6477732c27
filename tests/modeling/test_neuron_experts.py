"""Neuron experts against their slow twin, and their trainable twin against what is stored."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import BF16, assert_close
from random_experts import GATINGS
from torch import Tensor, nn

from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.mathematics.experts import ExpertsCall
from moefuse.modeling.modeling_moefuse import (
    CODED,
    CodedRows,
    NeuronExperts,
    PlainGating,
    make_rows,
    own_name,
)
from moefuse.modeling.naive import all_rows, naive_neurons
from moefuse.modeling.training import (
    TrainedNeuronExperts,
    TrainedRows,
    encode,
    padded_own,
    stored_to_trained,
    trained_to_stored,
)

WIDTHS = (*CODED, "16")
SAME_CODE = 4 * torch.finfo(torch.float32).eps ** 0.5
"""Squared distances in fp32 do not tell entries apart that are nearer to each other than this."""
Call = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Sizes:
    """T, E, K, D, most own neurons of an expert per bit width, S, and the bits of everything."""

    tokens: int = 9
    experts: int = 6
    top_k: int = 2
    hidden: int = 13
    most: int = 4
    shared: int = 3
    bits: tuple[str, ...] = WIDTHS
    shared_bits: str = "2"
    gain_bits: str = "4"
    biased: bool = False


@torch.no_grad()
def random_layer(sizes: Sizes, seed: int = 0) -> tuple[NeuronExperts, dict[str, Tensor]]:
    """Return a module none of whose rows are alike, and what its coded rows stand for."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(0, sizes.most + 1, (len(sizes.bits), sizes.experts), generator=generator)
    counts = dict(zip(sizes.bits, widths.sum(1).tolist(), strict=True))
    made = NeuronExperts(
        sizes.hidden,
        sizes.experts,
        GATINGS["clamped" if sizes.biased else "plain"],
        neurons=counts,
        shared=sizes.shared,
        shared_bits=sizes.shared_bits,
        gain_bits=sizes.gain_bits,
        biased=sizes.biased,
    )
    if made.down_bias is not None:
        made.down_bias.copy_(normal(sizes.experts, sizes.hidden, seed=seed))
    made.widths.copy_(widths)
    latents: dict[str, Tensor] = {}
    for number, (name, rows) in enumerate(made.named_modules()):
        if isinstance(rows, CodedRows):
            latents[name] = normal(*rows.scale.shape, rows.width, seed=100 * seed + number)
            encode(rows, latents[name])
        elif hasattr(rows, "weight"):
            rows.weight.copy_(normal(*rows.weight.shape, seed=100 * seed + number))  # type: ignore
    return made, latents


def random_call(sizes: Sizes, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed + 1)
    scores_TE = torch.rand(sizes.tokens, sizes.experts, generator=generator)
    w_TK, index_TK = scores_TE.topk(sizes.top_k)
    return normal(sizes.tokens, sizes.hidden, seed=seed + 2), index_TK, w_TK


def gradients(forward: Callable[..., Tensor], module: nn.Module, call: Call) -> dict[str, Tensor]:
    """Return the output and the gradients of everything for one fixed loss."""
    x_TD, index_TK, w_TK = call[0].clone().requires_grad_(), call[1], call[2].clone()
    w_TK.requires_grad_()
    module.zero_grad(set_to_none=True)
    y_TD = forward(module, x_TD, index_TK, w_TK)
    if y_TD.requires_grad:
        (y_TD.float() * normal(*y_TD.shape, seed=7)).sum().backward()
    named = {**dict(module.named_parameters()), "x_TD": x_TD, "w_TK": w_TK}
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    return {"y_TD": y_TD.detach(), **found}


def plainly(module: nn.Module, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    return module(x_TD, index_TK, w_TK)


@st.composite
def layers(draw: st.DrawFn) -> Sizes:
    experts = draw(st.integers(1, 6))
    return Sizes(
        tokens=draw(st.sampled_from([0, 1, 2, 5])),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 3))),
        hidden=draw(st.integers(1, 11)),
        most=draw(st.integers(0, 3)),
        shared=draw(st.sampled_from([0, 0, 1, 3])),
        bits=tuple(sorted(draw(st.sets(st.sampled_from(WIDTHS))), key=float)),
        shared_bits=draw(st.sampled_from(["2", "16"])),
        gain_bits=draw(st.sampled_from(["4", "16"])),
        biased=draw(st.booleans()),
    )


# Against the slow twin.


@given(layers(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_outputs_and_gradients_are_those_of_the_slow_twin(sizes: Sizes, seed: int) -> None:
    module, _ = random_layer(sizes, seed)
    call = random_call(sizes, seed)

    actual = gradients(plainly, module, call)
    expected = gradients(naive_neurons, module, call)

    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize("bits", [*CODED])
@pytest.mark.parametrize("hidden", [1, 5, 8, 16, 19])
def test_coded_rows_read_what_their_bytes_say(bits: str, hidden: int) -> None:
    rows = make_rows(bits, 3, 4, hidden)
    assert isinstance(rows, CodedRows)
    encode(rows, normal(3, 4, hidden, seed=1))

    assert torch.equal(rows.read(0, None), all_rows(rows))  # type: ignore[arg-type]
    assert torch.equal(rows.read(1, 3), all_rows(rows)[:, 1:3])


@torch.no_grad()
def test_one_token_at_a_time_and_any_order_equal_a_batch() -> None:
    sizes = Sizes()
    module, _ = random_layer(sizes)
    call = random_call(sizes)
    together = module(*call)

    alone = torch.cat([module(*(part[t : t + 1] for part in call)) for t in range(sizes.tokens)])
    order = torch.randperm(sizes.tokens, generator=torch.Generator().manual_seed(3))

    assert_close(alone, together)
    assert_close(module(*(part[order] for part in call)), together[order])


@torch.no_grad()
def test_the_order_of_a_tokens_experts_does_not_matter() -> None:
    module, _ = random_layer(Sizes(top_k=3))
    x_TD, index_TK, w_TK = random_call(Sizes(top_k=3))

    assert_close(module(x_TD, index_TK.flip(1), w_TK.flip(1)), module(x_TD, index_TK, w_TK))


def test_bf16_runs_and_is_close() -> None:
    module, _ = random_layer(Sizes())
    x_TD, index_TK, w_TK = random_call(Sizes())
    halved = copy.deepcopy(module).bfloat16()

    y_TD = halved(x_TD.bfloat16(), index_TK, w_TK)

    assert y_TD.dtype == torch.bfloat16
    assert halved.own["bits2"].codes.dtype == torch.uint8
    assert halved.widths.dtype == torch.int32
    assert_close(y_TD.float(), naive_neurons(halved, x_TD.bfloat16(), index_TK, w_TK), BF16)
    y_TD.sum().backward()
    assert all(p.grad is not None for n, p in halved.named_parameters() if "shared" in n)


def test_autocast_runs_and_is_close() -> None:
    module, _ = random_layer(Sizes())
    call = random_call(Sizes())

    with torch.autocast("cpu", torch.bfloat16):
        y_TD = module(*call)

    assert y_TD.dtype == torch.float32
    assert_close(y_TD, module(*call), BF16)


@torch.no_grad()
def test_bit_widths_lie_in_order_whatever_order_the_configuration_has() -> None:
    """Transformers sorts a saved configuration's keys, which puts 16 before 2."""
    module, _ = random_layer(Sizes())
    counts = {str(bits): int(n) for bits, n in zip(WIDTHS, module.widths.sum(1), strict=True)}
    for names in (sorted(counts), reversed(counts)):
        other = NeuronExperts(
            13,
            6,
            PlainGating(nn.functional.silu),
            neurons={name: counts[name] for name in names},
            shared=3,
            shared_bits="2",
            gain_bits="4",
        )
        other.load_state_dict(module.state_dict())

        assert torch.equal(other(*random_call(Sizes())), module(*random_call(Sizes())))


# Storing.


@pytest.mark.parametrize(
    ("bits", "most"), [("1", 0.45), ("2", 0.14), ("3", 0.05), ("4", 0.02), ("8", 1e-4)]
)
def test_more_bits_err_less(bits: str, most: float) -> None:
    values_PMI = normal(3, 64, 64, seed=1) * normal(3, 64, 1, seed=2).exp()
    rows = CodedRows(bits, 3, 64, 64)

    encode(rows, values_PMI)

    error = (rows.read(0, 64) - values_PMI).square().sum() / values_PMI.square().sum()
    assert most / 6 < error < most


@pytest.mark.parametrize("bits", [*CODED])
def test_rows_of_zeros_and_of_almost_nothing_spoil_no_other_row(bits: str) -> None:
    values_PMI = normal(1, 40, 16, seed=1)
    apart = CodedRows(bits, 1, 40, 16)
    encode(apart, values_PMI)
    tiny_PMI = 1e-28 * normal(1, 8, 16, seed=2)
    rows = CodedRows(bits, 1, 56, 16)

    encode(rows, torch.cat([values_PMI, tiny_PMI, torch.zeros(1, 8, 16)], 1))

    def error(found_PMI: Tensor, wanted_PMI: Tensor) -> float:
        found_PMI = found_PMI.detach()
        return float((found_PMI - wanted_PMI).square().sum() / wanted_PMI.square().sum())

    assert torch.isfinite(rows.scale).all() and torch.isfinite(rows.codebook).all()
    assert error(rows.read(0, 40), values_PMI) < error(apart.read(0, 40), values_PMI) + 0.15
    assert error(1e28 * rows.read(40, 48), 1e28 * tiny_PMI) < 0.8
    assert rows.read(48, 56).abs().max() < 1e-30


def test_no_rows_at_all_can_be_stored_and_read() -> None:
    for bits in CODED:
        rows = CodedRows(bits, 3, 0, 9)
        encode(rows, torch.zeros(3, 0, 9))
        assert rows.read(0, 0).shape == (3, 0, 9)


# Training.


def trained(sizes: Sizes, seed: int = 0) -> TrainedNeuronExperts:
    module, latents = random_layer(sizes, seed)
    return TrainedNeuronExperts(module, latents)


def call_of(teacher: nn.Module, sizes: Sizes) -> ExpertsCall:
    x_TD, index_TK, w_TK = random_call(sizes, seed=5)
    with torch.no_grad():
        y_TD = teacher(x_TD, index_TK, w_TK)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), w_TK, y_TD)


@pytest.mark.parametrize("steps", [0, 1, 8, 13])
@pytest.mark.parametrize("hidden", [13, 16])
def test_the_trained_twin_computes_the_bits_of_its_packed_form(hidden: int, steps: int) -> None:
    sizes = Sizes(tokens=64, hidden=hidden)
    student = trained(sizes)
    teacher, _ = random_layer(sizes, seed=3)
    if steps:
        options = DistillConfig(steps=steps, batch_tokens=16, held_back=0.5)
        distill_layer(student, call_of(teacher, sizes), options)
    call = random_call(sizes)
    with torch.no_grad():
        expected = student(*call)
        read = {n: r.read(0, None) for n, r in student.named_modules() if hasattr(r, "read")}  # type: ignore[operator]

    packed = student.packed()

    assert type(packed) is NeuronExperts
    with torch.no_grad():
        for name, rows in read.items():
            assert torch.equal(packed.get_submodule(name).read(0, None), rows)  # type: ignore[operator]
        assert_close(packed(*call), expected)
        # A matrix product's last bits depend on where in memory its rows begin.
        assert hidden == 13 or torch.equal(packed(*call), expected)
    assert_close(packed(*call), naive_neurons(packed, *call))


def test_packing_makes_no_difference_to_what_is_stored_twice() -> None:
    student = trained(Sizes())
    first = {name: tensor.clone() for name, tensor in student.packed().state_dict().items()}

    second = student.packed().state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["own.bits2.codes"].dtype == torch.uint8


def test_gradients_reach_everything_that_is_learnt() -> None:
    student = trained(Sizes(tokens=40))

    student(*random_call(Sizes(tokens=40))).square().sum().backward()

    names = {name for name, _ in student.named_parameters()}
    for bits in CODED:
        assert {f"own.{own_name(bits)}.{part}" for part in ("latent", "codebook", "scale")} <= names
    assert {"own.bits16.weight", "shared.latent", "gain.latent", "gain.scale"} <= names
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_of_codebook_and_scale_are_true_ones() -> None:
    """They are those of the stored form; only what latents get is a straight-through estimate."""
    student = trained(Sizes())
    call = random_call(Sizes())

    found = gradients(plainly, student, call)
    expected = gradients(naive_neurons, student.packed(), call)

    for name in expected:
        assert_close(found[name], expected[name])


def test_training_lowers_the_loss_and_survives_rounding_to_bf16() -> None:
    sizes = Sizes(tokens=400, hidden=16, most=6, bits=("1", "2", "4"))
    teacher, _ = random_layer(sizes, seed=1)
    module, latents = random_layer(sizes, seed=1)
    noisy = {name: latent + 0.3 * normal(*latent.shape, seed=4) for name, latent in latents.items()}
    student = TrainedNeuronExperts(module, noisy)
    call = call_of(teacher, sizes)

    result = distill_layer(student, call, DistillConfig(steps=150, batch_tokens=128))

    assert result.after < 0.7 * result.before
    packed = student.packed()
    with torch.no_grad():
        exact = packed(*random_call(sizes))
        rounded = packed.bfloat16().float()(*random_call(sizes))
    assert_close(rounded, exact, BF16)


def test_what_became_worse_goes_back_to_the_start() -> None:
    sizes = Sizes(tokens=64)
    student = trained(sizes)
    teacher = copy.deepcopy(student.packed())
    call, before = call_of(teacher, sizes), random_call(sizes)
    with torch.no_grad():
        expected = student(*before)

    result = distill_layer(student, call, DistillConfig(steps=9, batch_tokens=16))

    assert result.after == result.before < 1e-12 < min(result.losses[1:])
    with torch.no_grad():
        assert_close(student.packed()(*before), expected)


def test_codes_follow_latents_every_few_steps_only_but_are_always_new_where_measured() -> None:
    rows = CodedRows("4", 1, 5, 8)
    values_PMI = normal(1, 5, 8, seed=1)
    encode(rows, values_PMI)
    twin = TrainedRows(rows, values_PMI)
    twin.refresh()
    first = twin.read(0, None).detach().clone()  # type: ignore[arg-type]
    with torch.no_grad():
        twin.latent.neg_()

    twin.refresh()
    kept = twin.read(0, None).detach().clone()  # type: ignore[arg-type]
    with torch.no_grad():
        twin.refresh()

    assert torch.equal(kept, first)
    assert not torch.equal(twin.read(0, None), first)  # type: ignore[arg-type]


def test_codes_that_are_told_when_to_follow_do_so_only_then() -> None:
    rows = CodedRows("4", 1, 5, 8)
    encode(rows, normal(1, 5, 8, seed=1))
    twin = TrainedRows(rows, normal(1, 5, 8, seed=1))
    twin.choose_codes()
    before = twin.code_N.clone()
    with torch.no_grad():
        twin.latent.neg_()

    for _ in range(20):
        twin.refresh()
    with torch.no_grad():
        twin.refresh()  # a measurement in between leaves no trace
    assert torch.equal(twin.code_N, before)
    twin.choose_codes()
    assert not torch.equal(twin.code_N, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_experts_are_trained_and_stored_again_without_a_change(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.experts = random_layer(Sizes(tokens=20))[0].to(dtype).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    call = random_call(Sizes(tokens=20))
    with torch.no_grad():
        expected = model.layer.experts(*call)

    stored_to_trained(model)
    assert isinstance(model.layer.experts, TrainedNeuronExperts)
    assert_close(model.layer.experts(*call), expected, SAME_CODE)
    trained_to_stored(model)

    after = model.state_dict()
    assert after.keys() == before.keys()
    unequal = [n for n in before if not torch.equal(after[n], before[n]) and "codes" not in n]
    assert unequal == []
    with torch.no_grad():
        assert_close(model.layer.experts(*call), expected, SAME_CODE)


# All experts at once, as on a GPU.


@given(layers(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_padded_products_are_those_of_one_expert_after_another(sizes: Sizes, seed: int) -> None:
    module, _ = random_layer(sizes, seed)
    x_TD, index_TK, w_TK = random_call(sizes, seed)
    if not (sizes.tokens and sizes.bits):
        return
    expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
    token_N, weight_N = order_N // sizes.top_k, w_TK.reshape(-1)[order_N]
    rows_per_expert = torch.bincount(expert_N, minlength=sizes.experts).tolist()
    with torch.no_grad():
        expected = module._own(x_TD, token_N, weight_N, rows_per_expert)
        rows_PMD = torch.cat([all_rows(rows) for rows in module.own.children()], 1)

        bias_PM1 = None
        if module.own_bias is not None:
            bias_PM1 = torch.cat([all_rows(rows) for rows in module.own_bias.children()], 1)

        actual = padded_own(
            rows_PMD,
            module.widths,
            module.gating,
            x_TD[token_N],
            weight_N,
            rows_per_expert,
            bias_PM1,
        )

    assert_close(actual, expected)
