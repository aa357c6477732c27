"""One MoE layer of a tiny model as the rivals see it, with what it received and returned."""

from functools import cache

import torch
from numeric import assert_close
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from moefuse.baselines import Layer, method
from moefuse.families import all_families
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics

FAMILIES = sorted(all_families())
E, K, D = 8, 2, 32
NEED_TWO = {"deepseek_v3", "glm4_moe"}
"""Families whose router adds the best two scores of a group, so it cannot choose from one."""
EXPERT = 3 * D * 16
"""Numbers of one expert of the tiny models."""


def inputs() -> Tensor:
    return torch.randn(1200, D, generator=torch.Generator().manual_seed(0))


def layer_of(
    block: nn.Module,
    model_type: str,
    config: object = None,
    x_TD: Tensor | None = None,
) -> Layer:
    family = all_families()[model_type]
    native = block.get_submodule(family.experts_name)
    experts = Experts(native.gate_up_proj.data, native.down_proj.data, native.act_fn)  # type: ignore
    statistics = LayerStatistics.empty(len(experts.gate_up_EFD), D)
    call = teacher_call(block, model_type, x_TD)
    with torch.no_grad():
        statistics.add(call, experts)
    return Layer(family, config or tiny_config(model_type), block, experts, statistics, call)


@torch.no_grad()
def teacher_call(block: nn.Module, model_type: str, x_TD: Tensor | None = None) -> ExpertsCall:
    """Record what the native block gives its experts and what they return."""
    heard = []
    experts = block.get_submodule(all_families()[model_type].experts_name)
    handle = experts.register_forward_hook(lambda _, given, out: heard.append((*given[:3], out)))
    block((inputs() if x_TD is None else x_TD)[None])
    handle.remove()
    ((received_TD, index_TK, weight_TK, y_TD),) = heard
    return ExpertsCall(received_TD.reshape(-1, D), index_TK, weight_TK, y_TD.reshape(-1, D))


@cache
def native_block(model_type: str) -> nn.Module:
    return tiny_model(model_type).get_submodule(all_families()[model_type].moe_path(2))


def rows_of(tensor: Tensor, kept: list[int]) -> Tensor:
    """Return what a router's parameter or buffer holds of the experts ``kept``."""
    return tensor[..., kept] if tensor.shape[0] == 1 else tensor[kept]


def compressed(model_type: str, name: str, experts: int) -> nn.Module:
    return method(name).compress(layer_of(native_block(model_type), model_type), experts * EXPERT)


def output(student: nn.Module, call: ExpertsCall) -> Tensor:
    with torch.no_grad():
        return student(call.x_TD, call.index_TK.long(), call.weight_TK)


def with_scores(layer: Layer, score_E: Tensor) -> Layer:
    layer.statistics.weighted_norm_E = score_E * layer.statistics.count_E.clamp_min(1.0)
    assert_close(layer.statistics.mean_weighted_norm_E, score_E)
    return layer
