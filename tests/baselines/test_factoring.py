"""Rivals that factor every expert's matrices, D2-MoE and MoBE, compared with what defines them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import EXPERT, FAMILIES, D, E, K, inputs, layer_of, matrix_numbers, native_block, output
from numeric import assert_close
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError, d2_moe, method, mobe
from moefuse.baselines._native import native_experts
from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import power_of, relative_error
from moefuse.mathematics.lowrank import damped, low_rank

F = 16
LEAST = {
    "d2-moe": EXPERT + 3 * E * (F + D),
    "mobe": 3 * (E * F + D + E),
}
"""Numbers of the smallest student: a base with deltas of rank 1; one basis of rank 1."""
METHODS = sorted(LEAST)


def tiny_layer(model_type: str = "deepseek_v2", x_TD: Tensor | None = None) -> Layer:
    return layer_of(native_block(model_type), model_type, x_TD=x_TD)


def students(name: str, layer: Layer, share: float) -> nn.Module:
    return method(name).compress(layer, int(share * layer.numbers))


def held(student: nn.Module) -> int:
    return sum(parameter.numel() for parameter in student.parameters())


def error_of(student: nn.Module, call: ExpertsCall) -> float:
    return float(relative_error(output(student, call), call.y_TD, power_of(call)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Both.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_distilling_a_spoilt_student_trains_every_weight(model_type: str, name: str) -> None:
    layer = tiny_layer(model_type, x_TD=normal(4000, D))
    student = students(name, layer, 0.4)
    assert matrix_numbers(student) <= 0.4 * layer.numbers
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.7)
    start = {n: t.clone() for n, t in student.state_dict().items()}
    options = DistillConfig(steps=80, batch_tokens=256, held_back=0.2)

    result = distill_layer(student, layer.call, options)

    assert result.after < 0.95 * result.before
    assert all(not torch.equal(p, start[n]) for n, p in student.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_more_numbers_err_less(name: str) -> None:
    layer = tiny_layer()

    errors = [error_of(students(name, layer, share), layer.call) for share in (0.3, 0.6, 0.9)]

    assert errors[0] > 1.1 * errors[1] > 1.1 * 1.1 * errors[2]


@pytest.mark.parametrize("name", METHODS)
def test_the_smallest_student_is_made_and_a_smaller_one_is_refused(name: str) -> None:
    layer = tiny_layer()

    student = method(name).compress(layer, LEAST[name])

    assert held(student) == LEAST[name]
    with pytest.raises(TooSmallError, match=f"{LEAST[name] - 1} numbers .* takes {LEAST[name]}"):
        method(name).compress(layer, LEAST[name] - 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.35, 0.8, 1.2])
def test_active_parameters_are_those_that_one_token_passes(name: str, share: float) -> None:
    """What a token passes is what its output has a derivative by."""
    layer = tiny_layer()
    student = students(name, layer, share)
    call = layer.call.rows(slice(0, 1))

    student(call.x_TD, call.index_TK.long(), call.weight_TK).square().sum().backward()

    passed = [p.grad for p in student.parameters() if p.grad is not None]
    assert sum(int(grad.count_nonzero()) for grad in passed) == student.active_parameters(K)
    assert student.active_parameters(E) == student.active_parameters(E + 1) == held(student)


@pytest.mark.parametrize("name", METHODS)
def test_tokens_alone_give_what_they_give_in_a_batch(name: str) -> None:
    layer = tiny_layer()
    student = students(name, layer, 0.5)
    call = layer.call.rows(slice(0, 20))

    alone = torch.cat([output(student, call.rows(slice(t, t + 1))) for t in range(20)])

    assert_close(alone, output(student, call))


@pytest.mark.parametrize("name", METHODS)
def test_factoring_twice_gives_the_same_bits(name: str) -> None:
    first, second = (students(name, tiny_layer(), 0.4).state_dict() for _ in range(2))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.4, 0.95])
def test_weights_are_fp32_matrices_and_none_is_named_as_a_router_is(
    name: str, share: float
) -> None:
    student = students(name, tiny_layer(), share)

    for parameter_name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.ndim in {2, 3}
        assert ".gate." not in parameter_name


# D2-MoE.


def test_the_base_is_the_fisher_weighted_mean() -> None:
    """Against the squared derivatives of every output of every token, by automatic Jacobians."""
    layer = tiny_layer()
    call = layer.call.rows(slice(0, 40))
    gate_up, down = layer.experts.gate_up_EFD.double(), layer.experts.down_EDF.double()

    def one_token(gate_up: Tensor, down: Tensor, token: int) -> Tensor:
        experts = Experts(gate_up, down, layer.experts.gating)
        slots = zip(call.index_TK[token].tolist(), call.weight_TK[token].double(), strict=True)
        x_TD = call.x_TD[token : token + 1].double()
        return sum((w * experts.run(e, x_TD) for e, w in slots), torch.zeros(1, D).double())

    totals = [torch.zeros_like(gate_up), torch.zeros_like(down)]
    for token in range(len(call.x_TD)):
        jacobians = torch.func.jacrev(one_token, argnums=(0, 1))(gate_up, down, token)
        for total, jacobian in zip(totals, jacobians, strict=True):
            total.add_(jacobian.square().sum((0, 1)))

    base = d2_moe.fisher_weighted_mean(layer.experts, call)

    gate_up_base, down_base = (
        (total * weight).sum(0) / total.sum(0)
        for total, weight in zip(totals, (gate_up, down), strict=True)
    )
    assert_close(torch.cat([base.gate, base.up]), gate_up_base)
    assert_close(base.down, down_base)
    assert float((base.down - down.mean(0)).abs().max()) > 0.05


def test_the_student_holds_that_base() -> None:
    layer = tiny_layer()
    base = d2_moe.fisher_weighted_mean(layer.experts, layer.call)

    state = students("d2-moe", layer, 0.4).state_dict()

    assert_close(state["bases.0.gate_up_proj.weight"], torch.cat([base.gate, base.up]))
    assert_close(state["bases.0.down_proj.weight"], base.down)


def test_where_no_token_tells_anything_the_base_is_the_plain_mean() -> None:
    layer = tiny_layer()

    base = d2_moe.fisher_weighted_mean(layer.experts, layer.call.rows(slice(0, 0)))

    assert_close(torch.cat([base.gate, base.up]), layer.experts.gate_up_EFD.mean(0))
    assert_close(base.down, layer.experts.down_EDF.mean(0))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_d2_moe_at_full_rank_is_the_teacher(model_type: str) -> None:
    layer = tiny_layer(model_type)

    student = method("d2-moe").compress(layer, EXPERT + 3 * E * F * (F + D))

    assert_close(output(student, layer.call), layer.call.y_TD)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_whitening_errs_less_where_inputs_are_skewed(model_type: str) -> None:
    layer = tiny_layer(model_type, x_TD=inputs() * torch.logspace(-1.5, 0.5, D))
    student = students("d2-moe", layer, 0.5)
    whitened = error_of(student, layer.call)

    base = d2_moe.fisher_weighted_mean(layer.experts, layer.call)
    deltas = student.delta
    pairs = (deltas.gate_proj, deltas.up_proj, deltas.down_proj)  # type: ignore[union-attr]
    for expert in range(E):
        own = d2_moe.matrices_of(layer.experts, expert)
        for pair, matrix_OI, base_OI in zip(pairs, own, base, strict=True):
            pair.b[expert], pair.a[expert] = low_rank(matrix_OI - base_OI, pair.a.shape[1])  # type: ignore[index, union-attr]
    plain = error_of(student, layer.call)

    assert whitened < 0.8 * plain


def test_a_delta_is_the_truncation_that_the_papers_cholesky_factor_gives() -> None:
    layer = tiny_layer(x_TD=inputs() * torch.logspace(-1.0, 0.5, D))
    base = d2_moe.fisher_weighted_mean(layer.experts, layer.call)
    student = students("d2-moe", layer, 0.5)
    expert, call = 5, layer.call
    x_ND = call.x_TD[(call.index_TK == expert).any(1)].double()
    assert len(x_ND) >= D
    factor_DD = torch.linalg.cholesky(damped(x_ND.T @ x_ND / len(x_ND), d2_moe.DAMPING))
    delta_FD = d2_moe.matrices_of(layer.experts, expert).gate - base.gate

    pair = student.delta.gate_proj  # type: ignore[union-attr]
    a_RD, b_FR = pair.a[expert], pair.b[expert]  # type: ignore[index, union-attr]

    expected_b, expected_a = low_rank(delta_FD @ factor_DD, len(a_RD))
    assert 1 < len(a_RD) < F
    assert_close(b_FR @ a_RD, expected_b @ expected_a @ torch.linalg.inv(factor_DD))


def test_an_expert_with_few_tokens_is_whitened_on_all_of_them() -> None:
    layer = tiny_layer()
    chose_T = (layer.call.index_TK == 3).any(1)
    few = torch.cat([(~chose_T).nonzero().flatten(), chose_T.nonzero().flatten()[: D - 1]])
    call = layer.call.rows(few)
    own = d2_moe.matrices_of(layer.experts, 3)
    x_TD = call.x_TD.double()
    z_TF = layer.experts.gating(x_TD @ own.gate.T, x_TD @ own.up.T)

    moments = d2_moe.whitening_moments(layer.experts, call, 3)

    assert_close(moments.gate, damped(x_TD.T @ x_TD / len(x_TD), d2_moe.DAMPING))
    assert_close(moments.down, damped(z_TF.T @ z_TF / len(z_TF), d2_moe.DAMPING))
    student = students("d2-moe", replace(layer, call=call), 0.4)
    assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())


@given(st.integers(0, 40_000), st.integers(2, 20), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_ranks_are_the_largest_that_fit(numbers: int, experts: int, hidden: int, f: int) -> None:
    base, one = 3 * hidden * f, experts * (hidden + f)
    try:
        ranks = d2_moe.ranks_within(numbers, experts, hidden, f)
    except TooSmallError:
        assert numbers < base + 3 * one
        return

    assert 1 <= min(ranks) <= max(ranks) <= min(min(ranks) + 1, hidden, f)
    assert base + sum(ranks) * one <= numbers
    assert base + (sum(ranks) + 1) * one > numbers or min(ranks) == min(hidden, f)


# MoBE.


def relative(factors: mobe.Factors, matrix_EOI: Tensor) -> float:
    made_EOI = factors.own_EOR @ mobe.mixed_bases(factors.mixture_EM, factors.bases_MRI)
    return float((made_EOI - matrix_EOI).square().sum() / matrix_EOI.square().sum())


def started(matrix_EOI: Tensor, rank: int, bases: int) -> mobe.Factors:
    logits_EM, bases_MRI = mobe.starting_bases(matrix_EOI, rank, bases)
    mixture_EM = logits_EM.softmax(1)
    own_EOR = matrix_EOI @ torch.linalg.pinv(mobe.mixed_bases(mixture_EM, bases_MRI))
    return mobe.Factors(own_EOR, mixture_EM, bases_MRI)


def planted(rank: int, bases: int, seed: int) -> Tensor:
    """Return (E, F, D) matrices that are exactly a random MoBE model's."""
    mixture_EM = normal(E, bases, seed=seed).softmax(1)
    mixed_ERD = mobe.mixed_bases(mixture_EM, normal(bases, rank, D, seed=seed + 1))
    return normal(E, F, rank, seed=seed + 2) @ mixed_ERD


