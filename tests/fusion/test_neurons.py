"""Bases of important neurons: every step by its definition, and the better way is chosen."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.errors import UserError
from moefuse.fusion.choose import factor
from moefuse.fusion.neurons import (
    RIDGE,
    base_features,
    fit_down,
    fit_down_delta,
    fit_gains,
    fit_neurons,
    importance,
    neurons,
    ridge_fit,
    ridge_solve,
    rows_of_expert,
    select_neurons,
)
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of, student_output
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling import FusedExperts
from moefuse.modeling.modeling_moefuse import PlainGating
from moefuse.sizes import LayerPlan, load_experts

GATING = PlainGating(torch.nn.functional.silu)
T, K, E, D, F = 400, 2, 6, 9, 5
GROUPS = torch.tensor([0, 1, 1, 0, 1, 2])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts_of(width: int = F, hidden: int = D, seed: int = 0) -> Experts:
    """Return random experts that have nothing in common."""
    gate_up_EFD = normal(E, 2 * width, hidden, seed=seed)
    return Experts(gate_up_EFD, normal(E, hidden, width, seed=seed + 1), GATING)


def call_of(
    experts: Experts, never: tuple[int, ...] = (), tokens: int = T, seed: int = 0
) -> ExpertsCall:
    """Return what the layer does on random inputs; no token chooses the experts ``never``."""
    x_TD = normal(tokens, experts.gate_up_EFD.shape[2], seed=seed + 2)
    scores_TE = torch.rand(tokens, E, generator=torch.Generator().manual_seed(seed + 3))
    scores_TE[:, list(never)] = 0
    weight_TK, index_TK = scores_TE.topk(K)
    outputs_ETD = torch.stack([experts.run(expert, x_TD) for expert in range(E)])
    chosen_TKD = outputs_ETD[index_TK, torch.arange(tokens)[:, None]]
    y_TD = (chosen_TKD * weight_TK.unsqueeze(-1)).sum(1)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), weight_TK, y_TD)


EXPERTS = experts_of()
CALL = call_of(EXPERTS)


def statistics_of(call: ExpertsCall, experts: Experts = EXPERTS) -> LayerStatistics:
    found = LayerStatistics.empty(E, D)
    found.add(call, experts)
    return found


def error_of(
    state: dict[str, Tensor], plan: LayerPlan, call: ExpertsCall = CALL, experts: Experts = EXPERTS
) -> float:
    return measure(load_experts(state, experts, plan), call, power_of(call), 64)


def fused(state: dict[str, Tensor], experts: Experts = EXPERTS) -> FusedExperts:
    """Make the fused module of a state, groups and rank read off it."""
    rank = state["delta.gate_up_a"].shape[1] if "delta.gate_up_a" in state else 0
    groups = int(state["group_of_expert"].max()) + 1
    return load_experts(state, experts, LayerPlan(groups, rank, scale=True))


def kept_neurons(experts: Experts, call: ExpertsCall, rank: int) -> Tensor:
    """Return the neurons that every expert must keep for itself: the most important, (E, O)."""
    kept = min(rank // 2, *experts.down_EDF.shape[1:])
    return importance(experts, call).sort(dim=1, descending=True, stable=True).indices[:, :kept]


def only(experts: Experts, neurons_EO: Tensor) -> Experts:
    """Return the experts with none but some of their neurons."""
    mask_EF = torch.zeros(E, experts.down_EDF.shape[2]).scatter(1, neurons_EO, 1.0)
    return replace(experts, down_EDF=experts.down_EDF * mask_EF.unsqueeze(1))


def run_layer(experts: Experts, call: ExpertsCall) -> Tensor:
    """Return the native layer's output by its definition, (T, D)."""
    y_TD = torch.zeros_like(call.x_TD)
    for expert in range(E):
        token_N, weight_N1 = rows_of_expert(call, expert)
        y_TD[token_N] += experts.run(expert, call.x_TD[token_N]) * weight_N1
    return y_TD


def slots(state: dict[str, Tensor], expert: int) -> list[int]:
    """Return the base neurons that an expert uses neither gate nor up of."""
    gate_F, up_F = (state["scale"][expert] == 0).chunk(2)
    assert torch.equal(gate_F, up_F)
    return gate_F.nonzero().flatten().tolist()


