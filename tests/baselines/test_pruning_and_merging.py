"""Frequency, NAEE, M-SMoE and REAM, each by the property that defines it."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from layers import (
    EXPERT,
    FAMILIES,
    NEED_TWO,
    D,
    E,
    K,
    compressed,
    expert_numbers,
    inputs,
    layer_of,
    matrix_numbers,
    native_block,
    output,
    put_weights,
    rows_of,
    teacher_call,
    weights_of,
    with_scores,
)
from numeric import assert_close
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError, method, naee, ream
from moefuse.baselines._native import KeptExperts, MergedExperts, kept_experts
from moefuse.baselines._routing import all_gates, router_logits, spread
from moefuse.families import all_families
from moefuse.mathematics.alignment import ExpertWeights, align

PRUNING = ["frequency", "naee"]
MERGING = ["m-smoe", "ream"]
METHODS = PRUNING + MERGING
COUNTS = torch.tensor([5.0, 30.0, 10.0, 2.0, 20.0, 25.0, 1.0, 40.0], dtype=torch.float64)
BY_COUNT = [7, 1, 5, 4, 2, 0, 3, 6]


def native_of(student: nn.Module, model_type: str) -> nn.Module:
    """The student's native experts module."""
    if isinstance(student, MergedExperts):
        return student.native
    assert isinstance(student, KeptExperts)
    return student.routed.get_submodule(all_families()[model_type].experts_name)


def kept_by(student: nn.Module, layer: Layer) -> list[int]:
    """Which of the layer's experts a pruned student has, found by their rows of the router."""
    name = f"{layer.family.router_name}.{layer.family.router_weight}"
    rows = student.get_parameter(f"routed.{name}")
    kept = [
        int((layer.block.get_parameter(name) == row).all(1).nonzero(as_tuple=True)[0])
        for row in rows
    ]
    model_type = layer.family.model_type
    gate_up, down, _ = weights_of(native_of(student, model_type), model_type)
    assert torch.equal(gate_up, layer.experts.gate_up_EFD[kept])
    assert torch.equal(down, layer.experts.down_EDF[kept])
    return kept


def with_counts(layer: Layer, count_E: Tensor) -> Layer:
    layer.statistics.coactivation_EE.fill_diagonal_(0).diagonal().copy_(count_E)
    return layer


def set_expert(block: nn.Module, model_type: str, expert: int, weights: ExpertWeights) -> None:
    native = block.get_submodule(all_families()[model_type].experts_name)
    gate_up, down, biases = weights_of(native, model_type)
    hidden = down.shape[1]
    gate_up[expert], down[expert] = weights.gate_up()[:, :hidden], weights.down_DF
    if biases is not None:
        biases.gate_up_EF[expert] = weights.gate_up()[:, hidden]
    put_weights(native, model_type, (gate_up, down, biases))


def block_of_copies(model_type: str, original_of: list[int], *, signs: bool) -> nn.Module:
    """A block whose expert e is expert ``original_of[e]`` with its neurons in another order.

    Its router row is the original's, scaled, so that the logits are alike and not equal.
    """
    block = copy.deepcopy(native_block(model_type))
    layer = layer_of(native_block(model_type), model_type)
    family = layer.family
    rows_ED = block.get_parameter(f"{family.router_name}.{family.router_weight}").data
    chance = torch.Generator().manual_seed(1)
    for expert, original in enumerate(original_of):
        if expert != original:
            order = torch.randperm(16, generator=chance)
            sign = torch.randint(0, 2, (16,), generator=chance) * 2.0 - 1 if signs else None
            if not layer.experts.gating.linear_in_up:
                sign = None
            copied = layer.experts.weights(original).permuted(order, sign)
            set_expert(block, model_type, expert, copied)
            rows_ED[expert] = 0.9 * rows_ED[original]
            native = block.get_submodule(family.experts_name)
            for bias in (p for name, p in native.named_parameters() if name == "down_proj_bias"):
                bias.data[expert] = bias.data[original]
    return block


def block_with_an_expert_never_chosen(model_type: str, expert: int) -> tuple[nn.Module, Tensor]:
    """A block and inputs, whose first feature is constant and shuts ``expert`` out."""
    block = copy.deepcopy(native_block(model_type))
    x_TD = inputs()
    x_TD[:, 0] = 5.0
    family = all_families()[model_type]
    rows_ED = block.get_parameter(f"{family.router_name}.{family.router_weight}").data
    rows_ED[:, 0] = rows_ED[expert] = 0.0
    rows_ED[expert, 0] = -10.0
    return block, x_TD


