"""A layer of own and shared neurons: what is kept is the teacher's, what is shared stands in."""

from dataclasses import replace

import pytest
import torch
from numeric import SILU, assert_close
from torch import Tensor

from moefuse.fusion.allocate import FULL, LOW_BITS
from moefuse.fusion.keep import Kept, fit_shared_gains, keep, layer_neurons, shared_neurons
from moefuse.fusion.neurons import importance, neurons
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.losses import measure, power_of
from moefuse.modeling.modeling_moefuse import own_name
from moefuse.modeling.naive import own_neurons
from moefuse.sizes import LayerPlan

T, K, E, D, F = 300, 2, 5, 8, 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXPERTS = Experts(normal(E, 2 * F, D, seed=1), normal(E, D, F, seed=2), SILU)


def run(x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    rows = [
        sum(w * EXPERTS.run(int(e), x_D[None])[0] for e, w in zip(index_K, w_K, strict=True))
        for x_D, index_K, w_K in zip(x_TD, index_TK, w_TK, strict=True)
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


def call(experts: int = E) -> ExpertsCall:
    """Return a call in which only the first ``experts`` are ever chosen."""
    x_TD = normal(T, D, seed=3)
    scores_TE = torch.rand(T, experts, generator=torch.Generator().manual_seed(4))
    w_TK, index_TK = scores_TE.topk(K)
    return ExpertsCall(x_TD, index_TK.to(torch.int32), w_TK, run(x_TD, index_TK, w_TK))


CALL = call()
ENERGY_EF = importance(EXPERTS, CALL)


def kept(
    bits_EF: Tensor, choices: tuple[str, ...], recorded: ExpertsCall = CALL, **plan: int
) -> Kept:
    counts = {
        bits: int((bits_EF == number).sum())
        for number, bits in enumerate(choices)
        if number and (bits_EF == number).any()
    }
    layer = LayerPlan(neurons=counts, **plan)  # type: ignore[arg-type]
    if choices != FULL:
        layer = replace(layer, shared_bits="2", gain_bits="4")
    return keep(EXPERTS, recorded, importance(EXPERTS, recorded), bits_EF, choices, layer)


def error(made: Kept, recorded: ExpertsCall = CALL) -> float:
    return measure(made.module, recorded, power_of(recorded), T)


def best(count: int) -> Tensor:
    """Return which ``count`` neurons of greatest energy are kept whole, (E, F)."""
    least = ENERGY_EF.flatten().sort(descending=True).values[count - 1]
    return (least <= ENERGY_EF).long()


def test_with_every_neuron_whole_the_layer_is_the_teachers() -> None:
    made = kept(torch.ones(E, F, dtype=torch.long), FULL)

    assert made.latents == {}
    assert_close(made.module(CALL.x_TD, CALL.index_TK, CALL.weight_TK), CALL.y_TD)
    assert made.module.widths.tolist() == [[F] * E]


@pytest.mark.parametrize("seed", range(4))
def test_every_expert_gets_its_own_neurons_at_their_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits_EF = torch.randint(len(LOW_BITS), (E, F), generator=generator)
    bits_EF[seed] = 0
    latents = kept(bits_EF, LOW_BITS).latents
    made = kept(bits_EF, LOW_BITS).module

    rows_PND = layer_neurons(EXPERTS, torch.arange(E * F))
    for number, bits in enumerate(LOW_BITS[1:], start=1):
        chosen = (bits_EF == number).flatten().nonzero().flatten()
        if bits != "16" and len(chosen):
            assert torch.equal(latents[f"own.{own_name(bits)}"], rows_PND[:, chosen])
    for expert in range(E):
        whole = (bits_EF[expert] == LOW_BITS.index("16")).nonzero().flatten()
        own = own_neurons(made, expert)
        assert len(own) == int((bits_EF[expert] > 0).sum())
        for (neuron_PD, _), neuron in zip(own[len(own) - len(whole) :], whole, strict=True):
            assert torch.equal(neuron_PD, rows_PND[:, expert * F + neuron])


def test_neurons_are_gate_up_and_down_rows() -> None:
    gate_D, up_D, down_D = layer_neurons(EXPERTS, torch.tensor([2 * F + 3]))[:, 0]

    assert torch.equal(gate_D, EXPERTS.gate_up_EFD[2, 3])
    assert torch.equal(up_D, EXPERTS.gate_up_EFD[2, F + 3])
    assert torch.equal(down_D, EXPERTS.down_EDF[2, :, 3])


def test_more_neurons_err_less() -> None:
    by_count = [error(kept(best(count), FULL)) for count in (5, 15, 25, 30)]

    assert by_count == sorted(by_count, reverse=True) and by_count[-1] < 1e-9


# Shared neurons.


def test_shared_neurons_are_the_best_that_no_expert_keeps() -> None:
    owned_EF = best(10).bool()

    chosen = shared_neurons(ENERGY_EF, owned_EF, 4)

    left = ENERGY_EF.flatten()[~owned_EF.flatten()].sort(descending=True).values
    assert torch.equal(ENERGY_EF.flatten()[chosen], left[:4])
    assert not owned_EF.flatten()[chosen].any()


def test_neurons_without_energy_are_shared_before_owned_ones() -> None:
    owned_EF = torch.zeros(E, F, dtype=torch.bool)
    owned_EF[:, :3] = True

    chosen = shared_neurons(torch.zeros(E, F), owned_EF, E * 3)

    assert not owned_EF.flatten()[chosen].any()


@pytest.mark.parametrize("choices", [FULL, LOW_BITS])
def test_shared_neurons_help(choices: tuple[str, ...]) -> None:
    bits_EF = (len(choices) - 1) * best(10)

    errors = [error(kept(bits_EF, choices, shared=count)) for count in (0, 4, 12)]

    assert errors[2] < errors[1] < errors[0]


def test_all_left_over_neurons_shared_whole_are_the_teacher() -> None:
    """Least squares must find that every expert uses its own of them and no other."""
    made = kept(best(24), FULL, shared=E * F - 24)

    assert error(made) < 1e-3


def test_an_expert_that_was_never_chosen_takes_the_mean_gains_of_the_others() -> None:
    recorded = call(experts=E - 1)
    owned_EF = best(10).bool()
    shared_S = shared_neurons(ENERGY_EF, owned_EF, 5)
    shared_PSD = layer_neurons(EXPERTS, shared_S)

    gain_ES = fit_shared_gains(EXPERTS, recorded, owned_EF, shared_S, shared_PSD)

    assert importance(EXPERTS, recorded)[E - 1].eq(0).all()
    assert_close(gain_ES[E - 1], gain_ES[: E - 1].mean(0))
    assert gain_ES.shape == (E, 5) and torch.isfinite(gain_ES).all()


def test_a_call_of_no_tokens_gives_no_gains() -> None:
    nothing = CALL.rows(slice(0, 0))

    made = kept(best(10), FULL, nothing, shared=3)

    assert not made.module.gain.weight.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", [False, True])
def test_without_own_neurons_shared_ones_are_fitted_to_the_whole_layer(metric: bool) -> None:
    root_DD = torch.linalg.cholesky(torch.eye(D) + 5 * torch.ones(D, D)) if metric else None
    felt_DD = torch.eye(D) if root_DD is None else root_DD
    nothing_EF = torch.zeros(E, F, dtype=torch.long)

    def felt(values_PSD: Tensor) -> float:
        gate_up_SD = torch.cat([values_PSD[0], values_PSD[1]])
        passed_TS = neurons(EXPERTS, gate_up_SD, CALL.x_TD) * CALL.weight_TK.sum(1, keepdim=True)
        return float(((CALL.y_TD - passed_TS @ values_PSD[2]) @ felt_DD).square().sum())

    layer = LayerPlan(neurons={}, shared=5)
    made = keep(EXPERTS, CALL, ENERGY_EF, nothing_EF, FULL, layer, root_DD)
    values_PSD = made.module.shared.read(0, None).detach()  # type: ignore[union-attr, operator]
    rows_PND = layer_neurons(EXPERTS, torch.arange(E * F))

    assert made.module.gain.weight.eq(1).all()  # type: ignore[union-attr]
    for place in range(5):
        same_N = (rows_PND[:2] == values_PSD[:2, place : place + 1]).all(-1).all(0)
        assert same_N.sum() == 1
    for seed in range(3):
        other_PSD = values_PSD.clone()
        other_PSD[2] += 0.02 * normal(5, D, seed=seed)
        assert felt(values_PSD) < felt(other_PSD), "down rows are what fits best"
    strongest_PSD = rows_PND[:, shared_neurons(ENERGY_EF, nothing_EF.bool(), 5)]
    assert felt(values_PSD) < felt(strongest_PSD)


def test_the_twin_starts_as_what_is_stored() -> None:
    made = kept(torch.arange(E * F).view(E, F) % 7, LOW_BITS, shared=4)
    with torch.no_grad():
        expected = made.module(CALL.x_TD, CALL.index_TK, CALL.weight_TK)

    twin = made.trained()

    with torch.no_grad():
        assert_close(twin(CALL.x_TD, CALL.index_TK, CALL.weight_TK), expected)
    assert {name for name, _ in twin.named_parameters()} >= {"shared.latent", "gain.latent"}