def test_importance_is_the_energy_that_a_neuron_adds_to_the_output() -> None:
    expected_EF = torch.zeros(E, F)
    for x_D, chosen, weights in zip(CALL.x_TD, CALL.index_TK, CALL.weight_TK, strict=True):
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            z_F = neurons(EXPERTS, EXPERTS.gate_up_EFD[expert], x_D[None])[0]
            added_DF = EXPERTS.down_EDF[expert] * (weight * z_F)
            expected_EF[expert] += added_DF.square().sum(0)

    assert_close(importance(EXPERTS, CALL), expected_EF)


def metric_of(rank: int) -> Tensor:
    factor_DR = normal(D, rank, seed=20 + rank)
    return factor_DR @ factor_DR.T


@pytest.mark.parametrize("rank", [1, 4, D])
def test_importance_in_a_metric_counts_what_is_felt_of_a_neuron(rank: int) -> None:
    """The metric may feel fewer directions than there are."""
    metric_DD, expected_EF = metric_of(rank), torch.zeros(E, F)
    for expert in range(E):
        token_N, weight_N1 = rows_of_expert(CALL, expert)
        z_NF = neurons(EXPERTS, EXPERTS.gate_up_EFD[expert], CALL.x_TD[token_N]) * weight_N1
        added_NFD = z_NF.unsqueeze(-1) * EXPERTS.down_EDF[expert].T
        felt_NF = torch.einsum("nfd,dc,nfc->nf", added_NFD, metric_DD, added_NFD)
        expected_EF[expert] = felt_NF.sum(0)

    found_EF = importance(EXPERTS, CALL, metric_DD)

    assert (found_EF >= 0).all()
    assert_close(found_EF, expected_EF)


def test_importance_in_the_identity_is_importance_without() -> None:
    assert torch.equal(importance(EXPERTS, CALL, torch.eye(D)), importance(EXPERTS, CALL))


def test_importance_grows_with_the_metric() -> None:
    assert_close(
        importance(EXPERTS, CALL, 7 * metric_of(3)), 7 * importance(EXPERTS, CALL, metric_of(3))
    )


def test_what_nothing_feels_is_of_no_importance() -> None:
    assert not importance(EXPERTS, CALL, torch.zeros(D, D)).any()


def test_a_neuron_counts_only_by_its_part_in_directions_that_are_felt() -> None:
    """The metric feels the first output alone, and one neuron of expert 0 adds nothing there."""
    metric_DD = torch.zeros(D, D)
    metric_DD[0, 0] = 1
    down_EDF = EXPERTS.down_EDF.clone()
    down_EDF[0, 0, 2] = 0

    found_EF = importance(replace(EXPERTS, down_EDF=down_EDF), CALL, metric_DD)

    assert found_EF[0, 2] == 0
    assert (found_EF > 0).sum() == E * F - 1


def test_a_base_takes_its_members_most_important_neurons() -> None:
    importance_EF = torch.tensor([[1.0, 9.0, 2.0], [8.0, 0.0, 7.0], [50.0, 60.0, 70.0]])

    expert_F, neuron_F = select_neurons(importance_EF, torch.tensor([0, 1]))

    assert list(zip(expert_F.tolist(), neuron_F.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 2)]


def test_the_rows_of_an_expert_are_its_tokens() -> None:
    token_N, weight_N1 = rows_of_expert(CALL, 3)

    expected = [t for t in range(T) if 3 in CALL.index_TK[t].tolist()]
    assert token_N.tolist() == expected
    slots = [CALL.index_TK[t].tolist().index(3) for t in expected]
    assert torch.equal(weight_N1[:, 0], CALL.weight_TK[expected, slots])


def test_a_ridge_of_next_to_nothing_solves_and_nothing_gives_zeros() -> None:
    x_TB, target_BO = normal(50, 4, seed=0), normal(4, 3, seed=1)
    gram_BB = x_TB.T @ x_TB

    solution_BO = ridge_solve(gram_BB, gram_BB @ target_BO)

    assert_close(solution_BO.float(), target_BO, 1e-2)  # the ridge is a thousandth
    assert not ridge_solve(torch.zeros(4, 4), torch.zeros(4, 3)).any()


