"""Dense products against the modules that they stand in for: outputs and all gradients."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from tiny import tiny_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "modeling"))

import random_experts as fused
import test_neuron_experts as neurons
from dense_products import multiply_densely

from moefuse.modeling.training import TrainedNeuronExperts


def assert_same(module: nn.Module, call: neurons.Call) -> None:
    dense = multiply_densely(copy.deepcopy(module))
    expected = neurons.gradients(neurons.plainly, module, call)
    found = neurons.gradients(neurons.plainly, dense, call)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("has_both", [False, True])
def test_fused_experts(rank: int, has_both: bool) -> None:
    sizes = fused.Sizes(rank=rank)
    module = fused.random_experts(sizes, scale=has_both, bias=has_both)
    assert_same(module, fused.random_call(sizes))


@pytest.mark.parametrize("shared", [0, 3])
def test_neuron_experts_in_training(shared: int) -> None:
    sizes = neurons.Sizes(shared=shared)
    module = TrainedNeuronExperts(*neurons.random_layer(sizes))
    assert_same(module, neurons.random_call(sizes))


@pytest.mark.parametrize("is_repeated", [False, True])
def test_native_experts(is_repeated: bool) -> None:
    """Merged experts are called with the same expert twice."""
    experts = tiny_model("deepseek_v2").get_submodule("model.layers.1.mlp.experts")
    count, _, hidden = experts.get_parameter("gate_up_proj").shape
    x_TD, index_TK, w_TK = neurons.random_call(neurons.Sizes(experts=count, hidden=hidden))
    if is_repeated:
        index_TK = index_TK.clone()
        index_TK[::2] = 1
    assert_same(experts, (x_TD, index_TK, w_TK))


def test_a_whole_model_says_the_same() -> None:
    model = tiny_model("deepseek_v2")
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    assert_close(multiply_densely(model)(ids).logits, expected)
