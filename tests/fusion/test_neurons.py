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
    fit_down_delta,
    fit_gains,
    fit_neurons,
    importance,
    neurons,
    ridge_solve,
    rows_of_expert,
    select_neurons,
)
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.sizes import LayerPlan, load_experts

T, K, E, D, F = 400, 2, 6, 9, 5
GROUPS = torch.tensor([0, 1, 1, 0, 1, 2])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXPERTS = Experts(normal(E, 2 * F, D, seed=0), normal(E, D, F, seed=1), torch.nn.functional.silu)


def call_of(experts: Experts, never: tuple[int, ...] = ()) -> ExpertsCall:
    """Return what the layer does on random inputs; no token chooses the experts ``never``."""
    x_TD = normal(T, D, seed=2)
    scores_TE = torch.rand(T, E, generator=torch.Generator().manual_seed(3))
    scores_TE[:, list(never)] = 0
    weight_TK, index_TK = scores_TE.topk(K)
    outputs_ETD = torch.stack([experts.run(expert, x_TD) for expert in range(E)])
    chosen_TKD = outputs_ETD[index_TK, torch.arange(T)[:, None]]
    y_TD = (chosen_TKD * weight_TK.unsqueeze(-1)).sum(1)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), weight_TK, y_TD)


CALL = call_of(EXPERTS)


def statistics_of(call: ExpertsCall, experts: Experts = EXPERTS) -> LayerStatistics:
    found = LayerStatistics.empty(E, D)
    found.add(call, experts)
    return found


def error_of(state: dict[str, Tensor], plan: LayerPlan, call: ExpertsCall = CALL) -> float:
    return measure(load_experts(state, EXPERTS, plan), call, power_of(call), 64)


def test_importance_is_the_energy_that_a_neuron_adds_to_the_output() -> None:
    expected_EF = torch.zeros(E, F)
    for x_D, chosen, weights in zip(CALL.x_TD, CALL.index_TK, CALL.weight_TK, strict=True):
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            z_F = neurons(EXPERTS, EXPERTS.gate_up_EFD[expert], x_D[None])[0]
            added_DF = EXPERTS.down_EDF[expert] * (weight * z_F)
            expected_EF[expert] += added_DF.square().sum(0)

    assert_close(importance(EXPERTS, CALL), expected_EF)


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


def test_an_experts_own_neurons_get_gains_of_one() -> None:
    gain_F = fit_gains(EXPERTS, 2, CALL, EXPERTS.gate_up_EFD[2], EXPERTS.down_EDF[2])

    assert_close(gain_F, torch.ones(F), 1e-2)  # the ridge is a thousandth


def test_no_other_gains_err_less() -> None:
    gate_up_FD, down_DF = EXPERTS.gate_up_EFD[0], EXPERTS.down_EDF[0]
    token_N, weight_N1 = rows_of_expert(CALL, 2)
    x_ND = CALL.x_TD[token_N]
    target_ND = EXPERTS.run(2, x_ND) * weight_N1
    z_NF = neurons(EXPERTS, gate_up_FD, x_ND) * weight_N1

    def error(gain_F: Tensor) -> float:
        return float((target_ND - (z_NF * gain_F) @ down_DF.T).square().sum())

    best_F = fit_gains(EXPERTS, 2, CALL, gate_up_FD, down_DF)

    assert error(best_F) < error(torch.zeros(F))
    for seed in range(20):
        assert error(best_F) < error(best_F + 0.1 * normal(F, seed=seed))


def test_a_planted_down_delta_is_recovered() -> None:
    z_NF, planted_DF = normal(300, F, seed=0), normal(D, 2, seed=1) @ normal(2, F, seed=2)

    b_DR, a_RF = fit_down_delta(z_NF, z_NF @ planted_DF.T, 2)

    assert b_DR.shape == (D, 2) and a_RF.shape == (2, F)
    assert_close(b_DR @ a_RF, planted_DF, 1e-2)  # the ridge is a thousandth


@pytest.mark.parametrize("groups", [torch.zeros(E).long(), GROUPS, torch.arange(E)])
@pytest.mark.parametrize("rank", [0, 2, F])
def test_the_state_fits_the_module_and_more_rank_never_hurts(groups: Tensor, rank: int) -> None:
    count = int(groups.max()) + 1

    state = fit_neurons(EXPERTS, CALL, groups, rank, rounds=1)

    found = error_of(state, LayerPlan(count, rank, scale=True))
    bare = fit_neurons(EXPERTS, CALL, groups, 0, rounds=1)
    assert found <= error_of(bare, LayerPlan(count, 0, scale=True)) < 1


def test_a_base_for_every_expert_is_the_layer_but_for_the_ridge() -> None:
    state = fit_neurons(EXPERTS, CALL, torch.arange(E), 0, rounds=1)

    assert error_of(state, LayerPlan(E, 0, scale=True)) < 1e-4


@pytest.mark.parametrize("groups", [GROUPS, torch.arange(E)])
def test_experts_and_groups_never_routed_are_not_silenced(groups: Tensor) -> None:
    """Expert 5 is alone in its group; no token that was fitted to reached either."""
    call = call_of(EXPERTS, never=(2, 5))
    count = int(groups.max()) + 1

    state = fit_neurons(EXPERTS, call, groups, 2, rounds=2)

    student = load_experts(state, EXPERTS, LayerPlan(count, 2, scale=True))
    assert all(tensor.isfinite().all() for tensor in state.values())
    x_TD = CALL.x_TD
    for expert in (2, 5):
        index_TK, weight_TK = torch.full((T, 1), expert), torch.ones(T, 1)
        with torch.no_grad():
            assert student(x_TD, index_TK, weight_TK).any()
    with torch.no_grad():
        alone = student(x_TD, torch.full((T, 1), 5), torch.ones(T, 1))
    assert_close(alone, EXPERTS.run(5, x_TD))


def test_fitting_twice_gives_the_same_bits_and_leaves_its_inputs_alone() -> None:
    call = copy.deepcopy(CALL)

    first, second = (fit_neurons(EXPERTS, call, GROUPS, 2, rounds=1) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, getattr(CALL, name)) for name, tensor in vars(call).items())


# The better of the two ways.


def factored(base: str, plan: LayerPlan, call: ExpertsCall = CALL, **options: Any) -> Any:
    chosen = FactorConfig(base=base, **{"fit_tokens": 300, **options})
    plan = replace(plan, scale=chosen.scale, bias=chosen.bias)
    return factor(EXPERTS, statistics_of(call), call, GROUPS, plan, chosen)


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


def test_neurons_are_chosen_where_experts_differ_and_rank_is_low() -> None:
    assert factored("auto", LayerPlan(3, 1)).base == "neurons"


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