def gains_of(expert: int, base: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the neurons of ``base`` make of an expert's tokens, its output, its gains."""
    token_N, weight_N1 = rows_of_expert(CALL, expert)
    x_ND = CALL.x_TD[token_N]
    z_NF = neurons(EXPERTS, EXPERTS.gate_up_EFD[base], x_ND) * weight_N1
    target_ND = EXPERTS.run(expert, x_ND) * weight_N1
    return z_NF, target_ND, fit_gains(z_NF, target_ND, EXPERTS.down_EDF[base])


def test_an_experts_own_neurons_get_gains_of_one() -> None:
    _, _, gain_F = gains_of(2, base=2)

    assert_close(gain_F, torch.ones(F), 1e-2)  # the ridge is a thousandth


def test_no_other_gains_err_less() -> None:
    z_NF, target_ND, best_F = gains_of(2, base=0)

    def error(gain_F: Tensor) -> float:
        return float((target_ND - (z_NF * gain_F) @ EXPERTS.down_EDF[0].T).square().sum())

    assert error(best_F) < error(torch.zeros(F))
    for seed in range(20):
        assert error(best_F) < error(best_F + 0.1 * normal(F, seed=seed))


def test_the_down_projections_are_the_least_squares_against_the_target() -> None:
    target_TD = normal(T, D, seed=9)
    state = fit_neurons(EXPERTS, CALL, GROUPS, 0)
    z_TB = torch.cat(list(base_features(EXPERTS, CALL, state, 3)), dim=1)

    left_TD = fit_down(EXPERTS, CALL, target_TD, state, 3)

    assert_close(left_TD, target_TD - student_output_without_grad(state))
    expected_BD = torch.linalg.lstsq(z_TB.double(), target_TD.double()).solution
    down_BD = torch.cat([state[f"bases.{group}.down_proj.weight"].T for group in range(3)])
    assert_close(z_TB @ down_BD, (z_TB.double() @ expected_BD).float(), 1e-2)  # the ridge


def student_output_without_grad(state: dict[str, Tensor], call: ExpertsCall = CALL) -> Tensor:
    with torch.no_grad():
        return student_output(fused(state), call)


def test_a_planted_down_delta_is_recovered() -> None:
    z_NF, planted_DF = normal(300, F, seed=0), normal(D, 2, seed=1) @ normal(2, F, seed=2)

    b_DR, a_RF = fit_down_delta(z_NF, z_NF @ planted_DF.T, 2)

    assert b_DR.shape == (D, 2) and a_RF.shape == (2, F)
    assert_close(b_DR @ a_RF, planted_DF, 1e-2)  # the ridge is a thousandth


@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS, torch.arange(E)])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, F])
def test_the_state_fits_the_module_and_deltas_never_hurt(groups: Tensor, rank: int) -> None:
    count = int(groups.max()) + 1

    state = fit_neurons(EXPERTS, CALL, groups, rank)

    found = error_of(state, LayerPlan(count, rank, scale=True))
    bare = fit_neurons(EXPERTS, CALL, groups, 0)
    assert found <= error_of(bare, LayerPlan(count, 0, scale=True)) < 1


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_a_base_for_every_expert_is_the_layer_but_for_the_ridge(rank: int) -> None:
    state = fit_neurons(EXPERTS, CALL, torch.arange(E), rank)

    assert error_of(state, LayerPlan(E, rank, scale=True)) < 1e-4


# The neurons that experts keep for themselves.


@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS, torch.arange(E)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 7])
def test_the_neurons_an_expert_keeps_are_carried_exactly(groups: Tensor, rank: int) -> None:
    """With the bases silent and the remaining ranks off, just those neurons are left."""
    own_EO = kept_neurons(EXPERTS, CALL, rank)
    kept = own_EO.shape[1]
    state = fit_neurons(EXPERTS, CALL, groups, rank)
    assert [len(slots(state, expert)) for expert in range(E)] == [kept] * E
    assert not state["delta.gate_up_b"][:, :, 2 * kept :].any()  # a rank over starts as LoRA does

    state["scale"].zero_()
    state["delta.down_b"][:, :, kept:] = 0

    assert_close(student_output_without_grad(state), run_layer(only(EXPERTS, own_EO), CALL))


