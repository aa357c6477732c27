"""The greedy soup keeps the members that make a group's base better, and no others."""

import pytest
import torch
from numeric import SILU, assert_close
from torch import Tensor

from moefuse.mathematics.experts import ExpertBiases, Experts, ExpertsCall
from moefuse.multiplexing.recipe import Making, build
from moefuse.multiplexing.soup import greedy_members

D, F, E = 6, 5, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(biased: bool = False) -> Experts:
    """Experts 0, 2 and 4 lie around one centre; 1 is its opposite, 3 something else."""
    gate_up_EFD = normal(1, 2 * F, D, seed=0) + 0.6 * normal(E, 2 * F, D, seed=1)
    down_EDF = normal(1, D, F, seed=2) + 0.6 * normal(E, D, F, seed=3)
    down_EDF[1] *= -1
    gate_up_EFD[3], down_EDF[3] = normal(2 * F, D, seed=4), normal(D, F, seed=5)
    biases = ExpertBiases(normal(E, 2 * F, seed=6), normal(E, D, seed=7)) if biased else None
    return Experts(gate_up_EFD, down_EDF, SILU, biases)


def call_of(experts: Experts, chosen: list[int]) -> ExpertsCall:
    """Tokens that choose one of these experts each, with weight a half."""
    x_TD = normal(100 * len(chosen), D, seed=8)
    index_T1 = torch.tensor(chosen * 100, dtype=torch.int32)[:, None]
    weight_T1 = torch.full_like(x_TD[:, :1], 0.5)
    y_TD = torch.stack(
        [0.5 * experts.run(int(e), x_D[None])[0] for e, x_D in zip(index_T1, x_TD, strict=True)]
    )
    return ExpertsCall(x_TD, index_T1, weight_T1, y_TD)


def error_of(experts: Experts, members: list[int], call: ExpertsCall) -> float:
    """What the members' plain mean errs, by the definition."""
    biases = experts.biases
    mean = Experts(
        experts.gate_up_EFD[members].mean(0, keepdim=True),
        experts.down_EDF[members].mean(0, keepdim=True),
        experts.gating,
        biases
        and ExpertBiases(
            biases.gate_up_EF[members].mean(0, keepdim=True),
            biases.down_ED[members].mean(0, keepdim=True),
        ),
    )
    return float((0.5 * mean.run(0, call.x_TD) - call.y_TD).square().sum())


@pytest.mark.parametrize("biased", [False, True])
def test_a_member_is_kept_only_where_the_error_falls(biased: bool) -> None:
    experts = planted(biased)
    call = call_of(experts, [0, 1, 2, 3, 4])
    count_E = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])

    kept = greedy_members(experts, torch.arange(E), count_E, call).tolist()

    expected, least = [0], error_of(experts, [0], call)
    for member in (1, 2, 3, 4):
        error = error_of(experts, [*expected, member], call)
        if error < least:
            expected, least = [*expected, member], error
    assert kept == expected
    assert 1 < len(kept) < E


def test_members_come_in_the_order_of_how_often_they_were_chosen() -> None:
    experts = planted()
    members_M, count_E = torch.tensor([0, 2, 4]), torch.tensor([1.0, 0.0, 3.0, 0.0, 9.0])

    kept = greedy_members(experts, members_M, count_E, call_of(experts, [0, 2, 4])).tolist()

    assert kept == [4, 2, 0]


def test_a_group_that_no_token_chose_is_its_first_member() -> None:
    experts = planted()

    kept = greedy_members(experts, torch.tensor([1, 3]), torch.zeros(E), call_of(experts, [0]))

    assert kept.tolist() == [1]


def test_the_base_is_the_mean_of_those_kept_and_adapters_are_all_members() -> None:
    experts = planted()
    making = Making(lambda members: members.mean(0), "mixture", 2)

    student = build(
        experts, torch.zeros(E, dtype=torch.int64), making, 0, lambda _: torch.tensor([4, 0])
    )

    (group,) = student.listed()
    assert_close(group.down_proj.weight, experts.down_EDF[[0, 4]].mean(0))
    assert group.members.tolist() == list(range(E))
    assert group.get_parameter("up_proj.adapter.a").shape == (2 * E, D)
