"""The earlier public attempt's recipe: its formula token by token, its makings, its variants."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from layers import EXPERT, FAMILIES, D, E, K, layer_of, matrix_numbers, native_block, output
from numeric import assert_close
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError, method, method_names
from moefuse.baselines._multiplexing_recipe import (
    Recipe,
    Size,
    choose_size,
    coactivation,
    multiplex,
    output_states,
    student_numbers,
)
from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.mathematics.clustering import equal_groups
from moefuse.mathematics.losses import measure, power_of
from moefuse.mathematics.merging import mean_merge
from moefuse.mathematics.similarity import mean_cosine
from moefuse.multiplexing.halving import halved, sce_of_pair
from moefuse.multiplexing.recipe import (
    Making,
    build,
    levelled_factors,
    sce_from_first,
    slerp_from_first,
)
from moefuse.multiplexing.student import ADAPTER_SHARE, MultiplexedExperts, MultiplexedGroup

F = 16
FAMILY = "qwen2_moe"
NAMES = [name for name in method_names() if name.startswith("multiplex-")]
MIXED = ["multiplex-mixture-of-lora", "multiplex-fused-lora", "multiplex-bases-only"]


@cache
def described(model_type: str = FAMILY) -> Layer:
    return layer_of(native_block(model_type), model_type)


def student_of(name: str, experts: float, layer: Layer | None = None) -> MultiplexedExperts:
    student = method(name).compress(layer or described(), int(experts * EXPERT))
    assert isinstance(student, MultiplexedExperts)
    return student


def shaken(student: MultiplexedExperts) -> MultiplexedExperts:
    """Give every parameter a size that matters, so that no part of the formula goes unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise)
    return student


def numbers_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def named(group: MultiplexedGroup, name: str) -> Tensor:
    return group.get_parameter(name).detach().double()


def naive_linear(group: MultiplexedGroup, name: str, u_I: Tensor, s: dict[int, Tensor]) -> Tensor:
    """One of a group's three projections for one token; ``s`` by the member's place."""
    base_O = named(group, f"{name}.weight") @ u_I
    own = dict(group.get_submodule(name).named_parameters())
    if "adapter.a" not in own:
        return base_O
    a, b, scaling = (named(group, f"{name}.adapter.{part}") for part in ("a", "b", "scaling"))
    if "adapter.mixing" in own:
        mixing_RM = named(group, f"{name}.adapter.mixing")
        gain_R = sum(share * mixing_RM[:, place] for place, share in s.items())
        return base_O + scaling * (b @ (gain_R * (a @ u_I)))
    rank = len(a) // len(group.members)
    for place, share in s.items():
        rows = slice(place * rank, (place + 1) * rank)
        base_O = base_O + scaling * share * (b[:, rows] @ (a[rows] @ u_I))
    return base_O


def naive_group(group: MultiplexedGroup, x_D: Tensor, weights: dict[int, Tensor]) -> Tensor:
    """What a group returns for one token; ``weights`` by the chosen member's place."""
    raised = {place: weight.exp() for place, weight in weights.items()}
    s = {place: value / sum(raised.values()) for place, value in raised.items()}
    if group.routing is not None:
        routing_DM = named(group, "routing")
        x_D = x_D + sum(share * routing_DM[:, place] for place, share in s.items())
    gate_F = nn.functional.silu(naive_linear(group, "gate_proj", x_D, s))
    y_D = naive_linear(group, "down_proj", gate_F * naive_linear(group, "up_proj", x_D, s), s)
    return y_D * sum(weights.values())


def naive(student: MultiplexedExperts, x_D: Tensor, index: list[int], weight_K: Tensor) -> Tensor:
    y_D = torch.zeros(D, dtype=torch.float64)
    for group in student.listed():
        chosen = dict(zip(index, weight_K.double(), strict=True))
        places = {place: int(expert) for place, expert in enumerate(group.members)}
        weights = {place: chosen[e] for place, e in places.items() if e in chosen}
        if weights:
            y_D = y_D + naive_group(group, x_D.double(), weights)
    return y_D


