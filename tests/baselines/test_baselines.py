"""The rivals, compared with what they are said to do, for every family."""

import copy
from itertools import product

import pytest
import torch
from layers import (
    EXPERT,
    FAMILIES,
    NEED_TWO,
    E,
    K,
    block_output,
    compressed,
    inputs,
    layer_of,
    native_block,
    output,
    rows_of,
    teacher_call,
    weights_of,
    with_scores,
)
from numeric import assert_close

from moefuse.baselines import TooSmallError, method, method_names
from moefuse.baselines._native import KeptExperts, MergedExperts
from moefuse.config import DistillConfig
from moefuse.distillation.loop import distill_layer
from moefuse.errors import UserError
from moefuse.families import all_families
from moefuse.mathematics.clustering import agglomerate
from moefuse.mathematics.similarity import mean_output_affinity

SCORES = torch.tensor([0.5, 3.0, 1.0, 0.2, 2.0, 2.5, 0.1, 4.0], dtype=torch.float64)
BY_SCORE = [7, 1, 5, 4, 2, 0, 3, 6]


def test_the_methods_are_found_by_listing() -> None:
    assert {"reap", "hc-smoe"} <= set(method_names())
    for name in method_names():
        assert hasattr(method(name), "compress") != hasattr(method(name), "quantize")


@pytest.mark.parametrize("name", ["best", "_native", "hc_smoe"])
def test_an_unknown_method_is_told_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=rf"no method '{name}'; choose from .*reap"):
        method(name)


# REAP.


KEPT = [(f, e) for f in FAMILIES for e in (1, 2, 5, 8) if e > 1 or f not in NEED_TWO]
ROUTED = [(f, e) for f, e in product(FAMILIES, (1, 3, 6)) if e > 1 or f not in NEED_TWO]


def test_reap_says_what_the_router_cannot_choose_from() -> None:
    with pytest.raises(TooSmallError, match="cannot choose among 1 experts"):
        compressed("deepseek_v3", "reap", 1)


@pytest.mark.parametrize(("model_type", "experts"), KEPT)
def test_reap_keeps_the_experts_of_highest_score(model_type: str, experts: int) -> None:
    block = native_block(model_type)
    layer = with_scores(layer_of(block, model_type), SCORES)
    kept = sorted(BY_SCORE[:experts])

    student = method("reap").compress(layer, experts * EXPERT)

    assert isinstance(student, KeptExperts)
    native = student.routed.get_submodule(layer.family.experts_name)
    gate_up, down, biases = weights_of(native, model_type)
    assert torch.equal(gate_up, layer.experts.gate_up_EFD[kept])
    assert torch.equal(down, layer.experts.down_EDF[kept])
    if biases is not None and layer.experts.biases is not None:
        assert torch.equal(biases.gate_up_EF, layer.experts.biases.gate_up_EF[kept])
        assert torch.equal(biases.down_ED, layer.experts.biases.down_ED[kept])
    router = student.routed.get_submodule(layer.family.router_name)
    original = block.get_submodule(layer.family.router_name)
    for name, tensor in original.state_dict().items():
        assert torch.equal(router.state_dict()[name], rows_of(tensor, kept))


def test_ties_keep_the_lower_numbers() -> None:
    layer = with_scores(layer_of(native_block("mixtral"), "mixtral"), torch.ones(E).double())

    student = method("reap").compress(layer, 3 * EXPERT)

    native = student.get_submodule("routed.experts")
    assert torch.equal(native.gate_up_proj.data, layer.experts.gate_up_EFD[:3])  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("model_type", "experts"), [case for case in ROUTED if case[0] != "deepseek_v3"]
)
@torch.no_grad()
def test_reap_routes_as_the_native_router_with_those_rows(model_type: str, experts: int) -> None:
    block = native_block(model_type)
    layer = with_scores(layer_of(block, model_type), SCORES)
    kept = torch.tensor(sorted(BY_SCORE[:experts]))
    call = teacher_call(block, model_type)
    router = copy.deepcopy(block.get_submodule(layer.family.router_name))
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = rows_of(tensor.data, kept.tolist())
    router.num_experts, router.top_k = experts, min(K, experts)  # type: ignore[assignment]
    returned = dict(zip(layer.family.router_returns, router(call.x_TD), strict=True))
    weight_TK, index_TK = returned["weights"], returned["index"]
    native = block.get_submodule(layer.family.experts_name)

    student = method("reap").compress(layer, experts * EXPERT)

    expected = native(call.x_TD, kept[index_TK], weight_TK)
    assert_close(output(student, call), expected)


