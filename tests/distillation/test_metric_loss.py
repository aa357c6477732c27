"""Distilling by what counts: a metric's root, and errors that are lessened where they matter."""

import copy
from dataclasses import replace

import pytest
import torch
from numeric import assert_close
from torch import Tensor, nn

from moefuse.config import DistillConfig
from moefuse.distillation.loop import (
    DistillResult,
    _parameter_groups,
    distill_layer,
    metric_root,
)
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.losses import student_output
from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import PlainGating

GATING = PlainGating(torch.nn.functional.silu)
T, K, E, D, F = 600, 2, 6, 8, 6
OPTIONS = DistillConfig(steps=60, batch_tokens=64, learning_rate=1e-2)
DAMPING = 0.05


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_experts(groups: int, rank: int, seed: int) -> FusedExperts:
    experts = FusedExperts(D, F, E, groups, rank, GATING, scale=True, bias=True)
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=1000 * seed + number))
    return experts


@torch.no_grad()
def call_of(teacher: nn.Module, seed: int) -> ExpertsCall:
    x_TD = normal(T, D, seed=seed)
    scores_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(seed + 1))
    weight_TK, index_TK = scores_TE.topk(K)
    y_TD = teacher(x_TD, index_TK, weight_TK)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), weight_TK, y_TD)


TEACHER = random_experts(groups=E, rank=0, seed=1)
CALL, UNSEEN = call_of(TEACHER, seed=1), call_of(TEACHER, seed=10)


def small_student() -> FusedExperts:
    """Return a student that is far too small to be the teacher."""
    return random_experts(groups=1, rank=1, seed=2)


def one_direction_counts(times: float, seed: int = 5) -> Tensor:
    """Return a metric in which one direction matters ``times`` as much as each of the others."""
    direction_D = nn.functional.normalize(normal(D, seed=seed), dim=0)
    return torch.eye(D) + (times - 1) * torch.outer(direction_D, direction_D)


def distilled(
    root_DD: Tensor | None, options: DistillConfig = OPTIONS
) -> tuple[FusedExperts, DistillResult]:
    student = small_student()
    return student, distill_layer(student, CALL, options, seed=3, metric_root_DD=root_DD)


@torch.no_grad()
def error_in(metric_DD: Tensor, student: nn.Module, call: ExpertsCall) -> float:
    """Return the mean of ``d^T metric d`` over tokens, relative to the teacher's own output."""
    error_TD = student_output(student, call) - call.y_TD
    lost, whole = (torch.einsum("td,de,te->", v, metric_DD, v) for v in (error_TD, call.y_TD))
    return float(lost / whole)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(torch.equal(a, b) for (_, a), (_, b) in pairs)


# The root.


def gram(rank: int, size: float = 1.0) -> Tensor:
    factor_DR = normal(D, rank, seed=rank)
    return size * factor_DR @ factor_DR.T


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("rank", [1, 3, D])
@pytest.mark.parametrize("damping", [0.05, 1.0])
def test_the_root_squared_is_the_scaled_metric_damped(
    damping: float, rank: int, size: float
) -> None:
    metric_DD = gram(rank, size)

    root_DD = metric_root(metric_DD, damping)

    mean_eigenvalue = torch.linalg.eigvalsh(metric_DD.double()).mean()
    expected_DD = metric_DD.double() / mean_eigenvalue + damping * torch.eye(D)
    assert root_DD.dtype == torch.float32
    assert_close(root_DD @ root_DD.T, expected_DD.float(), 1e-5)
    error_TD = normal(20, D, seed=9)
    felt_T = torch.einsum("td,de,te->t", error_TD, expected_DD.float(), error_TD)
    assert_close((error_TD @ root_DD).square().sum(1), felt_T, 1e-5)


def test_a_metric_of_zeros_leaves_all_directions_alike() -> None:
    root_DD = metric_root(torch.zeros(D, D), DAMPING)

    assert_close(root_DD, DAMPING**0.5 * torch.eye(D), 1e-6)


def test_the_size_of_a_metric_does_not_matter() -> None:
    assert_close(metric_root(gram(3, 1e-9), DAMPING), metric_root(gram(3), DAMPING), 1e-5)


# Distillation by it.