@pytest.mark.parametrize("rank", [1, 5, F])
def test_matrices_of_one_planted_basis_are_recovered(rank: int) -> None:
    matrix_EFD = planted(rank, bases=1, seed=0)

    assert relative(mobe.fit(matrix_EFD, rank, 1), matrix_EFD) < 1e-6


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_matrices_of_planted_mixtures_are_recovered(seed: int) -> None:
    matrix_EFD = planted(F, bases=2, seed=seed)

    fitted = relative(mobe.fit(matrix_EFD, F, 2), matrix_EFD)

    assert fitted < 0.02
    assert fitted < 0.4 * relative(started(matrix_EFD, F, 2), matrix_EFD)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_of_planted_bases_give_what_the_teachers_give(model_type: str) -> None:
    layer = tiny_layer(model_type)
    planted_up = [0.2 * planted(6, bases=1, seed=seed) for seed in (0, 10, 20)]
    gate_EFD, up_EFD, down_EFD = planted_up
    biases = layer.experts.biases
    experts = Experts(torch.cat([gate_EFD, up_EFD], 1), down_EFD.mT, layer.experts.gating, biases)
    down_bias = None if biases is None else biases.down_ED
    native = native_experts(layer, experts.rows_EFD, experts.down_EDF, down_bias)
    y_TD = output(native, layer.call)
    planted_layer = replace(layer, experts=experts, call=replace(layer.call, y_TD=y_TD))

    student = students("mobe", planted_layer, 0.6)

    assert error_of(student, planted_layer.call) < 1e-4


