"""Bases of neurons where neurons have biases and are multiplied by ``up + 1``, as in gpt-oss."""

from dataclasses import replace

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.config import FactorConfig
from moefuse.fusion.choose import factor
from moefuse.fusion.neurons import RIDGE, base_features, fit_neurons
from moefuse.mathematics.experts import ExpertBiases, Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of, student_output
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.modeling_moefuse import ClampedGating
from moefuse.sizes import LayerPlan, load_experts

T, K, E, D, F = 600, 2, 6, 9, 5
GROUPS = torch.tensor([0, 1, 1, 0, 1, 2])
UNMET = 100.0
"""A limit that no neuron of these tests comes near."""


def layer(limit: float = UNMET, seed: int = 0) -> Experts:
    """Return random experts that have nothing in common."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    biases = ExpertBiases(normal(E, 2 * F), normal(E, D))
    gating = ClampedGating(alpha=1.702, limit=limit)
    return Experts(normal(E, 2 * F, D) / 2, normal(E, D, F), gating, biases)


def call_of(experts: Experts) -> ExpertsCall:
    """Return what the layer does on random inputs."""
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(T, D, generator=generator)
    weight_TK, index_TK = torch.rand(T, E, generator=generator).topk(K)
    outputs_ETD = torch.stack([experts.run(expert, x_TD) for expert in range(E)])
    chosen_TKD = outputs_ETD[index_TK, torch.arange(T)[:, None]]
    y_TD = (chosen_TKD * weight_TK.unsqueeze(-1)).sum(1)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), weight_TK, y_TD)


@torch.no_grad()
def run(state: dict[str, Tensor], experts: Experts, call: ExpertsCall, rank: int) -> Tensor:
    groups = int(state["group_of_expert"].max()) + 1
    student = load_experts(state, experts, LayerPlan(groups, rank, scale=True))
    return student_output(student, call)


@pytest.mark.parametrize("limit", [UNMET, 1.0])
@pytest.mark.parametrize("rank", [2 * F, 2 * F + 1])
def test_with_every_neuron_kept_the_module_is_the_layer(rank: int, limit: float) -> None:
    """Clamps or not: an expert's own neurons have no gains."""
    experts = layer(limit)
    call = call_of(experts)

    state = fit_neurons(experts, call, GROUPS, rank)

    assert not state["scale"].any()
    assert_close(run(state, experts, call, rank), call.y_TD)


def test_a_base_for_every_expert_is_the_layer_but_for_the_ridge() -> None:
    """The teacher's own numbers leave nothing but the ridge, and what is solved for no more."""
    experts = layer()
    call = call_of(experts)

    y_TD = run(fit_neurons(experts, call, torch.arange(E), 0), experts, call, 0)

    assert float((y_TD - call.y_TD).square().mean()) < RIDGE * power_of(call)


def test_scales_and_biases_together_are_gains_of_whole_neurons() -> None:
    """What the module sends through its bases is the teacher's neurons times the fitted gains."""
    experts = layer()
    call = call_of(experts)
    state = fit_neurons(experts, call, GROUPS, 0)
    assert experts.biases is not None
    half_EF = state["scale"][:, F:]
    up_EF = (state["bias"][:, F:] + 1) / half_EF - 1
    rows = [int((group == GROUPS).nonzero()[0]) for group in range(3)]
    bias_GF = torch.cat([state["bias"][:, :F], up_EF], 1)[rows]

    features = list(base_features(experts, call, state, 3, bias_GF))

    y_TD = experts.down_bias_added(call.index_TK, call.weight_TK)
    assert y_TD is not None
    for group, z_TF in enumerate(features):
        y_TD = y_TD + z_TF @ state[f"bases.{group}.down_proj.weight"].T
    assert_close(run(state, experts, call, 0), y_TD, 1e-4)
    taken = torch.stack([experts.biases.gate_up_EF[:, :F], experts.biases.gate_up_EF[:, F:]], -1)
    for member, group in enumerate(GROUPS.tolist()):
        own_F2 = torch.stack([state["bias"][member, :F], up_EF[member]], -1)
        members_N2 = taken[group == GROUPS].flatten(0, 1)
        assert torch.cdist(own_F2, members_N2).min(1).values.max() < 1e-3


@pytest.mark.parametrize("limit", [UNMET, 2.0])
@pytest.mark.parametrize("rank", [0, 2, 3])
def test_they_err_less_than_the_mean_of_experts_that_differ(rank: int, limit: float) -> None:
    """And so they are chosen, on tokens that they were not fitted to."""
    experts = layer(limit)
    call = call_of(experts)
    statistics = LayerStatistics.empty(E, D)
    statistics.add(call, experts)
    plan = LayerPlan(3, rank, scale=True)
    options = FactorConfig(fit_tokens=400)

    mean, chosen = (
        factor(experts, statistics, call, GROUPS, plan, replace(options, base=base))
        for base in ("mean", "auto")
    )

    assert chosen.base == "neurons"
    assert chosen.error < 0.85 * mean.error
    student = load_experts(chosen.state, experts, plan)
    judge = call.rows(slice(400, None))
    assert measure(student, judge, power_of(judge), T) == pytest.approx(chosen.error)