class Narrow(nn.Module):
    """A student through which two directions pass, whichever it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_RD = nn.Parameter(0.3 * normal(2, D, seed=30))
        self.outer_DR = nn.Parameter(0.3 * normal(D, 2, seed=31))

    def forward(self, x_TD: Tensor, *_: Tensor) -> Tensor:
        return x_TD @ self.inner_RD.T @ self.outer_DR.T


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_errors_are_lessened_where_they_matter(seed: int) -> None:
    """A rotation has eight directions alike: plainly any two are learnt, by the metric that one.

    What is left at best is six directions of eight, or six at weight 1 beside 100 and 1.
    """
    rotation_DD = torch.linalg.qr(normal(D, D, seed=40)).Q
    call = replace(CALL, y_TD=CALL.x_TD @ rotation_DD.T)
    unseen = replace(UNSEEN, y_TD=UNSEEN.x_TD @ rotation_DD.T)
    metric_DD, plain, felt = one_direction_counts(100, seed), Narrow(), Narrow()
    options = replace(OPTIONS, steps=400)

    distill_layer(plain, call, options)
    distill_layer(felt, call, options, metric_root_DD=metric_root(metric_DD, DAMPING))

    for tokens in (call, unseen):
        assert error_in(metric_DD, felt, tokens) < 0.08
        assert error_in(metric_DD, felt, tokens) < 0.3 * error_in(metric_DD, plain, tokens)


def test_results_are_errors_in_the_metric() -> None:
    metric_DD = one_direction_counts(100)
    start, options = small_student(), replace(OPTIONS, held_back=0.5)

    student, result = distilled(metric_root(metric_DD, DAMPING), options)

    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    aside, scaled_DD = CALL.rows(order[: T // 2]), metric_DD / metric_DD.diagonal().mean()
    damped_DD = scaled_DD + DAMPING * torch.eye(D)
    # Relative to the teacher's output over all tokens, not only those held back.
    whole = torch.einsum("td,de,te->", CALL.y_TD, damped_DD, CALL.y_TD) / T
    held = torch.einsum("td,de,te->", aside.y_TD, damped_DD, aside.y_TD) / len(aside.y_TD)
    for found, module in ((result.before, start), (result.after, student)):
        expected = error_in(damped_DD, module, aside) * float(held / whole)
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_identity_changes_no_bit() -> None:
    plain, plain_result = distilled(None)
    felt, felt_result = distilled(torch.eye(D))

    assert same_bits(plain, felt)
    assert felt_result == plain_result


@pytest.mark.parametrize("metric_DD", [gram(1), torch.zeros(D, D)], ids=["rank one", "zeros"])
def test_metrics_that_hardly_feel_are_distilled_by(metric_DD: Tensor) -> None:
    student, result = distilled(metric_root(metric_DD, DAMPING))

    assert result.after < result.before
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_a_metric_of_zeros_is_plain_distillation() -> None:
    plain, plain_result = distilled(None)
    felt, result = distilled(metric_root(torch.zeros(D, D), DAMPING))

    assert result.losses == pytest.approx(plain_result.losses, rel=1e-3)
    for name, tensor in plain.state_dict().items():
        assert_close(felt.state_dict()[name], tensor, 1e-3)


def test_the_same_seed_gives_the_same_bits() -> None:
    root_DD = metric_root(one_direction_counts(100), DAMPING)

    first, first_result = distilled(root_DD)
    second, second_result = distilled(root_DD)

    assert first_result == second_result
    assert same_bits(first, second)


def test_bf16_calls_are_compared_in_fp32() -> None:
    call = replace(CALL, y_TD=CALL.y_TD.bfloat16())
    student, root_DD = small_student(), metric_root(gram(2), DAMPING)

    result = distill_layer(student, call, OPTIONS, metric_root_DD=root_DD)

    assert result.after < result.before
    assert call.y_TD.dtype == torch.bfloat16


@pytest.mark.parametrize("rate", ["learning_rate", "delta_learning_rate", "scale_learning_rate"])
def test_bases_deltas_and_scales_keep_rates_of_their_own(rate: str) -> None:
    starts = {
        "learning_rate": "bases.",
        "delta_learning_rate": "delta.",
        "scale_learning_rate": ("scale", "bias"),
    }
    student, _ = distilled(torch.eye(D), replace(OPTIONS, steps=10, **{rate: 0.0}))

    start = small_student()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) == name.startswith(starts[rate])


def test_steps_that_do_harm_are_undone() -> None:
    root_DD = metric_root(one_direction_counts(100), DAMPING)
    student = copy.deepcopy(TEACHER)

    result = distill_layer(student, CALL, OPTIONS, metric_root_DD=root_DD)

    assert result.after == result.before < 1e-12
    assert same_bits(student, TEACHER)


@pytest.mark.parametrize("root_DD", [None, torch.eye(D)], ids=["plain", "felt"])
def test_a_student_without_parameters_stays_as_it_is(root_DD: Tensor | None) -> None:
    class Silent(nn.Module):
        """What is left of a layer that got no neurons."""

        def forward(self, x_TD: Tensor, *_: Tensor) -> Tensor:
            return torch.zeros_like(x_TD)

    result = distill_layer(Silent(), CALL, replace(OPTIONS, held_back=0.5), metric_root_DD=root_DD)

    assert result.losses == []
    assert result.after == result.before == pytest.approx(1, rel=0.2)


def test_own_and_shared_neurons_have_rates_of_their_own() -> None:
    options = DistillConfig()
    expected = {
        "own.bits2.latent": options.code_learning_rate,
        "own.bits2.scale": options.code_learning_rate,
        "own.bits16.weight": options.neuron_learning_rate,
        "shared.latent": options.shared_code_learning_rate,
        "gain.codebook": options.shared_code_learning_rate,
        "shared.weight": options.learning_rate,
        "gain.weight": options.scale_learning_rate,
        "bases.0.down_proj.weight": options.learning_rate,
    }
    student = nn.Module()
    for name in expected:
        place = student
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.register_parameter(last, nn.Parameter(torch.zeros(1)))

    groups = _parameter_groups(student, options)

    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in student.named_parameters()} == expected
