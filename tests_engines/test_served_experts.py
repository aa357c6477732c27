"""One device's share of the fused layer: shares sum to the whole, and vLLM splits a model."""

from copy import deepcopy

import pytest
import torch
from engines import engine
from served import Expected, Student, prompts_for
from torch import Tensor, nn

from moefuse.export.quantized.deltas import code_deltas
from moefuse.export.vllm_plugin.served_experts import ServedExperts, groups_of_device
from moefuse.modeling.modeling_moefuse import FACTORS, FusedExperts, PlainGating

D, F, E, G, K = 24, 16, 12, 5, 3


def fused(*, rank: int, **options: bool) -> FusedExperts:
    draw = torch.Generator().manual_seed(rank)
    module = FusedExperts(D, F, E, G, rank, PlainGating(nn.functional.silu), **options)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 4
    module.group_of_expert.copy_(torch.randint(G, (E,), generator=draw))
    return module.requires_grad_(False)


def served(
    module: FusedExperts,
    place: int,
    devices: int,
    *,
    by_experts: bool = False,
    dtype: torch.dtype = torch.float32,
    second_first: bool = False,
) -> ServedExperts:
    share = ServedExperts(
        module,
        rank=place,
        devices=devices,
        dtype=dtype,
        device="cpu",
        sum_over_devices=lambda y_TD: y_TD,
        by_experts=by_experts,
    )
    # As from two files: neighbours, as the parts of a coded matrix are, lie in different ones.
    tensors = list(module.state_dict().items())
    first, second = (1, 0) if second_first else (0, 1)
    loaded = share.load_weights(tensors[first::2]) | share.load_weights(tensors[second::2])
    names = {name for name, _ in share.named_parameters()}
    assert loaded == names | {"group_of_expert"}
    return share


def call(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    weight_TK, index_TK = torch.rand(tokens, E, generator=draw).topk(K)
    return torch.randn(tokens, D, generator=draw), index_TK, weight_TK


@pytest.mark.parametrize("by_experts", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("options", [{}, {"scale": True, "bias": True}, {"down_bias": True}])
def test_shares_sum_to_the_whole(
    devices: int, tokens: int, rank: int, options: dict[str, bool], by_experts: bool
) -> None:
    module = fused(rank=rank, **options)

    shares = [served(module, place, devices, by_experts=by_experts) for place in range(devices)]
    outputs = [share(*call(tokens)) for share in shares]

    torch.testing.assert_close(sum(outputs), module(*call(tokens)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_experts", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("second_first", [False, True])
def test_shares_of_coded_deltas_sum_to_the_whole(
    devices: int, bits: str, by_experts: bool, second_first: bool
) -> None:
    """Whichever file comes first, and with it whose the experts are."""
    module = fused(rank=3, scale=True, bias=True, down_bias=True)
    code_deltas(module, bits)

    shares = [
        served(module, place, devices, by_experts=by_experts, second_first=second_first)
        for place in range(devices)
    ]
    outputs = [share(*call(17)) for share in shares]

    torch.testing.assert_close(sum(outputs), module(*call(17)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_deltas_are_decoded_as_where_the_layer_is_whole(dtype: torch.dtype) -> None:
    """To the last bit: in the dtype that is served, whatever scales are stored in."""
    stored = fused(rank=3).bfloat16()
    code_deltas(stored, "8")

    share = served(stored, 0, 1, dtype=dtype)

    delta = deepcopy(stored.delta).to(dtype)
    for factor in FACTORS:
        assert torch.equal(share.get_parameter(factor), getattr(delta, factor)), factor


def test_by_experts_every_base_and_delta_is_on_one_device() -> None:
    module = fused(rank=3, scale=True, bias=True, down_bias=True)

    shares = [served(module, place, 2, by_experts=True) for place in range(2)]

    assert sum(len(share.gate_up) for share in shares) == G
    assert sum(len(share.gate_up_b) for share in shares) == E
    assert all(len(share.gate_up) for share in shares)
    numbers = sum(parameter.numel() for parameter in module.parameters())
    assert sum(p.numel() for share in shares for p in share.parameters()) == numbers


def test_devices_get_about_as_many_experts() -> None:
    group_of_expert = [0] * 7 + [1] * 3 + [2] * 2 + [3] * 2

    held = [groups_of_device(group_of_expert, 4, rank, 2) for rank in range(2)]

    assert held == [[0], [1, 2, 3]]
    assert [groups_of_device([0, 0, 0, 1], 4, rank, 4) for rank in range(4)] == [[0], [1], [2], [3]]


def test_fewer_groups_than_devices_are_told() -> None:
    with pytest.raises(ValueError, match="5 groups of experts cannot be spread over 6 devices;"):
        served(fused(rank=2), 0, 6, by_experts=True)


def test_neurons_that_cannot_be_split_are_told() -> None:
    with pytest.raises(ValueError, match="Experts of 16 neurons cannot be split over 3 devices;"):
        served(fused(rank=2), 0, 3)


@pytest.mark.parametrize(
    ("name", "by_experts"),
    [
        ("mixtral", False),
        ("mixtral", True),
        ("mixtral-w4a16", False),
        ("mixtral-w4a16_4", True),
    ],
)
def test_two_processes_split_a_model(
    name: str, by_experts: bool, student: Student, expected: Expected
) -> None:
    """Also one whose bases and deltas are both of few bits, and are read as plain ones."""
    path = student(name)
    with engine(in_one_process=False) as started:
        made = started.generate(
            path,
            prompts_for(path),
            enforce_eager=True,
            tensor_parallel_size=2,
            enable_expert_parallel=by_experts,
        )

    assert "error" not in made, made
    assert made["together"] == expected(name)
    assert made["alone"] == expected(name)