@pytest.mark.parametrize("experts", [2, 3, 5, 7])
@torch.no_grad()
def test_reap_frees_a_router_that_chose_groups_of_experts_first(experts: int) -> None:
    """Pruned, the groups have lost their borders; the router chooses among all that are left."""
    block = native_block("deepseek_v3")
    assert block.get_submodule("gate").num_group == 2
    layer = with_scores(layer_of(block, "deepseek_v3"), SCORES)
    kept = torch.tensor(sorted(BY_SCORE[:experts]))
    call = teacher_call(block, "deepseek_v3")
    gate = block.get_submodule("gate")
    scores_TE = (call.x_TD @ gate.weight[kept].T).sigmoid()  # type: ignore[index]
    chosen_by_TE = scores_TE + gate.e_score_correction_bias[kept]  # type: ignore[index]
    index_TK = chosen_by_TE.topk(min(K, experts)).indices
    weight_TK = scores_TE.gather(1, index_TK)
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True) * float(gate.routed_scaling_factor)  # type: ignore[arg-type]

    student = method("reap").compress(layer, experts * EXPERT)

    expected = block.get_submodule("experts")(call.x_TD, kept[index_TK], weight_TK)
    assert_close(output(student, call), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reap_with_every_expert_kept_is_the_teacher(model_type: str) -> None:
    call = teacher_call(native_block(model_type), model_type)

    student = compressed(model_type, "reap", E)

    assert_close(output(student, call), call.y_TD)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_reap_in_the_place_of_its_block_keeps_the_shared_experts(model_type: str) -> None:
    block = native_block(model_type)
    student = compressed(model_type, "reap", E)
    assert isinstance(student, KeptExperts)

    whole = student.block_like(block)

    assert_close(block_output(whole, inputs()), block_output(block, inputs()))
    call = teacher_call(block, model_type)
    assert_close(output(student, call), call.y_TD)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", ["reap", "hc-smoe"])
def test_distilling_a_rival_lowers_its_error_and_leaves_the_teacher_alone(
    model_type: str, name: str
) -> None:
    block = native_block(model_type)
    before = {n: t.clone() for n, t in block.state_dict().items()}
    call = teacher_call(block, model_type)
    student = compressed(model_type, name, 4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.7 if parameter.requires_grad else 1.0)
    untouched = {
        n: t.clone() for n, t in student.state_dict().items() if "_proj" not in n.rpartition(".")[2]
    }

    result = distill_layer(student, call, DistillConfig(steps=80, batch_tokens=128, held_back=0.2))

    assert result.after < 0.95 * result.before
    after = block.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    trained = student.state_dict()
    assert all(torch.equal(trained[n], t) for n, t in untouched.items()), "experts alone train"


# HC-SMoE.


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hc_smoe_with_every_expert_kept_is_the_teacher(model_type: str) -> None:
    call = teacher_call(native_block(model_type), model_type)

    student = compressed(model_type, "hc-smoe", E)

    assert_close(output(student, call), call.y_TD)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hc_smoe_merges_equal_experts_exactly(model_type: str) -> None:
    block = copy.deepcopy(native_block(model_type))
    experts = block.get_submodule(all_families()[model_type].experts_name)
    twin_of = torch.tensor([0, 1, 0, 3, 1, 0, 3, 7])
    for parameter in experts.parameters():
        parameter.data = parameter.data[twin_of]
    call = teacher_call(block, model_type)

    student = method("hc-smoe").compress(layer_of(block, model_type), 4 * EXPERT)

    assert isinstance(student, MergedExperts)
    assert student.merged_of_expert.tolist() == [0, 1, 0, 2, 1, 0, 2, 3]
    assert_close(output(student, call), call.y_TD)


def test_hc_smoe_merges_by_how_often_each_is_chosen() -> None:
    layer = layer_of(native_block("mixtral"), "mixtral")
    layer.statistics.coactivation_EE[3, 3] = 0  # as if never chosen
    count_E = layer.statistics.count_E
    cluster_E = agglomerate(mean_output_affinity(layer.statistics.mean_output_ED), 3)

    student = method("hc-smoe").compress(layer, 3 * EXPERT)

    assert isinstance(student, MergedExperts)
    assert torch.equal(student.merged_of_expert, cluster_E)
    for cluster in range(3):
        members = (cluster_E == cluster).nonzero().flatten()
        share = (count_E[members] / count_E[members].sum()).float()
        expected = torch.tensordot(share, layer.experts.down_EDF[members], dims=1)
        assert_close(student.native.down_proj.data[cluster], expected)  # type: ignore[union-attr, index]


def test_hc_smoe_merges_clusters_that_no_token_chose() -> None:
    layer = layer_of(native_block("mixtral"), "mixtral")
    layer.statistics.coactivation_EE.zero_()

    student = method("hc-smoe").compress(layer, 1 * EXPERT)

    expected = layer.experts.down_EDF.mean(0)
    assert_close(student.native.down_proj.data[0], expected)  # type: ignore[union-attr, index]


@pytest.mark.parametrize("name", ["reap", "hc-smoe"])
def test_compressing_twice_gives_the_same_bits(name: str) -> None:
    first, second = (compressed("qwen2_moe", name, 3).state_dict() for _ in range(2))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
