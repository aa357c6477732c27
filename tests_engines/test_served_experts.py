"""One device's share of the fused layer: shares sum to the whole, and vLLM splits a model."""

from pathlib import Path

import pytest
import torch
from served import Student, greedy
from test_tokens import generate
from torch import Tensor, nn

from moefuse.export.vllm_plugin.served_experts import ServedExperts
from moefuse.modeling.modeling_moefuse import FusedExperts, PlainGating

D, F, E, G, K = 24, 16, 12, 5, 3


def fused(*, rank: int, **options: bool) -> FusedExperts:
    draw = torch.Generator().manual_seed(rank)
    module = FusedExperts(D, F, E, G, rank, PlainGating(nn.functional.silu), **options)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 4
    module.group_of_expert.copy_(torch.randint(G, (E,), generator=draw))
    return module.requires_grad_(False)


def served(module: FusedExperts, place: int, devices: int) -> ServedExperts:
    share = ServedExperts(
        module,
        rank=place,
        devices=devices,
        dtype=torch.float32,
        device="cpu",
        sum_over_devices=lambda y_TD: y_TD,
    )
    loaded = share.load_weights(module.state_dict().items())
    names = {name for name, _ in share.named_parameters()}
    assert loaded == names | {"group_of_expert"}
    return share


def call(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    weight_TK, index_TK = torch.rand(tokens, E, generator=draw).topk(K)
    return torch.randn(tokens, D, generator=draw), index_TK, weight_TK


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("options", [{}, {"scale": True, "bias": True}, {"down_bias": True}])
def test_shares_sum_to_the_whole(
    devices: int, tokens: int, rank: int, options: dict[str, bool]
) -> None:
    module = fused(rank=rank, **options)

    outputs = [served(module, place, devices)(*call(tokens)) for place in range(devices)]

    torch.testing.assert_close(sum(outputs), module(*call(tokens)), rtol=1e-5, atol=1e-5)


def test_neurons_that_cannot_be_split_are_told() -> None:
    with pytest.raises(ValueError, match="Experts of 16 neurons cannot be split over 3 devices;"):
        served(fused(rank=2), 0, 3)


@pytest.mark.xdist_group("others")
def test_two_processes_split_a_model(student: Student, tmp_path: Path) -> None:
    path = student("mixtral")
    prompts, made = generate(path, tmp_path, {}, enforce_eager=True, tensor_parallel_size=2)

    expected = greedy(path, prompts)
    assert made["together"] == expected
    assert made["alone"] == expected
