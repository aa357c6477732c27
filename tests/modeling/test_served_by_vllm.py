"""What vLLM's Transformers backend asks of the modelling file, as far as it shows without vLLM."""

import copy
from collections.abc import Iterator

import pytest
import torch
from numeric import assert_close
from torch import Tensor, nn

from moefuse.modeling.modeling_moefuse import FusedExperts, NeuronExperts, PlainGating, PlainRows

T, E, K, D, F = 13, 8, 2, 12, 10


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def neuron_experts(bits: str = "16", shared: int = 3) -> NeuronExperts:
    module = NeuronExperts(
        D,
        E,
        PlainGating(nn.functional.silu),
        neurons={bits: E * 4},
        shared=shared,
        shared_bits=bits,
    )
    module.widths.fill_(4)
    for rows in module.modules():
        if isinstance(rows, PlainRows):
            nn.init.normal_(rows.weight)
    return module.eval()


def fused_experts() -> FusedExperts:
    module = FusedExperts(D, F, E, 3, 2, PlainGating(nn.functional.silu), scale=True, bias=True)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def call(tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, D, generator=draw)
    weight_TK, index_TK = torch.rand(tokens, E, generator=draw).topk(K)
    return x_TD, index_TK, weight_TK


@pytest.mark.parametrize("make", [fused_experts, neuron_experts])
@torch.no_grad()
def test_without_gradients_a_compiled_graph_is_whole(make) -> None:
    module = make()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)

    for tokens in (T, 1, 5):
        assert torch.equal(compiled(*call(tokens)), module(*call(tokens)))


@torch.no_grad()
def test_a_copy_is_compiled_with_weights_of_its_own() -> None:
    first = fused_experts()
    second = copy.deepcopy(first)
    second.bases[0].down_proj.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert first.number != second.number

    for module in (first, second):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*call()), module.compute(*call()))


def test_with_gradients_the_compiled_module_learns() -> None:
    module = fused_experts()
    compiled = torch.compile(module, backend="aot_eager")

    compiled(*call()).sum().backward()
    found = module.scale.grad.clone()  # type: ignore[union-attr]
    module.zero_grad()
    module(*call()).sum().backward()

    assert_close(found, module.scale.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", ["16", "2"])
@pytest.mark.parametrize("shared", [0, 3])
def test_neuron_experts_do_not_look_like_what_vllm_replaces(bits: str, shared: int) -> None:
    """A module named ``experts`` whose parameters are all 3-D becomes vLLM's own, silently."""
    module = neuron_experts(bits, shared)

    assert any(parameter.ndim != 3 for parameter in module.parameters())


def test_fused_experts_do_not_look_like_what_vllm_replaces() -> None:
    assert any(parameter.ndim != 3 for parameter in fused_experts().parameters())
