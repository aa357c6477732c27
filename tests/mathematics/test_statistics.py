"""What calibration counts, against counting by hand, token by token."""

import pytest
import torch
from numeric import assert_close
from torch import Tensor

from moefuse.mathematics import statistics as statistics_module
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.modeling_moefuse import PlainGating

GATING = PlainGating(torch.nn.functional.silu)
T, K, E, D, F = 50, 3, 7, 6, 5
NEVER = [2, 6]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXPERTS = Experts(normal(E, 2 * F, D, seed=0), normal(E, D, F, seed=1), GATING)


def random_call(tokens: int, seed: int) -> ExpertsCall:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(tokens, E, generator=generator)
    scores_TE[:, NEVER] = 0
    weight_TK, index_TK = scores_TE.topk(K)
    return ExpertsCall(
        x_TD=normal(tokens, D, seed=seed + 1) + 0.5,
        index_TK=index_TK.to(torch.int32),
        weight_TK=weight_TK,
        y_TD=torch.zeros(tokens, D),
    )


CALLS = [random_call(T, 3), random_call(1, 4), random_call(9, 5)]


def gathered(calls: list[ExpertsCall] = CALLS) -> LayerStatistics:
    found = LayerStatistics.empty(E, D)
    for call in calls:
        found.add(call, EXPERTS)
    return found


def tokens() -> list[tuple[Tensor, list[int], list[float]]]:
    return [
        (x_D, chosen.tolist(), weights.tolist())
        for call in CALLS
        for x_D, chosen, weights in zip(call.x_TD, call.index_TK, call.weight_TK, strict=True)
    ]


def run(expert: int, x_D: Tensor) -> Tensor:
    gate_F, up_F = (EXPERTS.gate_up_EFD[expert] @ x_D).chunk(2)
    return EXPERTS.down_EDF[expert] @ (gate_F * gate_F.sigmoid() * up_F)


def test_an_expert_runs_by_its_formula() -> None:
    x_TD = normal(4, D, seed=9)

    assert_close(EXPERTS.run(3, x_TD), torch.stack([run(3, x_D) for x_D in x_TD]))


def test_coactivation_by_counting() -> None:
    counts = torch.zeros(E, E, dtype=torch.float64)
    for _, chosen, _ in tokens():
        for first in chosen:
            for second in chosen:
                counts[first, second] += 1

    found = gathered()

    assert torch.equal(found.coactivation_EE, counts)
    assert torch.equal(found.count_E, counts.diagonal())
    assert found.count_E.sum() == K * found.tokens
    assert found.tokens == T + 1 + 9


def test_mass_and_weighted_norms_by_adding_up() -> None:
    mass_E, norm_E = torch.zeros(2, E, dtype=torch.float64)
    for x_D, chosen, weights in tokens():
        for expert, weight in zip(chosen, weights, strict=True):
            mass_E[expert] += weight
            norm_E[expert] += weight * float(run(expert, x_D).norm())

    found = gathered()

    assert_close(found.mass_E, mass_E)
    assert_close(found.weighted_norm_E, norm_E)
    used = found.count_E > 0
    assert_close(found.mean_weighted_norm_E[used], norm_E[used] / found.count_E[used])


def test_moments_of_the_input_by_adding_up() -> None:
    x_TD = torch.cat([call.x_TD for call in CALLS]).double()

    found = gathered()

    assert_close(found.moment_DD, x_TD.T @ x_TD)
    assert_close(found.sum_D, x_TD.sum(0))


def test_every_expert_has_a_mean_output_chosen_or_not() -> None:
    x_TD = torch.cat([call.x_TD for call in CALLS])
    expected = torch.stack([torch.stack([run(e, x_D) for x_D in x_TD]).mean(0) for e in range(E)])

    found = gathered()

    assert found.sampled == len(x_TD)
    assert_close(found.mean_output_ED, expected)
    assert found.mean_output_ED[NEVER].any()


def test_mean_outputs_are_of_the_first_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "MEAN_OUTPUT_TOKENS", 20)
    expected = torch.stack([run(1, x_D) for x_D in CALLS[0].x_TD[:20]]).mean(0)

    found = gathered()

    assert found.sampled == 20
    assert_close(found.mean_output_ED[1], expected)


def test_experts_never_routed_are_named_and_score_nothing() -> None:
    found = gathered()

    assert found.never_routed == NEVER
    assert found.mean_weighted_norm_E[NEVER].tolist() == [0, 0]
    assert LayerStatistics.empty(3, D).never_routed == [0, 1, 2]
    assert not LayerStatistics.empty(3, D).mean_output_ED.any()


def test_how_tokens_are_batched_does_not_matter() -> None:
    whole = ExpertsCall(
        **{name: torch.cat([getattr(call, name) for call in CALLS]) for name in vars(CALLS[0])}
    )

    one, several = gathered([whole]), gathered()

    assert (one.tokens, one.sampled) == (several.tokens, several.sampled)
    for name in one.tensors().keys() - {"counts"}:
        assert_close(getattr(one, name), getattr(several, name))


def test_no_tokens_change_nothing() -> None:
    found, before = gathered(), gathered()

    found.add(random_call(0, 8), EXPERTS)

    assert all(torch.equal(tensor, found.tensors()[n]) for n, tensor in before.tensors().items())


def test_statistics_come_back_from_their_tensors() -> None:
    found = gathered()

    again = LayerStatistics.from_tensors(found.tensors())

    assert (again.tokens, again.sampled) == (found.tokens, found.sampled)
    sums = found.tensors().keys() - {"counts"}
    assert all(torch.equal(getattr(again, n), getattr(found, n)) for n in sums)


def test_bf16_calls_are_counted_exactly_and_summed_in_more_bits() -> None:
    call = random_call(T, 3)
    narrow = ExpertsCall(call.x_TD.bfloat16(), call.index_TK, call.weight_TK, call.y_TD.bfloat16())
    experts = Experts(EXPERTS.gate_up_EFD.bfloat16(), EXPERTS.down_EDF.bfloat16(), EXPERTS.gating)
    found = LayerStatistics.empty(E, D)

    found.add(narrow, experts)

    assert torch.equal(found.coactivation_EE, gathered([call]).coactivation_EE)
    x_TD = narrow.x_TD.double()
    assert_close(found.moment_DD, x_TD.T @ x_TD)
    sums = found.tensors().keys() - {"counts"}
    assert {getattr(found, name).dtype for name in sums} == {torch.float64}
