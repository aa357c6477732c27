"""From affinities to groups, by every rule that a partition must keep."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefuse.mathematics.clustering import agglomerate, canonical, join_centres, strongest


def symmetric(experts: int, seed: int) -> Tensor:
    affinity_EE = torch.rand(
        experts, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (affinity_EE + affinity_EE.T) / 2


def partition(group_of_expert: Tensor) -> set[frozenset[int]]:
    return {
        frozenset((group_of_expert == group).nonzero().flatten().tolist())
        for group in group_of_expert.unique()
    }


def assert_proper(group_of_expert: Tensor, experts: int, groups: int) -> None:
    assert group_of_expert.shape == (experts,)
    assert group_of_expert.dtype == torch.int64
    assert group_of_expert.unique().tolist() == list(range(groups))
    firsts = [group_of_expert.tolist().index(group) for group in range(groups)]
    assert firsts == sorted(firsts), "groups are numbered by their lowest expert"


def average_linkage(affinity_EE: Tensor, groups: int) -> set[frozenset[int]]:
    """Merge the two clusters of greatest mean affinity, by its definition."""
    clusters = [frozenset([expert]) for expert in range(len(affinity_EE))]
    while len(clusters) > groups:
        pairs = [(a, b) for i, a in enumerate(clusters) for b in clusters[:i]]
        a, b = max(pairs, key=lambda p: float(affinity_EE[sorted(p[0])][:, sorted(p[1])].mean()))
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
    return set(clusters)


counts = st.integers(2, 10).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e)))


@given(counts, st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_agglomeration_is_average_linkage(sizes: tuple[int, int], seed: int) -> None:
    experts, groups = sizes
    affinity_EE = symmetric(experts, seed)

    found = agglomerate(affinity_EE, groups)

    assert_proper(found, experts, groups)
    assert partition(found) == average_linkage(affinity_EE, groups)


@given(counts, st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_renumbering_the_experts_renumbers_the_partition(sizes: tuple[int, int], seed: int) -> None:
    experts, groups = sizes
    affinity_EE = symmetric(experts, seed)
    old_of_new = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    centres = torch.arange(groups)

    direct = canonical(agglomerate(affinity_EE, groups)[old_of_new])
    joined = canonical(join_centres(affinity_EE, centres)[old_of_new])

    renumbered_EE = affinity_EE[old_of_new][:, old_of_new]
    assert torch.equal(agglomerate(renumbered_EE, groups), direct)
    new_centres = old_of_new.argsort()[centres]
    assert torch.equal(join_centres(renumbered_EE, new_centres), joined)


@given(counts, st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=120, deadline=None)
def test_ties_still_give_as_many_groups_as_asked_for(
    sizes: tuple[int, int], values: int, seed: int
) -> None:
    experts, groups = sizes
    affinity_EE = (symmetric(experts, seed) * values).round()
    mass_E = torch.randint(2, (experts,), generator=torch.Generator().manual_seed(seed))

    assert_proper(agglomerate(affinity_EE, groups), experts, groups)
    assert_proper(join_centres(affinity_EE, strongest(mass_E, groups)), experts, groups)
    assert torch.equal(agglomerate(affinity_EE, groups), agglomerate(affinity_EE, groups))


def test_as_many_groups_as_experts_and_one_group() -> None:
    affinity_EE = symmetric(7, 0)

    assert torch.equal(agglomerate(affinity_EE, 7), torch.arange(7))
    assert torch.equal(agglomerate(affinity_EE, 1), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(join_centres(affinity_EE, torch.randperm(7)), torch.arange(7))
    assert torch.equal(join_centres(affinity_EE, torch.tensor([3])), torch.zeros(7).long())


def test_a_shift_or_scale_of_the_affinity_changes_nothing() -> None:
    affinity_EE = symmetric(9, 0)

    found = agglomerate(affinity_EE, 4)

    assert torch.equal(agglomerate(3 * affinity_EE - 100, 4), found)


def test_the_diagonal_does_not_matter() -> None:
    affinity_EE = symmetric(9, 0)
    found = agglomerate(affinity_EE, 4)
    affinity_EE.fill_diagonal_(50.0)

    assert torch.equal(agglomerate(affinity_EE, 4), found)


@given(counts, st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_everyone_joins_the_centre_most_alike(sizes: tuple[int, int], seed: int) -> None:
    experts, groups = sizes
    affinity_EE = symmetric(experts, seed)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randperm(experts, generator=generator)[:groups]

    found = join_centres(affinity_EE, centres)

    assert_proper(found, experts, groups)
    assert len(found[centres].unique()) == groups
    for expert in set(range(experts)) - set(centres.tolist()):
        best = max(centres.tolist(), key=lambda centre: float(affinity_EE[expert, centre]))
        assert found[expert] == found[best]


def test_the_strongest_come_first_and_ties_go_to_the_lower_number() -> None:
    mass_E = torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0])

    assert strongest(mass_E, 4).tolist() == [1, 3, 2, 4]
    assert strongest(torch.ones(6), 3).tolist() == [0, 1, 2]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_canonical_numbers_keep_the_partition(numbers: list[int]) -> None:
    given_groups = torch.tensor(numbers)

    found = canonical(given_groups)

    assert_proper(found, len(numbers), len(set(numbers)))
    assert partition(found) == partition(given_groups)
    assert torch.equal(canonical(found), found)