def runs_among(model_type: str, name: str, experts: int) -> bool:
    """Some native routers add the best two scores of a group, so they need two experts."""
    return not (model_type in NEED_TWO and name in PRUNING and experts == 1)


# What holds for all of them.


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_the_whole_budget_is_the_teacher(model_type: str, name: str) -> None:
    call = teacher_call(native_block(model_type), model_type)

    student = compressed(model_type, name, E)

    assert_close(output(student, call), call.y_TD)


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_below_one_expert_is_too_small(name: str) -> None:
    layer = layer_of(native_block("olmoe"), "olmoe")

    with pytest.raises(TooSmallError, match=f"{EXPERT - 1} numbers hold no expert"):
        method(name).compress(layer, EXPERT - 1)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_a_student_holds_whole_experts_within_its_budget_and_runs(
    model_type: str, name: str, experts: int
) -> None:
    layer = layer_of(native_block(model_type), model_type)
    budget = experts * EXPERT + EXPERT - 1
    if not runs_among(model_type, name, experts):
        with pytest.raises(TooSmallError, match="cannot choose among 1 experts"):
            method(name).compress(layer, budget)
        return

    student = method(name).compress(layer, budget)

    native = native_of(student, model_type)
    assert matrix_numbers(native) == experts * EXPERT
    assert student.active_parameters(K) == min(K, experts) * expert_numbers(model_type)
    y_TD = output(student, layer.call)
    assert y_TD.shape == layer.call.y_TD.shape
    assert y_TD.isfinite().all()
    assert y_TD.abs().sum() > 0


def test_the_native_router_of_deepseek_v3_refuses_a_single_expert() -> None:
    layer = layer_of(native_block("deepseek_v3"), "deepseek_v3")

    with pytest.raises(RuntimeError, match="out of range"):
        output(kept_experts(layer, torch.tensor([3])), layer.call)