def test_the_start_is_the_decomposition_of_the_experts_that_share_a_basis() -> None:
    """With one basis f is undone exactly: the start is the best there is with one row space."""
    matrix_EFD = tiny_layer().experts.gate_up_EFD[:, :F]
    rows = matrix_EFD.flatten(0, 1)
    tail = torch.linalg.svdvals(rows)[5:].square().sum() / rows.square().sum()

    assert relative(started(matrix_EFD, 5, 1), matrix_EFD) == pytest.approx(float(tail), rel=1e-4)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("share", [0.4, 0.9])
@torch.no_grad()
def test_mobe_computes_with_the_matrices_its_factors_make(model_type: str, share: float) -> None:
    layer = tiny_layer(model_type)
    with torch.enable_grad():
        student = students("mobe", layer, share)

    def multiplied(projection: nn.Module) -> Tensor:
        if isinstance(projection, mobe.KeptProjection):
            return projection.weight
        assert isinstance(projection, mobe.MixedBases)
        mixed = torch.einsum("em,mab->eab", projection.mixture, projection.bases).tanh()
        return mixed @ projection.own if projection.is_mirrored else projection.own @ mixed

    gate, up, down = (
        multiplied(student.get_submodule(f"{name}_proj")) for name in ("gate", "up", "down")
    )
    biases = layer.experts.biases
    made = Experts(torch.cat([gate, up], 1), down, layer.experts.gating, biases)
    native = native_experts(layer, made.rows_EFD, down, biases and biases.down_ED)
    assert_close(output(student, layer.call), output(native, layer.call))


