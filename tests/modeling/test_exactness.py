"""Where nothing is lost the student is the teacher, for every family."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import BF16, assert_close
from tiny import TEXT, save_tiny, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moefuse.config import FactorConfig
from moefuse.families import MoeShape, all_families
from moefuse.fusion.factor import factor_layer
from moefuse.modeling import FusedExperts, load_fused
from moefuse.modeling.native import experts_of
from moefuse.pipeline import fuse
from moefuse.sizes import LayerPlan, make_experts, maximum_rank

FAMILIES = sorted(all_families())
D, F, E, K = 32, 16, 8, 2
SHAPE = MoeShape(layers=(1,), experts=E, top_k=K, shared_experts=0, hidden=D, intermediate=F)
UNEVEN = torch.tensor([0, 1, 1, 0, 2, 1, 1, 1])


@cache
def native_experts(model_type: str) -> nn.Module:
    family = all_families()[model_type]
    return tiny_model(model_type).get_submodule(f"{family.moe_path(2)}.{family.experts_name}")


def fused(model_type: str, group_of_expert: Tensor, rank: int, **options: Any) -> FusedExperts:
    family, native = all_families()[model_type], native_experts(model_type)
    settings = FactorConfig(**options)
    mass_E = torch.rand(E, generator=torch.Generator().manual_seed(1))
    few_TD = torch.randn(5, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    experts = experts_of(native, family, tiny_config(family.model_type).to_dict())
    state = factor_layer(
        experts,
        group_of_expert,
        mass_E,
        rank,
        settings,
        few_TD.T @ few_TD / 5,
    )
    plan = LayerPlan(int(group_of_expert.max()) + 1, rank, scale=settings.scale, bias=settings.bias)
    shape = replace(SHAPE, biased=family.layout.biased)
    student = make_experts(shape, plan, "cpu", experts.gating)
    student.load_state_dict(state)
    return student


def call(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(40, D, generator=generator)
    w_TK, index_TK = torch.rand(40, E, generator=generator).topk(K)
    return x_TD, index_TK, w_TK


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"align": False}, {"scale": True, "bias": True}])
@pytest.mark.parametrize("groups", [UNEVEN, torch.zeros(E, dtype=torch.int64)])
@torch.no_grad()
def test_full_rank_is_the_native_layer(
    model_type: str, options: dict[str, bool], groups: Tensor
) -> None:
    native = native_experts(model_type)
    rank = maximum_rank(SHAPE)
    assert rank == min(D, 2 * F)

    student = fused(model_type, groups, rank, **options)

    assert student.delta is not None
    assert student.delta.down_a.shape == (E, min(D, F), F)  # type: ignore[union-attr]
    assert_close(student(*call()), native(*call()))


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_whitening_is_exact_at_full_rank_too(model_type: str) -> None:
    native = native_experts(model_type)

    student = fused(model_type, UNEVEN, maximum_rank(SHAPE), damping=0.0)

    assert_close(student(*call()), native(*call()))


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_one_base_for_every_expert_is_the_native_layer(model_type: str) -> None:
    native = native_experts(model_type)

    student = fused(model_type, torch.arange(E), 0)

    assert student.delta is None
    assert_close(student(*call()), native(*call()))


@torch.no_grad()
def test_one_rank_below_full_is_not_exact() -> None:
    """The tests above can fail: a rank less is seen at their tolerance."""
    native = native_experts("mixtral")
    student = fused("mixtral", UNEVEN, maximum_rank(SHAPE) - 1)

    with pytest.raises(AssertionError, match="off by"):
        assert_close(student(*call()), native(*call()))


def test_gradients_reach_the_layers_before() -> None:
    native = native_experts("qwen3_moe")
    student = fused("qwen3_moe", UNEVEN, maximum_rank(SHAPE))
    found = []
    for module in (student, native):
        x_TD, index_TK, w_TK = call()
        x_TD.requires_grad_()
        w_TK.requires_grad_()
        found.append(torch.autograd.grad(module(x_TD, index_TK, w_TK).sum(), [x_TD, w_TK]))

    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


def make_student(tmp_path: Path, teacher: Path, **values: Any) -> Path:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    settings = {"data": str(text), "tokens": 256, "sequence_length": 32, "steps": 0, **values}
    fuse(teacher, tmp_path / "student", settings)
    return tmp_path / "student"


EXACT = [{"groups": 3, "rank": min(D, 2 * F)}, {"groups": E, "rank": 0}]


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("size", EXACT)
@torch.no_grad()
def test_the_whole_student_is_the_teacher(
    model_type: str, size: dict[str, int], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    directory = tiny_checkpoint(model_type)
    teacher = AutoModelForCausalLM.from_pretrained(directory)
    ids_BS = torch.randint(2, 64, (2, 23), generator=torch.Generator().manual_seed(0))

    student = load_fused(make_student(tmp_path, directory, **size))

    assert sum(isinstance(module, FusedExperts) for module in student.modules()) >= 2
    assert_close(student(ids_BS).logits, teacher(ids_BS).logits)


@torch.no_grad()
def test_a_bf16_student_is_its_bf16_teacher_but_for_rounding(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", dtype=torch.bfloat16)
    ids_BS = torch.randint(2, 64, (2, 23), generator=torch.Generator().manual_seed(0))

    student = load_fused(make_student(tmp_path, tmp_path / "teacher", groups=E, rank=0))

    assert student.dtype == torch.bfloat16
    assert_close(student(ids_BS).logits.float(), teacher(ids_BS).logits.float(), BF16)
