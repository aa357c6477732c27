"""Layer distillation: a planted optimum is reached, and the same seed gives the same bits."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from numeric import assert_close
from torch import Tensor, nn

from moefuse.config import DistillConfig
from moefuse.distillation.loop import (
    distill_layer,
    learning_rate_factor,
    measure,
    student_output,
)
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.losses import relative_error
from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import NeuronExperts, PlainGating

GATING = PlainGating(torch.nn.functional.silu)
T, K, E, G, R, D, F = 600, 2, 6, 2, 3, 8, 6
OPTIONS = DistillConfig(steps=30, batch_tokens=64)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_student(seed: int) -> FusedExperts:
    student = FusedExperts(D, F, E, G, R, GATING, scale=True, bias=True)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=1000 * seed + number))
    return student


@torch.no_grad()
def call_of(teacher: nn.Module) -> ExpertsCall:
    x_TD = normal(T, D, seed=1)
    weight_TK, index_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(2)).topk(K)
    y_TD = teacher(x_TD, index_TK, weight_TK)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), weight_TK, y_TD)


TEACHER = random_student(1)
CALL = call_of(TEACHER)


def perturbed() -> FusedExperts:
    """Return a student that can be the teacher and is not yet."""
    student = copy.deepcopy(TEACHER)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.add_(0.1 * normal(*parameter.shape, seed=50 + number))
    return student


def distilled(seed: int = 0, options: DistillConfig = OPTIONS) -> tuple[FusedExperts, list[float]]:
    student = perturbed()
    return student, distill_layer(student, CALL, options, seed=seed).losses


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_student_that_can_be_the_teacher_becomes_it() -> None:
    student = perturbed()

    options = replace(OPTIONS, steps=2000, learning_rate=5e-3, delta_learning_rate=5e-3)

    result = distill_layer(student, CALL, options)

    assert result.before > 0.1
    assert result.after < 1e-3 * result.before
    assert result.losses[-1] < 1e-3 * result.losses[0]
    power = float(CALL.y_TD.square().mean())
    assert measure(student, CALL, power, 64) < 1e-3 * result.before


def test_a_student_that_is_the_teacher_stays_it() -> None:
    student = copy.deepcopy(TEACHER)

    result = distill_layer(student, CALL, OPTIONS)

    assert result.before == result.after < 1e-12
    assert same_bits(student, TEACHER)


def test_the_same_seed_gives_the_same_bits_and_another_other_ones() -> None:
    torch.manual_seed(1)
    first, first_losses = distilled(seed=3)
    torch.manual_seed(2)
    second, second_losses = distilled(seed=3)
    other, other_losses = distilled(seed=4)

    assert first_losses == second_losses
    assert same_bits(first, second)
    assert first_losses != other_losses
    assert not same_bits(first, other)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()

    distilled()

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rate", [2e-3, 3.0])
def test_never_worse_on_the_tokens_held_back(rate: float) -> None:
    student = perturbed()

    result = distill_layer(
        student, CALL, replace(OPTIONS, learning_rate=rate, delta_learning_rate=rate)
    )

    assert len(result.losses) == OPTIONS.steps
    assert result.after <= result.before
    if rate > 1:
        assert result.losses[-1] > result.before, "the steps themselves did harm"
        assert result.after == result.before
        assert same_bits(student, perturbed())


def test_a_step_that_gives_nan_is_undone() -> None:
    student = perturbed()
    call = replace(CALL, y_TD=CALL.y_TD.clone())
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    call.y_TD[order[T // 2 :]] = float("inf")  # none of them is held back

    result = distill_layer(student, call, OPTIONS)

    assert same_bits(student, perturbed())
    assert not math.isfinite(result.losses[-1])


def test_errors_are_of_the_tokens_held_back() -> None:
    student = perturbed()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    aside = CALL.rows(order[: round(T * OPTIONS.held_back)])
    power = float(CALL.y_TD.square().mean())
    with torch.no_grad():
        expected = float((student_output(student, aside) - aside.y_TD).square().mean()) / power

    result = distill_layer(student, CALL, OPTIONS)

    assert result.before == pytest.approx(expected, rel=1e-5)


def test_tokens_held_back_are_not_trained_on() -> None:
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    held = order[: round(T * OPTIONS.held_back)]
    call = replace(CALL, y_TD=CALL.y_TD.clone())
    # Exchanged among themselves, their targets keep the power that losses are relative to.
    call.y_TD[held] = CALL.y_TD[held.roll(1)]
    _, losses = distilled()

    result = distill_layer(perturbed(), call, OPTIONS)

    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.before > 2 * distill_layer(perturbed(), CALL, OPTIONS).before


def test_no_steps_change_nothing() -> None:
    student = perturbed()

    result = distill_layer(student, CALL, replace(OPTIONS, steps=0))

    assert result.losses == []
    assert result.after == result.before
    assert same_bits(student, perturbed())


def test_two_tokens_are_enough() -> None:
    student = perturbed()

    result = distill_layer(student, CALL.rows(torch.tensor([0, 1])), OPTIONS)

    assert result.after <= result.before
    assert all(parameter.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("still", ["learning_rate", "delta_learning_rate", "scale_learning_rate"])
def test_bases_deltas_and_scales_have_rates_of_their_own(still: str) -> None:
    starts = {
        "learning_rate": "bases.",
        "delta_learning_rate": "delta.",
        "scale_learning_rate": ("scale", "bias"),
    }
    student = perturbed()

    distill_layer(student, CALL, replace(OPTIONS, steps=10, **{still: 0.0}))

    assert not same_bits(student, perturbed())
    for name, parameter in student.named_parameters():
        unchanged = torch.equal(parameter, perturbed().get_parameter(name))
        assert unchanged == name.startswith(starts[still])


@pytest.mark.parametrize("form", ["bases", "own neurons"])
def test_every_bias_of_a_biased_family_has_the_biases_rate(form: str) -> None:
    if form == "bases":
        student: nn.Module = FusedExperts(D, F, E, G, R, GATING, bias=True, down_bias=True)
    else:
        student = NeuronExperts(D, E, GATING, neurons={"16": E * F}, shared=3, biased=True)
        student.widths.fill_(F)
    with torch.no_grad():
        for number, parameter in enumerate(student.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=number))
    start = copy.deepcopy(student)

    result = distill_layer(student, CALL, replace(OPTIONS, scale_learning_rate=0.0))

    assert result.after < result.before
    still = {n for n, p in student.named_parameters() if torch.equal(p, start.get_parameter(n))}
    biases = {name for name, _ in student.named_parameters() if "bias" in name}
    assert len(biases) >= 2
    assert biases <= still <= biases | {"gain.weight"}


@pytest.mark.parametrize("batch_tokens", [1, 7, 599, 5000])
def test_measuring_in_batches_is_measuring_at_once(batch_tokens: int) -> None:
    student = perturbed()
    power = float(CALL.y_TD.square().mean())
    with torch.no_grad():
        at_once = relative_error(student_output(student, CALL), CALL.y_TD, power)

    assert measure(student, CALL, power, batch_tokens) == pytest.approx(float(at_once), rel=1e-5)


def test_the_relative_error_of_nothing_is_one() -> None:
    power = float(CALL.y_TD.square().mean())

    error = relative_error(torch.zeros_like(CALL.y_TD), CALL.y_TD, power)

    assert_close(error, torch.tensor(1.0))
    assert relative_error(CALL.y_TD, CALL.y_TD, power) == 0


@pytest.mark.parametrize("steps", [1, 2, 10, 400])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_the_rate_rises_to_its_peak_and_falls(steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]

    peak = factors.index(max(factors))
    assert max(factors) == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0
    assert peak + 1 == max(1, round(steps * warmup))


def test_the_floor_is_not_the_peak() -> None:
    assert learning_rate_factor(0, 400, 0.05) == 1 / 20
    assert learning_rate_factor(19, 400, 0.05) == learning_rate_factor(20, 400, 0.05) == 1
    assert learning_rate_factor(399, 400, 0.05) < 1e-4
    assert learning_rate_factor(400, 400, 0.05) == 0
    assert learning_rate_factor(210, 400, 0.05) == pytest.approx(0.5)


def test_students_with_nothing_to_train_but_deltas_or_bases_are_distilled() -> None:
    bare = FusedExperts(D, F, E, G, 0, GATING)
    bare.reset_parameters()
    result = distill_layer(bare, CALL, OPTIONS)
    assert result.after < result.before

    frozen = perturbed()
    frozen.bases.requires_grad_(False)
    result = distill_layer(frozen, CALL, OPTIONS)
    assert result.after < result.before
    assert same_bits(frozen.bases, perturbed().bases)


def test_in_bfloat16_it_learns_as_well_and_keeps_float32() -> None:
    options = replace(OPTIONS, steps=300)
    exact, _ = distilled(options=options)
    student = perturbed()

    result = distill_layer(student, CALL, replace(options, precision="bfloat16"))

    assert {tensor.dtype for tensor in student.parameters()} == {torch.float32}
    assert not same_bits(student, exact)
    power = float(CALL.y_TD.square().mean())
    assert result.after < 0.05 * result.before
    assert result.after < 2 * measure(exact, CALL, power, 64) + 1e-3