def test_what_bases_and_remaining_ranks_add_does_not_touch_the_neurons_kept() -> None:
    """Kept neurons are exact inside the whole module too: gate and up rows to the bit."""
    rank, own_EO = 5, kept_neurons(EXPERTS, CALL, 5)
    state = fit_neurons(EXPERTS, CALL, GROUPS, rank)

    delta_EFD = state["delta.gate_up_b"] @ state["delta.gate_up_a"]
    for expert, group in enumerate(GROUPS.tolist()):
        base_FD = state[f"bases.{group}.gate_up_proj.weight"]
        whole_FD = state["scale"][expert].unsqueeze(-1) * base_FD + delta_EFD[expert]
        own_FD = EXPERTS.gate_up_EFD[expert]
        places = slots(state, expert)
        found = [whole_FD[[f, F + f]].tolist() for f in places]
        kept = [own_FD[[f, F + f]].tolist() for f in own_EO[expert].tolist()]
        assert sorted(found) == sorted(kept)
        for f in sorted(set(range(F)) - set(places)):  # the others' rows are the base's
            assert torch.equal(whole_FD[f], base_FD[f]) and not delta_EFD[expert, F + f].any()


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_remaining_ranks_are_fitted_to_what_experts_before_left(rank: int) -> None:
    state, kept = fit_neurons(EXPERTS, CALL, GROUPS, rank), rank // 2
    delta_EFD = state["delta.gate_up_b"] @ state["delta.gate_up_a"]
    without = {name: tensor.clone() for name, tensor in state.items()}
    without["delta.down_b"][:, :, kept:] = 0
    left_TD = CALL.y_TD - student_output_without_grad(without)

    for expert, group in enumerate(GROUPS.tolist()):
        base_FD = state[f"bases.{group}.gate_up_proj.weight"]
        whole_FD = state["scale"][expert].unsqueeze(-1) * base_FD + delta_EFD[expert]
        token_N, weight_N1 = rows_of_expert(CALL, expert)
        z_NF = neurons(EXPERTS, whole_FD, CALL.x_TD[token_N]) * weight_N1
        b_DR, a_RF = fit_down_delta(z_NF, left_TD[token_N], rank - kept)
        found_DF = state["delta.down_b"][expert, :, kept:] @ state["delta.down_a"][expert, kept:]
        assert_close(found_DF, b_DR @ a_RF, 1e-3)  # a decomposition magnifies rounding
        left_TD[token_N] -= z_NF @ found_DF.T


@pytest.mark.parametrize("rank", [2 * F, 2 * F + 1, 2 * F + 4])
@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS])
@pytest.mark.parametrize("never", [(), (2, 5)])
def test_with_every_neuron_kept_the_module_is_the_layer(
    groups: Tensor, rank: int, never: tuple[int, ...]
) -> None:
    call = call_of(EXPERTS, never)

    state = fit_neurons(EXPERTS, call, groups, rank)

    assert not state["scale"].any()
    # On other tokens too, and of experts that no token that was fitted to reached.
    assert_close(student_output_without_grad(state), CALL.y_TD)


@pytest.mark.parametrize("rank", [2, 5, 8])
@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS])
def test_kept_neurons_stand_where_the_expert_used_the_base_least(groups: Tensor, rank: int) -> None:
    own_EO = kept_neurons(EXPERTS, CALL, rank)
    importance_EF = importance(EXPERTS, CALL).scatter(1, own_EO, 0.0)  # nobody offers what it keeps
    rest = only(EXPERTS, importance_EF.argsort(dim=1, descending=True)[:, : F - rank // 2])

    state = fit_neurons(EXPERTS, CALL, groups, rank)

    for expert, group in enumerate(groups.tolist()):
        members = (groups == group).nonzero().flatten()
        expert_F, neuron_F = select_neurons(importance_EF, members)
        down_DF = EXPERTS.down_EDF[expert_F, :, neuron_F].T
        token_N, weight_N1 = rows_of_expert(CALL, expert)
        x_ND = CALL.x_TD[token_N]
        z_NF = neurons(EXPERTS, state[f"bases.{group}.gate_up_proj.weight"], x_ND) * weight_N1
        gain_F = fit_gains(z_NF, rest.run(expert, x_ND) * weight_N1, down_DF)
        energy_F = torch.stack(
            [torch.outer(gain_F[f] * z_NF[:, f], down_DF[:, f]).square().sum() for f in range(F)]
        )
        least = energy_F.argsort()[: rank // 2].tolist()
        assert slots(state, expert) == sorted(least)


@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS, torch.arange(E)])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_two_ranks_more_do_not_raise_the_error_on_the_tokens_fitted_to(
    groups: Tensor, seed: int
) -> None:
    """A hundredth is let pass, and the square of the ridge's thousandth.

    Two ranks more keep one neuron more, but nothing nests: the base gives that neuron up and takes
    another, by energy and not by error, and every solution is a ridge off the best. Experts here
    differ; copies offer the same neurons twice, and there the error does go up now and then.
    """
    experts = experts_of(seed=seed)
    call = call_of(experts, seed=seed)
    count = int(groups.max()) + 1

    errors = []
    for rank in range(2 * F + 1):
        state = fit_neurons(experts, call, groups, rank)
        errors.append(error_of(state, LayerPlan(count, rank, scale=True), call, experts))

    for lower, higher in zip(errors, errors[2:], strict=False):
        assert higher <= 1.01 * lower + RIDGE**2
    assert errors[-1] < 1e-10


# The edges.


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5, 2 * F])
@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_neurons_still_fit(tokens: int, rank: int) -> None:
    """Most experts see no token at all, some groups neither."""
    call = call_of(EXPERTS, tokens=tokens)

    state = fit_neurons(EXPERTS, call, GROUPS, rank)

    assert all(tensor.isfinite().all() for tensor in state.values())
    assert error_of(state, LayerPlan(3, rank, scale=True), call) < 1e-4
    own_EO = kept_neurons(EXPERTS, call, rank)
    if rank:
        state["scale"].zero_()
        state["delta.down_b"][:, :, own_EO.shape[1] :] = 0
        assert_close(student_output_without_grad(state), run_layer(only(EXPERTS, own_EO), CALL))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("hidden", [1, D])
