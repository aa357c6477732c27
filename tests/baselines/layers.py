"""One MoE layer of a tiny model as the rivals see it, with what it received and returned."""

from functools import cache
from typing import Any

import torch
from numeric import assert_close
from tiny import tiny_config, tiny_model
from torch import Tensor, nn

from moefuse.baselines import Layer, method
from moefuse.checkpoint.native import Weights, from_native, to_native
from moefuse.families import all_families
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.native import experts_of

FAMILIES = sorted(all_families())
E, K, D = 8, 2, 32
NEED_TWO = {"deepseek_v3", "glm4_moe", "phimoe"}
"""Families whose router cannot choose from one: it adds the best two scores of a group, or takes
two experts one after the other."""
EXPERT = 3 * D * 16
"""Numbers of one expert of the tiny models."""


def inputs() -> Tensor:
    return torch.randn(1200, D, generator=torch.Generator().manual_seed(0))


def layer_of(
    block: nn.Module,
    model_type: str,
    config: Any = None,
    x_TD: Tensor | None = None,
) -> Layer:
    family = all_families()[model_type]
    native = block.get_submodule(family.experts_name)
    config = config or tiny_config(model_type)
    experts = experts_of(native, family, config.to_dict())
    statistics = LayerStatistics.empty(len(experts.gate_up_EFD), D)
    call = teacher_call(block, model_type, x_TD)
    with torch.no_grad():
        statistics.add(call, experts)
    return Layer(family, config, block, experts, statistics, call)


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


def weights_of(native: nn.Module, model_type: str) -> Weights:
    """Return gate and up, down and the biases of a native experts module."""
    parameters = {name: parameter.data for name, parameter in native.named_parameters()}
    return from_native(parameters, all_families()[model_type].layout)


def put_weights(native: nn.Module, model_type: str, weights: Weights) -> None:
    """Give a native experts module other weights."""
    for name, tensor in to_native(weights, all_families()[model_type].layout).items():
        native.get_parameter(name).data = tensor.clone()


def block_output(block: nn.Module, x_TD: Tensor) -> Tensor:
    """Return what a native block makes of a sequence, (1, T, D)."""
    output = block(x_TD[None])
    return (output[0] if isinstance(output, tuple) else output).reshape(1, *x_TD.shape)


def matrix_numbers(module: nn.Module) -> int:
    """Count the numbers of a student's matrices: biases come on top of any budget."""
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if "bias" not in name)


def expert_numbers(model_type: str) -> int:
    """Count one native expert's numbers, biases and all."""
    native = native_block(model_type).get_submodule(all_families()[model_type].experts_name)
    return sum(parameter[0].numel() for parameter in native.parameters())


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
