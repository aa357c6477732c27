"""Planted groups are found by every way of grouping."""

import pytest
import torch
from torch import Tensor

from moefuse.config import GROUPINGS as OFFERED
from moefuse.config import MULTIPLEXED_GROUPINGS
from moefuse.errors import UserError
from moefuse.grouping.assign import GROUPINGS, RECIPE_GROUPINGS, group_layer
from moefuse.mathematics.alignment import ExpertWeights
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.modeling_moefuse import PlainGating

D, F, K = 12, 10, 2
PLANTED = torch.tensor([0, 1, 1, 0, 2, 1, 1, 2, 1])
E = len(PLANTED)
NOISE = 0.05


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def disguised_members() -> Experts:
    """Members of a group compute alike; their neurons are permuted, flipped and rescaled."""
    members = []
    for number, group in enumerate(PLANTED.tolist()):
        generator = torch.Generator().manual_seed(100 + number)
        gate, up, down = normal(3, F, D, seed=group) + NOISE * normal(3, F, D, seed=10 + number)
        order_F = torch.randperm(F, generator=generator)
        sign_F = torch.randint(2, (F,), generator=generator) * 2.0 - 1
        c_F = 10 ** (3 * torch.rand(F, generator=generator) - 1.5)
        turned = ExpertWeights(gate, up, down.T).permuted(order_F, sign_F)
        members.append(
            ExpertWeights(turned.gate_FD, turned.up_FD * c_F[:, None], turned.down_DF / c_F)
        )
    return Experts(
        torch.stack([member.gate_up() for member in members]),
        torch.stack([member.down_DF for member in members]),
        PlainGating(torch.nn.functional.silu),
    )


EXPERTS = disguised_members()


def statistics_of(chosen_TK: Tensor) -> LayerStatistics:
    found = LayerStatistics.empty(E, D)
    tokens = len(chosen_TK)
    x_TD = normal(tokens, D, seed=4)
    found.add(ExpertsCall(x_TD, chosen_TK, torch.ones(tokens, K), torch.zeros_like(x_TD)), EXPERTS)
    # The strongest experts are one of each planted group.
    found.mass_E = torch.tensor([5, 1, 2, 1, 1, 6, 1, 4, 1], dtype=torch.float64)
    return found


def found_by(
    grouping: str, statistics: LayerStatistics, groups: int, experts: Experts = EXPERTS, **how: bool
) -> Tensor:
    return group_layer(statistics, experts, groups, grouping, x_SD=normal(64, D, seed=6), **how)


def chosen_anyhow() -> Tensor:
    return torch.rand(300, E, generator=torch.Generator().manual_seed(5)).topk(K).indices


def chosen_within_groups() -> Tensor:
    """Every token chooses among the experts of one planted group."""
    rows = []
    for number in range(300):
        members = PLANTED.eq(number % 3).nonzero().flatten()
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(number))
        rows.append(members[order[:K]])
    return torch.stack(rows)


@pytest.mark.parametrize("grouping", ["output", "hierarchical", "weight", "dominant", "state"])
def test_experts_that_compute_alike_are_grouped(grouping: str) -> None:
    found = found_by(grouping, statistics_of(chosen_anyhow()), 3)

    assert torch.equal(found, PLANTED)


def test_experts_chosen_together_are_grouped() -> None:
    found = group_layer(statistics_of(chosen_within_groups()), EXPERTS, 3, "coactivation")

    assert torch.equal(found, PLANTED)


@pytest.mark.parametrize("grouping", OFFERED)
@pytest.mark.parametrize("groups", [1, 2, 4, 7, E])
def test_every_group_has_members(grouping: str, groups: int) -> None:
    found = found_by(grouping, statistics_of(chosen_anyhow()), groups)

    assert found.dtype == torch.int64
    assert found.unique().tolist() == list(range(groups))


@pytest.mark.parametrize("grouping", OFFERED)
def test_experts_never_routed_are_grouped_too(grouping: str) -> None:
    chosen_TK = chosen_anyhow().clamp_max(3)
    chosen_TK[:, 1] = (chosen_TK[:, 0] + 1) % 5
    statistics = statistics_of(chosen_TK)
    assert statistics.never_routed == [5, 6, 7, 8]

    found = found_by(grouping, statistics, 3)

    assert found.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("grouping", OFFERED)
def test_experts_that_are_all_the_same_are_grouped_too(grouping: str) -> None:
    same = Experts(
        EXPERTS.gate_up_EFD[:1].expand(E, -1, -1),
        EXPERTS.down_EDF[:1].expand(E, -1, -1),
        EXPERTS.gating,
    )
    statistics = LayerStatistics.empty(E, D)

    found = found_by(grouping, statistics, 4, same)

    assert found.unique().tolist() == [0, 1, 2, 3]


def test_with_topk_experts_join_the_centre_they_were_chosen_together_with() -> None:
    # 3 and 4 are chosen most often; 0 and 7 go mostly with 4, all others mostly with 3.
    pairs = [[3, e] for e in (1, 2, 5, 6, 8)] * 3 + [[4, 0], [4, 7], [0, 4]] * 4
    pairs += [[4, 1], [3, 0]] * 2 + [[4, 3]]

    found = found_by("topk", statistics_of(torch.tensor(pairs)), 2)

    assert found.tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("grouping", ["coactivation", "state"])
@pytest.mark.parametrize("groups", [1, 2, 4, 7, E])
def test_multiplexed_experts_are_in_groups_of_equal_size(grouping: str, groups: int) -> None:
    sizes = found_by(grouping, statistics_of(chosen_anyhow()), groups, multiplexed=True).bincount()

    assert len(sizes) == groups
    assert int(sizes.max() - sizes.min()) <= 1


def test_what_is_offered_is_what_there_is() -> None:
    assert sorted(GROUPINGS) == sorted(OFFERED)
    assert sorted(RECIPE_GROUPINGS) == sorted(MULTIPLEXED_GROUPINGS)


def test_an_unknown_grouping_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--grouping is 'best'; choose from .*dominant"):
        group_layer(statistics_of(chosen_anyhow()), EXPERTS, 3, "best")
