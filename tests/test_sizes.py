"""Sizes are those of the file on disk, to the byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moefuse.families import MoeShape
from moefuse.sizes import (
    LayerPlan,
    active_parameters,
    layer_bytes,
    layer_parameters,
    make_experts,
    maximum_rank,
)

SHAPE = MoeShape(layers=(1, 2), experts=6, top_k=3, shared_experts=1, hidden=10, intermediate=7)
D, F, E, K = 10, 7, 6, 3
PLANS = [
    LayerPlan(groups, rank, scale=scale, bias=bias)
    for groups, rank in ((1, 0), (1, 1), (2, 3), (3, 8), (6, 0), (2, 10))
    for scale, bias in ((False, False), (True, False), (True, True))
]
MULTIPLEXED = [
    LayerPlan(groups, rank, delta=f"multiplexed_{kind}")
    for groups, rank in ((1, 0), (2, 3), (6, 1))
    for kind in ("mixture", "lora")
]


def stored_bytes(path: Path) -> int:
    """Return the bytes of the data, as the file's own header tells where it begins."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


@pytest.mark.parametrize("plan", [*PLANS, *MULTIPLEXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_file(plan: LayerPlan, dtype: torch.dtype, tmp_path: Path) -> None:
    module = make_experts(SHAPE, plan, "cpu").to(dtype)
    save_file(module.state_dict(), tmp_path / "layer.safetensors")

    expected = stored_bytes(tmp_path / "layer.safetensors")

    assert layer_bytes(SHAPE, plan, dtype.itemsize) == expected
    assert layer_parameters(SHAPE, plan) == (expected - 8 * E) // dtype.itemsize


@pytest.mark.parametrize("plan", PLANS)
def test_parameters_by_the_formula(plan: LayerPlan) -> None:
    down_rank = min(plan.rank, D, F)
    delta = plan.rank * (D + 2 * F) + down_rank * (F + D)
    own = delta + 2 * F * (plan.scale + plan.bias)

    assert layer_parameters(SHAPE, plan) == plan.groups * 3 * D * F + E * own
    expected = min(K, plan.groups) * 3 * D * F + K * own
    assert active_parameters(SHAPE, plan) == expected


@pytest.mark.parametrize("plan", MULTIPLEXED)
def test_parameters_of_multiplexed_experts_by_the_formula(plan: LayerPlan) -> None:
    pair = 3 * plan.rank * (D + F)
    is_lora = plan.delta == "multiplexed_lora"
    group = 3 * D * F + pair * is_lora
    own = D + (3 * plan.rank if is_lora else pair)

    assert layer_parameters(SHAPE, plan) == plan.groups * group + E * own
    assert active_parameters(SHAPE, plan) == min(K, plan.groups) * group + K * own


@pytest.mark.parametrize(
    "plan", [LayerPlan(2, 3, scale=True), *(plan for plan in MULTIPLEXED if plan.groups == 2)]
)
def test_active_parameters_are_those_of_the_experts_a_token_chose(plan: LayerPlan) -> None:
    module = make_experts(SHAPE, plan, "cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    module.group_of_expert.copy_(torch.tensor([0, 0, 1, 1, 1, 0]))

    module(torch.randn(1, D), torch.tensor([[0, 2, 4]]), torch.ones(1, K)).sum().backward()

    touched = sum(int(p.grad.ne(0).sum()) for p in module.parameters() if p.grad is not None)
    assert touched == active_parameters(SHAPE, plan)


def test_counting_takes_no_memory() -> None:
    vast = MoeShape((0,), experts=256, top_k=8, shared_experts=1, hidden=7168, intermediate=2048)
    plan = LayerPlan(32, 64)

    assert next(make_experts(vast, plan, "meta").parameters()).is_meta
    assert layer_bytes(vast, plan, 2) > 3e9


@pytest.mark.parametrize(("hidden", "intermediate", "rank"), [(10, 7, 10), (20, 7, 14)])
def test_the_highest_rank_is_the_lesser_side_of_gate_and_up(
    hidden: int, intermediate: int, rank: int
) -> None:
    shape = MoeShape((0,), 4, 2, 0, hidden, intermediate)

    assert maximum_rank(shape) == rank


def test_what_is_made_has_the_plans_parts(tmp_path: Path) -> None:
    module = make_experts(SHAPE, LayerPlan(2, 8, scale=True, bias=True), "cpu")
    save_file(module.state_dict(), tmp_path / "layer.safetensors")

    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "layer.safetensors").items()}

    assert shapes == {
        **{f"bases.{group}.gate_up_proj.weight": (2 * F, D) for group in range(2)},
        **{f"bases.{group}.down_proj.weight": (D, F) for group in range(2)},
        "delta.gate_up_a": (E, 8, D),
        "delta.gate_up_b": (E, 2 * F, 8),
        "delta.down_a": (E, 7, F),
        "delta.down_b": (E, D, 7),
        "scale": (E, 2 * F),
        "bias": (E, 2 * F),
        "group_of_expert": (E,),
    }