def test_experts_of_one_neuron(hidden: int, rank: int) -> None:
    experts = experts_of(width=1, hidden=hidden)
    call = call_of(experts)

    state = fit_neurons(experts, call, GROUPS, rank)

    with torch.no_grad():
        y_TD = student_output(fused(state, experts), call)
    if rank < 2:
        assert y_TD.isfinite().all()
        assert error_of(state, LayerPlan(3, rank, scale=True), call, experts) < 1
    else:
        assert_close(y_TD, call.y_TD)


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 10, 14])
def test_an_expert_keeps_no_more_neurons_than_its_down_delta_has_ranks(rank: int) -> None:
    """Four inputs and seven neurons: the down delta has four ranks at most."""
    experts = experts_of(width=7, hidden=4)
    call = call_of(experts)

    state = fit_neurons(experts, call, GROUPS, rank)

    kept = min(rank // 2, 4)
    assert state["delta.down_a"].shape == (E, min(rank, 4), 7)
    assert all(len(slots(state, expert)) == kept for expert in range(E))
    state["scale"].zero_()
    state["delta.down_b"][:, :, kept:] = 0
    own_EO = kept_neurons(experts, call, rank)
    with torch.no_grad():
        y_TD = student_output(fused(state, experts), call)
    assert_close(y_TD, run_layer(only(experts, own_EO), call))


@pytest.mark.parametrize("groups", [GROUPS, torch.arange(E)])
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 5, 2 * F])
def test_experts_and_groups_never_routed_are_not_silenced(groups: Tensor, rank: int) -> None:
    """Expert 5 is alone in its group; no token that was fitted to reached either."""
    call = call_of(EXPERTS, never=(2, 5))

    state = fit_neurons(EXPERTS, call, groups, rank)

    student = fused(state)
    assert all(tensor.isfinite().all() for tensor in state.values())
    x_TD = CALL.x_TD
    for expert in (2, 5):
        index_TK, weight_TK = torch.full((T, 1), expert), torch.ones(T, 1)
        with torch.no_grad():
            assert student(x_TD, index_TK, weight_TK).any()
    with torch.no_grad():
        alone = student(x_TD, torch.full((T, 1), 5), torch.ones(T, 1))
    assert_close(alone, EXPERTS.run(5, x_TD))