def routing(tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(tokens, E, generator=generator)
    weight_TK, index_TK = scores_TE.topk(top_k)
    return torch.randn(tokens, D, generator=generator), index_TK, weight_TK


# The student.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
@torch.no_grad()
def test_the_student_computes_the_formula(name: str, top_k: int) -> None:
    student = shaken(student_of(name, 4))
    x_TD, index_TK, weight_TK = routing(12, top_k)

    y_TD = student(x_TD, index_TK, weight_TK)

    chosen = zip(x_TD, index_TK.tolist(), weight_TK, strict=True)
    assert_close(y_TD, torch.stack([naive(student, *token) for token in chosen]))


@torch.no_grad()
def test_with_one_member_chosen_a_group_is_that_member() -> None:
    student = shaken(student_of("multiplex-mixture-of-lora", 6))
    group = student.listed()[0]
    x_TD, _, weight_T1 = routing(9, 1)
    place, rank = 1, len(group.get_parameter("up_proj.adapter.a")) // len(group.members)
    rows = slice(place * rank, (place + 1) * rank)

    def member(name: str) -> Tensor:
        a, b = (group.get_parameter(f"{name}.adapter.{factor}") for factor in "ab")
        scaling_O = group.get_parameter(f"{name}.adapter.scaling")
        return group.get_parameter(f"{name}.weight") + scaling_O[:, None] * (b[:, rows] @ a[rows])

    told_TD = x_TD + group.get_parameter("routing")[:, place]
    z_TF = nn.functional.silu(told_TD @ member("gate_proj").T) * (told_TD @ member("up_proj").T)
    expected = weight_T1 * (z_TF @ member("down_proj").T)

    chosen_T1 = group.members[place].expand(9, 1)
    assert_close(student(x_TD, chosen_T1, weight_T1), expected)


@torch.no_grad()
def test_adapters_are_mixed_before_the_non_linearity() -> None:
    """Two members' outputs are not summed: one expert, half of each, answers with both weights."""
    student = shaken(student_of("multiplex-mixture-of-lora", 6))
    pair = student.listed()[0].members[:2].expand(9, 2)
    x_TD = routing(9, 1)[0]
    half = torch.full((9, 2), 0.5)

    together = student(x_TD, pair, half)

    apart = sum(student(x_TD, pair[:, [k]], half[:, [k]]) for k in (0, 1))
    assert float((together - apart).norm() / apart.norm()) > 0.1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_token_at_a_time_equals_a_batch(name: str) -> None:
    student = shaken(student_of(name, 4))
    call = described().call.rows(slice(0, 50))

    batch = output(student, call)

    alone = [output(student, call.rows(slice(t, t + 1))) for t in range(50)]
    assert_close(torch.cat(alone), batch)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert_close(output(student, call.rows(order)), batch[order])


@pytest.mark.parametrize("name", MIXED)
def test_no_tokens_give_no_outputs(name: str) -> None:
    student = student_of(name, 4)

    y_TD = student(torch.zeros(0, D), torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K))

    assert y_TD.shape == (0, D)


def test_active_numbers_are_those_that_a_token_passes() -> None:
    student = student_of("multiplex-mixture-of-lora", 4)
    rank = len(student.listed()[0].get_parameter("up_proj.adapter.a")) // 4
    shared, own = EXPERT + 2 * F + D, D + 3 * rank * (D + F)

    assert len(student.listed()) == 2 and rank > 0
    assert student.active_parameters(1) == shared + own
    assert student.active_parameters(2) == 2 * shared + 2 * own
    assert student.active_parameters(5) == 2 * shared + 5 * own
    assert student.active_parameters(E) == numbers_in(student)


def test_active_numbers_of_a_fused_lora_hold_its_factors_once_a_group() -> None:
    student = student_of("multiplex-fused-lora", 4)
    rank = len(student.listed()[0].get_parameter("up_proj.adapter.a"))
    shared = EXPERT + 2 * F + D + 3 * rank * (D + F)

    assert student.active_parameters(1) == shared + D + 3 * rank
    assert student.active_parameters(E) == numbers_in(student)


# Sizes.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("experts", [1, 1.1, 2, 3, 4.5, 8])
def test_the_student_holds_at_most_the_budget(name: str, experts: float) -> None:
    student = student_of(name, experts)

    assert numbers_in(student) <= int(experts * EXPERT)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert sorted(torch.cat([group.members for group in student.listed()])) == list(range(E))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_fused(model_type: str) -> None:
    layer = described(model_type)

    student = student_of("multiplex-mixture-of-lora", 3, layer)

    assert matrix_numbers(student) <= 3 * EXPERT
    assert output(student, layer.call).isfinite().all()


@pytest.mark.parametrize("adapters", ["mixture", "lora"])
@pytest.mark.parametrize("experts", [3, 4, 6, 8])
def test_bases_take_half_and_adapters_what_is_left(adapters: str, experts: int) -> None:
    layer, numbers = described(), experts * EXPERT

    size = choose_size(layer, numbers, adapters)  # type: ignore[arg-type]

    assert size.groups == experts // 2 and size.routed and size.rank > 0
    higher = Size(size.groups, size.rank + 1, routed=True)
    assert size.rank == min(D, F) or student_numbers(layer, higher, adapters) > numbers  # type: ignore[arg-type]
    recipe = Recipe(slerp_from_first, coactivation, adapters)  # type: ignore[arg-type]
    made = numbers_in(multiplex(layer, numbers, recipe))
    assert made == student_numbers(layer, size, adapters) <= numbers  # type: ignore[arg-type]