@pytest.mark.parametrize("name", METHODS)
def test_compressing_twice_gives_the_same_bits(name: str) -> None:
    first, second = (compressed("deepseek_v3", name, 3).state_dict() for _ in range(2))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_left_alone_and_only_experts_train(model_type: str, name: str) -> None:
    block = native_block(model_type)
    before = {key: tensor.clone() for key, tensor in block.state_dict().items()}
    layer = layer_of(block, model_type)

    student = method(name).compress(layer, 4 * EXPERT)
    student(layer.call.x_TD, layer.call.index_TK, layer.call.weight_TK).square().mean().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)

    trained = {n for n, p in student.named_parameters() if p.grad is not None}
    native = block.get_submodule(layer.family.experts_name)
    assert {name.rpartition(".")[2] for name in trained} == dict(native.named_parameters()).keys()
    assert len(trained) == len(list(native.parameters()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.state_dict().items())


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_an_expert_that_no_token_chose_is_handled(model_type: str, name: str) -> None:
    block, x_TD = block_with_an_expert_never_chosen(model_type, 2)
    layer = layer_of(block, model_type, x_TD=x_TD)
    assert layer.statistics.never_routed == [2]

    student = method(name).compress(layer, 7 * EXPERT)

    assert output(student, layer.call).isfinite().all()
    if name in PRUNING:
        assert kept_by(student, layer) == [0, 1, 3, 4, 5, 6, 7]
    elif name == "m-smoe":
        # Its share of the merged expert is nothing, so that the layer computes what it did.
        assert_close(output(student, layer.call), layer.call.y_TD)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_no_token_passed_is_handled(name: str) -> None:
    layer = with_counts(layer_of(native_block("mixtral"), "mixtral"), torch.zeros(E).double())
    layer.statistics.weighted_norm_E.zero_()

    assert output(method(name).compress(layer, 3 * EXPERT), layer.call).isfinite().all()


# Frequency.


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("experts", [2, 3, 6])
def test_frequency_keeps_the_most_chosen(model_type: str, experts: int) -> None:
    layer = with_counts(layer_of(native_block(model_type), model_type), COUNTS)
    kept = sorted(BY_COUNT[:experts])

    student = method("frequency").compress(layer, experts * EXPERT)

    assert kept_by(student, layer) == kept
    router = layer.block.get_submodule(layer.family.router_name)
    own = student.get_submodule(f"routed.{layer.family.router_name}")
    for name, tensor in router.state_dict().items():
        assert torch.equal(own.state_dict()[name], rows_of(tensor, kept))


def test_frequency_counts_what_the_tokens_chose() -> None:
    layer = layer_of(native_block("qwen3_moe"), "qwen3_moe")
    chosen = layer.call.index_TK.flatten().bincount(minlength=E)

    student = method("frequency").compress(layer, 4 * EXPERT)

    kept = kept_by(student, layer)
    left_out = [expert for expert in range(E) if expert not in kept]
    assert chosen[kept].min() >= chosen[left_out].max()


def test_frequency_keeps_the_lower_numbers_of_equal_counts() -> None:
    layer = with_counts(layer_of(native_block("mixtral"), "mixtral"), torch.ones(E).double())

    assert kept_by(method("frequency").compress(layer, 3 * EXPERT), layer) == [0, 1, 2]


# NAEE.


def exact_loss(layer: Layer, kept: list[int]) -> float:
    """Prune the native block, run it and measure."""
    y_TD = output(kept_experts(layer, torch.tensor(kept)), layer.call)
    return float((y_TD.double() - layer.call.y_TD.double()).square().sum())


def short_layer(model_type: str) -> Layer:
    """A layer whose recorded tokens are all looked at."""
    return layer_of(native_block(model_type), model_type, x_TD=inputs()[: naee.TOKENS])


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("experts", [3, 6])
def test_naee_keeps_the_best_of_all_subsets(model_type: str, experts: int) -> None:
    layer = short_layer(model_type)
    ways = [list(way) for way in itertools.combinations(range(E), experts)]
    exact = {tuple(way): exact_loss(layer, way) for way in ways}

    kept = kept_by(method("naee").compress(layer, experts * EXPERT), layer)

    assert exact[tuple(kept)] == min(exact.values())


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_naee_computes_the_loss_of_the_pruned_native_block(model_type: str) -> None:
    layer = short_layer(model_type)
    sampled = naee.sample_outputs(layer)
    ways = [[0, 1, 2, 3, 4, 5, 6], [1, 3, 4, 6, 7], [0, 5], [2, 7]]

    losses = [naee.reconstruction_loss(sampled, kept) for kept in ways]

    for loss, kept in zip(losses, ways, strict=True):
        assert_close(torch.tensor(loss), torch.tensor(exact_loss(layer, kept)))
    nothing = naee.reconstruction_loss(sampled, list(range(E)))
    assert nothing <= 1e-6 * min(losses)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_naee_leaves_out_the_cheapest_expert_at_each_step(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naee, "ENUMERATED", 0)
    layer = short_layer(model_type)
    expected = list(range(E))
    while len(expected) > 3:
        ways = [[e for e in expected if e != out] for out in expected]
        expected = min(ways, key=lambda way: exact_loss(layer, way))

    assert kept_by(method("naee").compress(layer, 3 * EXPERT), layer) == expected


@pytest.mark.parametrize("enumerated", [0, 2000])
def test_naee_finds_the_experts_that_others_stand_in_for(
    enumerated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token chooses one expert; twins share theirs, so that either can do without the other.

    Counting would keep all four twins: more tokens choose each than any other expert.
    """
    monkeypatch.setattr(naee, "ENUMERATED", enumerated)
    config = tiny_config("mixtral", num_experts_per_tok=1)
    block = tiny_model("mixtral", num_experts_per_tok=1).get_submodule("model.layers.2.mlp")
    rows_ED = block.get_parameter("gate.weight").data
    chance = torch.Generator().manual_seed(0)
    for original, twin in ((1, 4), (6, 2)):
        rows_ED[original] *= 10
        rows_ED[twin] = rows_ED[original] + 1e-4 * torch.randn(D, generator=chance)
        copied = layer_of(block, "mixtral", config).experts.weights(original)
        set_expert(block, "mixtral", twin, copied)
    layer = layer_of(block, "mixtral", config)
    twins, others = [1, 2, 4, 6], [0, 3, 5, 7]
    assert layer.statistics.count_E[twins].min() > layer.statistics.count_E[others].max()

    student = method("naee").compress(layer, 6 * EXPERT)

    assert set(others) < set(kept_by(student, layer))
    assert_close(output(student, layer.call), layer.call.y_TD)


def test_sampled_tokens_are_spread_over_all() -> None:
    call = teacher_call(native_block("mixtral"), "mixtral").rows(slice(0, 10))

    sampled = spread(call, 4)

    rows = [0, 2, 5, 7]
    assert torch.equal(sampled.x_TD, call.x_TD[rows])
    assert torch.equal(sampled.index_TK, call.index_TK[rows])
    assert torch.equal(sampled.weight_TK, call.weight_TK[rows])
    assert torch.equal(sampled.y_TD, call.y_TD[rows])
    assert spread(call, 10) is call


# M-SMoE.


@pytest.mark.parametrize("model_type", FAMILIES)
def test_m_smoe_merges_reordered_copies_back_exactly(model_type: str) -> None:
    original_of = [0, 1, 0, 3, 1, 0, 3, 7]
    block = block_of_copies(model_type, original_of, signs=True)
    layer = with_counts(
        layer_of(block, model_type), torch.tensor([40.0, 30, 5, 20, 6, 7, 4, 10]).double()
    )

    student = method("m-smoe").compress(layer, 4 * EXPERT)

    assert isinstance(student, MergedExperts)
    assert student.merged_of_expert.tolist() == [0, 1, 0, 2, 1, 0, 2, 3]
    assert_close(output(student, layer.call), layer.call.y_TD)


def test_m_smoe_lets_experts_join_the_dominant_one_of_most_similar_logits() -> None:
    layer = with_counts(layer_of(native_block("qwen2_moe"), "qwen2_moe"), COUNTS)
    dominant, others = [1, 5, 7], [0, 2, 3, 4, 6]
    logits_TE = layer.call.x_TD @ layer.block.get_parameter("gate.weight").data.T

    student = method("m-smoe").compress(layer, 3 * EXPERT)

    assert isinstance(student, MergedExperts)
    group_E = student.merged_of_expert
    assert len(set(group_E[dominant].tolist())) == 3
    for expert in others:
        cosines = torch.cosine_similarity(logits_TE[:, dominant], logits_TE[:, [expert]], dim=0)
        assert group_E[expert] == group_E[dominant[int(cosines.argmax())]]


def test_m_smoe_weighs_aligned_members_by_how_often_each_is_chosen() -> None:
    layer = with_counts(layer_of(native_block("olmoe"), "olmoe"), COUNTS)

    student = method("m-smoe").compress(layer, 2 * EXPERT)

    assert isinstance(student, MergedExperts)
    for dominant in (7, 1):
        group = student.merged_of_expert[dominant]
        members = (student.merged_of_expert == group).nonzero().flatten().tolist()
        reference = layer.experts.weights(dominant)
        share = (COUNTS[members] / COUNTS[members].sum()).float()
        aligned = [align(reference, layer.experts.weights(member)) for member in members]
        gate_up = sum(w * expert.gate_up() for w, expert in zip(share, aligned, strict=True))
        down = sum(w * expert.down_DF for w, expert in zip(share, aligned, strict=True))
        assert_close(student.native.get_parameter("gate_up_proj")[group], gate_up)  # type: ignore[arg-type]
        assert_close(student.native.get_parameter("down_proj")[group], down)  # type: ignore[arg-type]


# REAM.


@pytest.mark.parametrize("model_type", FAMILIES)
def test_ream_merges_reordered_copies_of_the_most_salient_expert_exactly(model_type: str) -> None:
    original_of = [0, 3, 2, 3, 4, 3, 6, 7]
    block = block_of_copies(model_type, original_of, signs=False)
    scores = torch.tensor([3.0, 0.1, 4.0, 9.0, 5.0, 0.2, 6.0, 7.0], dtype=torch.float64)
    layer = with_scores(layer_of(block, model_type), scores)

    student = method("ream").compress(layer, 6 * EXPERT)

    assert isinstance(student, MergedExperts)
    assert student.merged_of_expert.tolist() == [0, 1, 2, 1, 3, 1, 4, 5]
    assert_close(output(student, layer.call), layer.call.y_TD)


def test_ream_weighs_members_by_saliency_so_that_the_centre_dominates() -> None:
    block = block_of_copies("mixtral", [0, 3, 2, 3, 4, 3, 6, 7], signs=False)
    block.get_parameter("experts.down_proj").data[1] *= 0.5
    block.get_parameter("experts.down_proj").data[5] *= 0.8
    scores = torch.tensor([3.0, 1.0, 4.0, 9.0, 5.0, 2.0, 6.0, 7.0], dtype=torch.float64)
    layer = with_scores(layer_of(block, "mixtral"), scores)

    student = method("ream").compress(layer, 6 * EXPERT)

    assert isinstance(student, MergedExperts)
    merged, centre = student.native, layer.experts.weights(3)
    assert_close(merged.get_parameter("gate_up_proj")[1], centre.gate_up())
    expected = (9 * 1.0 + 1 * 0.5 + 2 * 0.8) / 12 * centre.down_DF
    assert_close(merged.get_parameter("down_proj")[1], expected)
    rest = [0, 2, 4, 6, 7]
    assert torch.equal(
        merged.get_parameter("down_proj")[[0, 2, 3, 4, 5]], layer.experts.down_EDF[rest]
    )


def test_ream_lets_the_most_salient_centres_take_what_is_most_alike() -> None:
    chance = torch.Generator().manual_seed(0)
    similarity_EE = torch.rand(40, 40, generator=chance, dtype=torch.float64)
    centres = torch.tensor([33, 2, *range(10, 28)])
    others = torch.tensor([e for e in range(40) if e not in centres.tolist()])

    centre_E = ream.pseudo_prune(similarity_EE, centres)

    assert torch.equal(centre_E[centres], centres), "a centre stays one"
    nearest = others[similarity_EE[33, others].argsort(descending=True)]
    first = set(nearest[: ream.GROUP - 1].tolist())
    assert {e for e in others.tolist() if centre_E[e] == 33} == first
    assert {e for e in others.tolist() if centre_E[e] == 2} == set(others.tolist()) - first


@pytest.mark.parametrize("centres", [[5], [5, 0], [7, 30, 2]])
def test_ream_makes_room_for_every_expert(centres: list[int]) -> None:
    centre_E = ream.pseudo_prune(torch.zeros(64, 64), torch.tensor(centres))

    assert set(centre_E.tolist()) == set(centres)
    assert centre_E.bincount().max() == -(-64 // len(centres))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_ream_compares_mean_gated_outputs_and_logits(model_type: str) -> None:
    layer = short_layer(model_type)
    x_SD = layer.call.x_TD
    logits_SE = x_SD @ layer.block.get_parameter("gate.weight").T
    if model_type == "deepseek_v3":
        gate_SE = logits_SE.sigmoid() / logits_SE.sigmoid().sum(1, keepdim=True)
    else:
        gate_SE = logits_SE.softmax(1)
    mean_ED = torch.stack(
        [(gate_SE[:, [e]] * layer.experts.run(e, x_SD)).mean(0) for e in range(E)]
    )
    unit_SE = logits_SE / logits_SE.norm(dim=0)
    distance_EE = (unit_SE[:, :, None] - unit_SE[:, None, :]).norm(dim=0)
    outputs_EE = (1 + torch.cosine_similarity(mean_ED[:, None], mean_ED[None], dim=2)) / 2

    found_EE = ream.similarity(layer, x_SD)

    assert_close(found_EE.float(), (outputs_EE + 1 - distance_EE / distance_EE.max()) / 2)
    assert found_EE.min() >= 0
    assert found_EE.max() <= 1 + 1e-9


def test_ream_raises_the_saliency_of_experts_never_routed_to_the_least_other() -> None:
    score_E = torch.tensor([0.0, 3.0, 0.5, 0.0], dtype=torch.float64)

    assert ream.saliency(score_E).tolist() == [0.5, 3.0, 0.5, 0.5]
    assert ream.saliency(torch.zeros(2)).tolist() == [1.0, 1.0]


# Their common view of the router.


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_gates_of_all_experts_are_the_family_s_own_scores(model_type: str) -> None:
    layer = layer_of(native_block(model_type), model_type)

    logits_TE = router_logits(layer, layer.call.x_TD)
    gates_TE = all_gates(layer, logits_TE)

    rows_ED = layer.block.get_parameter(f"{layer.family.router_name}.{layer.family.router_weight}")
    bias = layer.family.router_bias
    own_TE = layer.call.x_TD @ rows_ED.T
    if bias is not None:
        own_TE = own_TE + layer.block.get_parameter(f"{layer.family.router_name}.{bias}")
    assert_close(logits_TE, own_TE)
    chosen_TK = gates_TE.gather(1, layer.call.index_TK)
    ratio_T = chosen_TK[:, 0] / chosen_TK[:, 1]
    assert_close(ratio_T, layer.call.weight_TK[:, 0] / layer.call.weight_TK[:, 1])
    if model_type == "phimoe":
        # SparseMixer weighs each of its two experts by itself, and gives the others nothing.
        assert (gates_TE > 0).sum(1).eq(2).all()
    else:
        assert_close(gates_TE.sum(1) / gates_TE.sum(1)[0], torch.ones(len(gates_TE)))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_a_teacher_stored_in_bf16_is_compressed_too(model_type: str, name: str) -> None:
    """The command line holds the block as stored, and gives experts and tokens in fp32."""
    layer = short_layer(model_type)
    stored = replace(layer, block=copy.deepcopy(layer.block).bfloat16())

    student = method(name).compress(stored, 4 * EXPERT).float()

    assert output(student, layer.call).isfinite().all()