def test_the_papers_own_form_keeps_down() -> None:
    layer = tiny_layer()

    kept, factored = (students("mobe", layer, share) for share in (0.95, 0.4))

    assert torch.equal(kept.get_parameter("down_proj.weight"), layer.experts.down_EDF)
    assert isinstance(factored.get_submodule("down_proj"), mobe.MixedBases)


def cost(size: mobe.Size, experts: int, f: int, hidden: int) -> int:
    one = experts * f * size.rank + size.bases * (size.rank * hidden + experts)
    return 2 * one + experts * f * hidden if size.keeps_down else 3 * one


@given(st.integers(0, 60_000), st.integers(2, 20), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_sizes_follow_the_rule(numbers: int, experts: int, f: int, hidden: int) -> None:
    usual, full = max(1, experts // 4), min(f, hidden)
    try:
        size = mobe.size_within(numbers, experts, f, hidden)
    except TooSmallError:
        assert cost(mobe.Size(1, 1, keeps_down=False), experts, f, hidden) > numbers
        return

    def fits(**changes: int | bool) -> bool:
        return cost(replace(size, **changes), experts, f, hidden) <= numbers  # type: ignore[arg-type]

    assert fits()
    assert size.keeps_down == fits(rank=full, bases=usual, keeps_down=True)
    assert 1 <= size.rank <= full
    assert size.rank == full or not fits(rank=size.rank + 1, bases=usual)
    assert size.bases >= usual or size.rank == 1
    assert size.bases == experts or not fits(bases=size.bases + 1)