@pytest.mark.parametrize("adapters", ["mixture", "lora", None])
def test_the_smallest_budgets_leave_out_adapters_then_routing(adapters: str | None) -> None:
    def size(numbers: int) -> Size:
        return choose_size(described(), numbers, adapters)  # type: ignore[arg-type]

    assert size(EXPERT) == size(EXPERT + E * D - 1) == Size(1, 0, routed=False)
    assert size(EXPERT + E * D) == Size(1, 0, routed=True)


def test_bases_alone_take_all_there_is() -> None:
    assert choose_size(described(), 6 * EXPERT, None) == Size(5, 0, routed=True)
    assert choose_size(described(), 5 * EXPERT + E * D, None) == Size(5, 0, routed=True)


@pytest.mark.parametrize("name", NAMES)
def test_less_than_one_base_is_too_small(name: str) -> None:
    with pytest.raises(TooSmallError):
        method(name).compress(described(), EXPERT - 1)


# Groups.


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7, 8])
def test_groups_are_of_equal_size(groups: int) -> None:
    affinity_EE = torch.rand(E, E, generator=torch.Generator().manual_seed(groups))

    sizes = equal_groups(affinity_EE + affinity_EE.T, groups).bincount()

    assert len(sizes) == groups and int(sizes.max() - sizes.min()) <= 1


def test_experts_that_are_alike_share_a_group() -> None:
    block_of_E = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    affinity_EE = (block_of_E[:, None] == block_of_E).double()
    affinity_EE += 0.5 * torch.rand(9, 9, generator=torch.Generator().manual_seed(0))

    assert torch.equal(equal_groups(affinity_EE, 3), block_of_E)


def test_the_full_recipe_groups_by_common_tokens() -> None:
    counts_EE = torch.eye(E, dtype=torch.float64)
    for pair in ([0, 7], [1, 4], [2, 3], [5, 6]):
        counts_EE[pair, pair[::-1]] = 9.0
    statistics = replace(described().statistics, coactivation_EE=counts_EE)
    layer = replace(described(), statistics=statistics)

    student = student_of("multiplex-mixture-of-lora", E, layer)

    members = {tuple(group.members.tolist()) for group in student.listed()}
    assert members == {(0, 7), (1, 4), (2, 3), (5, 6)}


def test_output_clusters_hold_experts_that_return_alike() -> None:
    block = copy.deepcopy(native_block(FAMILY))
    twin_of = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    experts = block.get_submodule("experts")
    for parameter in (experts.gate_up_proj, experts.down_proj):
        parameter.data = parameter.data[twin_of]  # type: ignore[union-attr, index, assignment]

    student = student_of("multiplex-output-clusters", E, layer_of(block, FAMILY))

    members = {tuple(group.members.tolist()) for group in student.listed()}
    assert members == {(0, 7), (1, 6), (2, 5), (3, 4)}


def test_output_states_compare_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs_ESD = torch.randn(4, 70, 5, generator=generator).double()
    x_SD = torch.arange(70)[:, None]

    alike_EE = mean_cosine(lambda x_CD: outputs_ESD[:, x_CD[:, 0]], x_SD)

    expected = nn.functional.cosine_similarity(outputs_ESD[0], outputs_ESD[2], dim=1).mean()
    assert_close(alike_EE[0, 2], expected, 1e-9)
    assert_close(alike_EE.diagonal(), torch.ones(4), 1e-9)
    assert output_states(described()).shape == (E, E)


# Bases and adapters.


@pytest.mark.parametrize(
    ("name", "merge"),
    [
        ("multiplex-mixture-of-lora", slerp_from_first),
        ("multiplex-bases-only", slerp_from_first),
        ("multiplex-fused-lora", slerp_from_first),
        ("multiplex-output-clusters", slerp_from_first),
        ("multiplex-sce", sce_from_first),
        ("multiplex-mean", mean_merge),
    ],
)
def test_bases_are_merged_unaligned(name: str, merge: object) -> None:
    assert callable(merge)
    for group in student_of(name, 4).listed():
        gate_MFD, up_MFD = described().experts.gate_up_EFD[group.members].chunk(2, dim=1)
        down_MDF = described().experts.down_EDF[group.members]
        assert_close(group.get_parameter("gate_proj.weight"), merge(gate_MFD))
        assert_close(group.get_parameter("up_proj.weight"), merge(up_MFD))
        assert_close(group.get_parameter("down_proj.weight"), merge(down_MDF))


