"""From a wish to a size: the design's table, budgets that hold, and mistakes that are told."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEXT, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from moefuse.checkpoint.headers import TensorInfo, read_headers
from moefuse.config import CalibrateConfig, DistillConfig, FactorConfig, SizeConfig, build
from moefuse.errors import UserError
from moefuse.evaluation.loading import count_active_parameters, count_parameters
from moefuse.families import MoeShape, family_of
from moefuse.fusion.plan import (
    Estimate,
    Teacher,
    default_rank,
    describe_teacher,
    estimate,
    fitting_bytes,
    make_plan,
    matrix_rate,
)
from moefuse.modeling import load_fused
from moefuse.pipeline import fuse
from moefuse.sizes import Plan

LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "vocab_size": 102400,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# Design, section 3: groups, then billions of parameters at rank 0, 8 and 32.
TABLE = [
    (16, ("4.910", "5.021", "5.353")),
    (8, ("3.111", "3.222", "3.554")),
    (4, ("2.211", "2.322", "2.654")),
    (2, ("1.761", "1.872", "2.204")),
]
SMALL = Teacher(
    shape=MoeShape((1, 2, 3), experts=8, top_k=2, shared_experts=1, hidden=12, intermediate=10),
    outside=5000,
    outside_bytes=10_000,
    largest_outside_layer=1500,
    embedding=1000,
    itemsize=2,
)


@cache
def lite_model() -> torch.nn.Module:
    settings = {key: value for key, value in LITE.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **settings))


@cache
def lite() -> Teacher:
    """Describe the published layout: one tensor a projection and expert, in bf16."""
    family = family_of(LITE)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in lite_model().state_dict().items()
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
    }
    for layer in range(1, 27):
        for expert in range(64):
            names = family.expert_names(layer, expert)
            shapes |= dict.fromkeys((names.gate, names.up), (1408, 2048))
            shapes[names.down] = (2048, 1408)
    tensors = {name: TensorInfo(name, "BF16", shape, "") for name, shape in shapes.items()}
    return describe_teacher(LITE, tensors, family)


def planned(teacher: Teacher = SMALL, factor: FactorConfig | None = None, **size: Any) -> Plan:
    """Plan bases and deltas, which a budget alone would not choose."""
    size = {"form": "low-rank", **size}
    return make_plan(teacher, build(SizeConfig, size), factor or FactorConfig())


def billions(number: int) -> str:
    return f"{number / 1e9:.3f}"


def choice(plan: Plan) -> tuple[int, int]:
    ((groups, rank),) = {(layer.groups, layer.rank) for layer in plan.layers.values()}
    return groups, rank


# The design's table.


def test_lite_has_the_size_that_transformers_builds() -> None:
    assert lite().parameters == count_parameters(lite_model())
    assert billions(lite().outside) == "1.312"
    assert billions(lite().expert_parameters) == "14.395"
    assert billions(lite().parameters) == "15.706"
    assert lite().outside_bytes == 2 * lite().outside
    assert lite().itemsize == 2
    assert lite().embedding == 102400 * 2048


@pytest.mark.parametrize(("groups", "sizes"), TABLE)
def test_lite_students_have_the_sizes_of_the_design(
    groups: int, sizes: tuple[str, str, str]
) -> None:
    bare = FactorConfig(scale=False)
    plans = [planned(lite(), bare, groups=groups, rank=rank) for rank in (0, 8, 32)]

    assert tuple(billions(plan.parameters) for plan in plans) == sizes
    for plan in plans:
        assert plan.teacher_parameters == lite().parameters
        assert plan.bytes == 2 * plan.parameters + 26 * 64 * 8, "the map of experts to groups"
        assert list(plan.layers) == list(range(1, 27))


def test_one_rank_on_every_expert_costs_13_84_million() -> None:
    sizes = [planned(lite(), groups=8, rank=rank).parameters for rank in (7, 8)]

    assert f"{(sizes[1] - sizes[0]) / 1e6:.2f}" == "13.84"


def test_a_scale_per_neuron_costs_two_numbers_for_every_neuron_of_every_expert() -> None:
    with_scale, bare = (
        planned(lite(), FactorConfig(scale=scale), groups=8, rank=8).parameters
        for scale in (True, False)
    )

    assert with_scale - bare == 26 * 64 * 2 * 1408


# What is planned is what is made.


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("deepseek_v2", "float32"), ("mixtral", "bfloat16")]
)
@pytest.mark.parametrize(
    "wish",
    [
        {"groups": 3, "rank": 2, "scale": True, "bias": True},
        {"params": "40K", "form": "low-rank"},
    ],
)
def test_a_student_on_disk_has_the_planned_size(
    model_type: str, dtype: str, wish: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path / "teacher", model_type, dtype=getattr(torch, dtype))
    (tmp_path / "text.txt").write_text(TEXT * 4)
    data = {"data": str(tmp_path / "text.txt"), "tokens": 128, "sequence_length": 32, "steps": 0}

    plan = fuse(tmp_path / "teacher", tmp_path / "student", {**data, **wish}).plan

    headers = read_headers(tmp_path / "student")
    model = load_fused(tmp_path / "student")
    assert plan.bytes == sum(tensor.nbytes for tensor in headers.tensors.values())
    assert plan.parameters == count_parameters(model)
    assert plan.active_parameters == count_active_parameters(model, headers)
    assert plan.teacher_bytes == read_headers(tmp_path / "teacher").total_bytes


# Budgets.


budgets = st.fixed_dictionaries(
    {
        "flag": st.sampled_from(["params", "bytes"]),
        "amount": st.integers(6_500, 40_000),
        "groups": st.one_of(st.none(), st.integers(1, 8)),
        "scale": st.booleans(),
    }
)


@given(budgets)
@settings(max_examples=50, deadline=None)
def test_a_budget_is_never_exceeded_and_one_more_rank_would(drawn: dict[str, Any]) -> None:
    factor = FactorConfig(scale=drawn["scale"])
    measured = "parameters" if drawn["flag"] == "params" else "bytes"
    amount = drawn["amount"] * (1 if measured == "parameters" else 2)
    wish = {drawn["flag"]: str(amount), "groups": drawn["groups"]}

    def size(groups: int, rank: int) -> int:
        return getattr(planned(factor=factor, groups=groups, rank=rank), measured)

    if size(drawn["groups"] or 1, 0) > amount:
        with pytest.raises(UserError, match="too small"):
            planned(factor=factor, **wish)
        return
    plan = planned(factor=factor, **wish)

    groups, rank = choice(plan)
    assert getattr(plan, measured) == size(groups, rank) <= amount
    assert drawn["groups"] in (None, groups)
    assert rank == 12 or size(groups, rank + 1) > amount


@given(st.integers(6_500, 40_000), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_at_a_given_rank_one_more_group_would_exceed_the_budget(amount: int, rank: int) -> None:
    def size(groups: int) -> int:
        return planned(groups=groups, rank=rank).parameters

    if size(1) > amount:
        with pytest.raises(UserError, match="too small"):
            planned(params=str(amount), rank=rank)
        return

    groups, chosen = choice(planned(params=str(amount), rank=rank))

    assert chosen == rank
    assert size(groups) <= amount
    assert groups == 8 or size(groups + 1) > amount


def test_groups_and_rank_given_with_a_budget_are_kept_when_they_fit() -> None:
    assert choice(planned(params="1M", groups=2, rank=3)) == (2, 3)


def test_a_budget_beyond_the_teacher_takes_every_rank() -> None:
    groups, rank = choice(planned(params="1G"))

    assert (groups, rank) == (4, 12)


def test_groups_alone_get_a_modest_rank() -> None:
    assert choice(planned(lite(), groups=8)) == (8, 1408 // 16)
    assert default_rank(SMALL.shape) == 1


@pytest.mark.parametrize(("params", "size"), [("4B", "8.1GB"), ("2B", "4.1GB")])
def test_the_wishes_of_the_reference_card_are_met(params: str, size: str) -> None:
    by_count, by_bytes = planned(lite(), params=params), planned(lite(), bytes=size)

    wanted = float(params[0]) * 1e9
    assert 0.99 * wanted < by_count.parameters <= wanted
    assert 0.99 * float(size[:3]) * 1e9 < by_bytes.bytes <= float(size[:3]) * 1e9


# Mistakes.


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"groups": 9}, r"--groups is 9, but a layer has only 8 experts"),
        ({"groups": 2, "rank": 13}, r"--rank is 13, .* rank above 12 "),
        ({"params": "1M", "bytes": "1MB"}, r"--params and --bytes both set the budget"),
        ({}, r"Say how small the model should be: --groups, --params, --bytes or --expert-bits"),
        ({"expert_bits": 2.0}, r"--expert-bits is for own neurons; leave out either it or --form"),
        ({"rank": 2}, r"Say how small the model should be"),
        ({"params": "four"}, r"--params is 'four', which is not a number of parameters"),
        ({"bytes": "-6GB"}, r"--bytes is '-6GB', which is not a size"),
        ({"params": "100"}, r"--params 100 is too small: with 1 group\(s\) at rank 0"),
        ({"bytes": "1KB", "groups": 2, "rank": 1}, r"with 2 group\(s\) at rank 1"),
    ],
)
def test_a_wish_that_cannot_be_met_is_told_in_a_sentence(size: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        planned(**size)

    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [False, True])
def test_too_small_a_budget_is_told_with_the_size_that_is_left(scale: bool) -> None:
    factor = FactorConfig(scale=scale, bias=scale)
    least = planned(lite(), factor, groups=1, rank=0)

    with pytest.raises(UserError) as error:
        planned(lite(), factor, params="1.5B")

    told = str(error.value)
    assert f"still has {billions(least.parameters)} B parameters" in told
    assert f"in {billions(least.bytes)} GB" in told
    assert "1.312 B (2.623 GB) are outside" in told


# Estimates.


def test_an_estimate_grows_with_what_must_be_done() -> None:
    def seconds(tokens: int = 10**6, steps: int = 100, rate: float = 1e12) -> float:
        return estimate(
            lite(),
            planned(lite(), groups=8, rank=8),
            CalibrateConfig(tokens=tokens),
            DistillConfig(steps=steps),
            FactorConfig(),
            working_itemsize=2,
            rate=rate,
        ).seconds

    assert seconds() < seconds(tokens=2 * 10**6)
    assert seconds() < seconds(steps=200)
    assert seconds() > seconds(rate=2e12)


def test_an_estimate_knows_of_own_inputs_and_gradients() -> None:
    def found(distill: DistillConfig, sensitivity: int = 0, **size: Any) -> Estimate:
        return estimate(
            lite(),
            planned(lite(), **size),
            CalibrateConfig(tokens=10**6, sensitivity_tokens=sensitivity),
            distill,
            FactorConfig(),
            working_itemsize=2,
            rate=1e12,
        )

    teachers, own = DistillConfig(inputs="teacher"), DistillConfig(inputs="student")
    for size in ({"groups": 8, "rank": 8}, {"form": "auto", "expert_bits": 2.0}):
        assert found(own, **size).seconds > found(teachers, **size).seconds
        assert found(own, **size).disk_bytes > found(teachers, **size).disk_bytes
    as_it_is = DistillConfig()
    assert found(as_it_is, **size) == found(own, **size)
    assert found(as_it_is, groups=8, rank=8) == found(teachers, groups=8, rank=8)
    assert found(own, 8192, **size).seconds > found(own, **size).seconds
    assert found(as_it_is, 8192, groups=8, rank=8) == found(as_it_is, groups=8, rank=8)


def test_disk_holds_the_student_and_what_every_layer_received_and_returned() -> None:
    plan = planned(lite(), groups=8, rank=8)

    found = estimate(
        lite(),
        plan,
        CalibrateConfig(tokens=10**5),
        DistillConfig(),
        FactorConfig(),
        working_itemsize=2,
        rate=1e12,
    )

    calls = 26 * 10**5 * (2 * 2048 * 2 + 6 * 8)
    assert found.disk_bytes > plan.bytes + calls
    assert found.memory_bytes < 0.5 * plan.teacher_bytes, "a layer, never the model"


def test_the_matrix_rate_is_measured() -> None:
    assert 1e8 < matrix_rate("cpu", torch.float32) < 1e14


def test_halving_holds_half_of_the_experts_as_they_are_trained() -> None:
    plan = planned(lite(), groups=8, form="multiplexed")

    grouped, halved = (
        fitting_bytes(lite(), plan, FactorConfig(), halves=halves) for halves in (False, True)
    )

    # Weights, gradients and two moments of half of the experts, in fp32, beside all as stored.
    trained = 4 * 4 * lite().shape.layer_numbers // 2
    assert halved > trained + 2 * lite().shape.layer_numbers
    assert grouped < halved