@pytest.mark.parametrize("rank", [0, 3, 4])
def test_of_a_group_no_token_reached_every_member_keeps_what_fits(rank: int) -> None:
    """Experts 2 and 5 share a group: its base is expert 2, and 5 has neurons of its own."""
    groups = torch.tensor([0, 0, 1, 0, 0, 1])
    call = call_of(EXPERTS, never=(2, 5))

    state = fit_neurons(EXPERTS, call, groups, rank)

    assert torch.equal(state["bases.1.gate_up_proj.weight"], EXPERTS.gate_up_EFD[2])
    assert torch.equal(state["bases.1.down_proj.weight"], EXPERTS.down_EDF[2])
    student, index_TK, weight_TK = fused(state), torch.ones(T, 1), torch.ones(T, 1)
    with torch.no_grad():
        first = student(CALL.x_TD, (2 * index_TK).long(), weight_TK)
        second = student(CALL.x_TD, (5 * index_TK).long(), weight_TK)
    assert_close(first, EXPERTS.run(2, CALL.x_TD))
    own = torch.arange(rank // 2).expand(E, -1)
    others = torch.arange(rank // 2, F).expand(E, -1)
    expected = only(EXPERTS, own).run(5, CALL.x_TD) + only(EXPERTS, others).run(2, CALL.x_TD)
    assert_close(second, expected)


def test_fitting_twice_gives_the_same_bits_and_leaves_its_inputs_alone() -> None:
    call = copy.deepcopy(CALL)

    first, second = (fit_neurons(EXPERTS, call, GROUPS, 5) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, getattr(CALL, name)) for name, tensor in vars(call).items())


# The better of the two ways.


def factored(
    base: str, plan: LayerPlan, groups: Tensor = GROUPS, experts: Experts = EXPERTS, **options: Any
) -> Any:
    call = CALL if experts is EXPERTS else call_of(experts)
    chosen = FactorConfig(base=base, **{"fit_tokens": 300, **options})
    plan = replace(plan, scale=chosen.scale, bias=chosen.bias)
    return factor(experts, statistics_of(call, experts), call, groups, plan, chosen)


@pytest.mark.parametrize("rank", [0, 1, 3, D])
def test_auto_is_the_one_that_errs_less(rank: int) -> None:
    plan = LayerPlan(3, rank, scale=True)
    mean, fitted, auto = (factored(base, plan) for base in ("mean", "neurons", "auto"))

    assert (mean.base, fitted.base) == ("mean", "neurons")
    assert auto.error == min(mean.error, fitted.error)
    best = mean if mean.error <= fitted.error else fitted
    assert auto.base == best.base
    assert all(torch.equal(auto.state[name], best.state[name]) for name in best.state)
    judged = error_of(auto.state, plan, CALL.rows(slice(300, None)))
    assert auto.error == pytest.approx(judged, rel=1e-5)


def test_auto_is_exact_at_full_rank() -> None:
    found = factored("auto", LayerPlan(3, D))

    assert found.base == "mean"
    assert found.error < 1e-8


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_mean_is_chosen_with_a_group_for_every_expert(rank: int) -> None:
    found = factored("auto", LayerPlan(E, rank), torch.arange(E))

    assert found.base == "mean"
    assert found.error < 1e-8


@pytest.mark.parametrize("rank", [0, 2])
def test_the_mean_is_chosen_for_copies(rank: int) -> None:
    """Copies offer the same neurons again and again, so that a base of neurons lacks some."""
    copies = replace(
        EXPERTS,
        gate_up_EFD=EXPERTS.gate_up_EFD[:1].expand(E, -1, -1).contiguous(),
        down_EDF=EXPERTS.down_EDF[:1].expand(E, -1, -1).contiguous(),
    )

    found = factored("auto", LayerPlan(3, rank), experts=copies)

    assert found.base == "mean"
    assert found.error < 1e-8


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS])
def test_neurons_are_chosen_where_experts_differ_and_rank_is_low(
    groups: Tensor, rank: int, seed: int
) -> None:
    plan, experts = LayerPlan(int(groups.max()) + 1, rank), experts_of(seed=seed)

    assert factored("auto", plan, groups, experts).base == "neurons"


def test_few_tokens_are_fitted_to_and_judged_alike() -> None:
    found = factored("neurons", LayerPlan(3, 1), fit_tokens=10_000)

    assert found.error == pytest.approx(
        error_of(found.state, LayerPlan(3, 1, scale=True)), rel=1e-5
    )


def test_neurons_without_scales_are_told() -> None:
    with pytest.raises(UserError, match="--base neurons needs scales"):
        factored("neurons", LayerPlan(3, 1), scale=False)
    assert factored("auto", LayerPlan(3, 1), scale=False).base == "mean"


def test_a_bias_starts_as_nothing() -> None:
    for base in ("mean", "neurons"):
        assert not factored(base, LayerPlan(3, 1), bias=True).state["bias"].any()


@pytest.mark.parametrize("tokens", [7, 60])
def test_few_tokens_give_the_solution_of_the_normal_equations(tokens: int) -> None:
    z_TB, target_TD = normal(tokens, 20, seed=1), normal(tokens, 9, seed=2)

    solution_BD = ridge_fit(z_TB, target_TD)

    gram_BB = z_TB.T.double() @ z_TB.double()
    ridge_BB = 1e-3 * gram_BB.diagonal().mean() * torch.eye(20)
    expected = torch.linalg.solve(gram_BB + ridge_BB, z_TB.T.double() @ target_TD.double())
    assert_close(solution_BD, expected.float(), 1e-4)
    assert not ridge_fit(torch.zeros(tokens, 20), target_TD).any()