def test_singular_values_are_divided_by_their_mean() -> None:
    delta_MOI = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0))

    a_QI, b_OQ = levelled_factors(delta_MOI, 4)

    assert a_QI.shape == (12, 9) and b_OQ.shape == (6, 12)
    for member, delta_OI in enumerate(delta_MOI):
        rows = slice(4 * member, 4 * member + 4)
        u, s, v = torch.linalg.svd(delta_OI, full_matrices=False)
        expected = u[:, :4] @ torch.diag(s[:4] / s[:4].mean()) @ v[:4]
        assert_close(b_OQ[:, rows] @ a_QI[rows], expected)


def test_a_difference_of_nothing_has_factors_of_nothing() -> None:
    a_QI, b_OQ = levelled_factors(torch.zeros(2, 4, 3), 2)

    assert a_QI.isfinite().all() and not b_OQ.any()


@pytest.mark.parametrize("name", ["multiplex-mixture-of-lora", "multiplex-fused-lora"])
@torch.no_grad()
def test_adapters_start_at_a_tenth_of_their_base(name: str) -> None:
    student, call = student_of(name, 6), described().call
    heard: list[tuple[Tensor, Tensor]] = []
    linear = student.listed()[1].get_submodule("down_proj")
    linear.register_forward_hook(lambda _, given, __: heard.append(given))

    output(student, call)

    ((u_PI, s_PM),) = heard
    added_O = linear.get_submodule("adapter")(u_PI, s_PM).abs().mean(0)
    base_O = (u_PI @ linear.get_parameter("weight").T).abs().mean(0)
    assert_close(added_O, ADAPTER_SHARE * base_O)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides_what_is_random(name: str) -> None:
    other = replace(described(), seed=1)

    first, second = (student_of(name, 4).state_dict() for _ in range(2))
    third = student_of(name, 4, other).state_dict()

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["groups.0.routing"], third["groups.0.routing"])


# Halving.


@torch.no_grad()
def test_a_single_halving_merges_pairs_untrained() -> None:
    layer, experts = described(), described().experts
    pair_of_E = equal_groups(output_states(layer), 4)

    student = student_of("multiplex-halving", 5)

    assert [group.members.tolist() for group in student.listed()] == [
        (pair_of_E == pair).nonzero().flatten().tolist() for pair in range(4)
    ]
    for group in student.listed():
        first, second = experts.down_EDF[group.members]
        base = group.get_parameter("down_proj.weight")
        # From the first to the second at the quarter of coordinates where they differ most.
        moved = (base - first).abs() > 0
        assert int(moved.sum()) == first.numel() // 4
        assert_close(base[moved], second[moved])
        still = (second - first).abs()[~moved].max()
        assert still <= (second - first).abs()[moved].min()


def test_training_between_halvings_lowers_the_error() -> None:
    layer = described()
    power = power_of(layer.call)
    untrained = build(layer.experts, torch.arange(E), Making(sce_of_pair, None, 0), seed=0)
    for groups in (4, 2):
        untrained = halved(untrained, layer.call.x_TD[:256], groups)

    student = student_of("multiplex-halving", 3)

    assert len(student.groups) == len(untrained.groups) == 2
    trained, plain = (measure(s, layer.call, power, 512) for s in (student, untrained))
    assert trained < 0.95 * plain


def test_halving_to_every_expert_is_the_teacher() -> None:
    layer = described()

    bare = Making(sce_of_pair, None, 0, routed=False)
    student = build(layer.experts, torch.arange(E), bare, seed=0)

    assert_close(output(student, layer.call), layer.call.y_TD)


def test_halving_leaves_the_teacher_alone() -> None:
    before = copy.deepcopy(described().experts)

    student_of("multiplex-halving", 2)

    assert torch.equal(before.gate_up_EFD, described().experts.gate_up_EFD)
    assert torch.equal(before.down_EDF, described().experts.down_EDF)


# Distillation.


@pytest.mark.parametrize("name", NAMES)
def test_distillation_lowers_the_error_and_trains_every_parameter(name: str) -> None:
    layer = described()
    student = student_of(name, 4)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}

    options = DistillConfig(steps=100, batch_tokens=128, held_back=0.2, learning_rate=1e-2)

    result = distill_layer(student, layer.call, options)

    assert result.after < 0.95 * result.before
    trained = dict(student.named_parameters())
    assert all(not torch.equal(before[key], trained[key]) for key in trained)
