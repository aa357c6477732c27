"""Triton's kernels of coded neurons against the slow twin: interpreted on a CPU, else compiled."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numeric import BF16, assert_close
from random_experts import GATINGS
from test_neuron_experts import Sizes, gradients, layers, random_call, random_layer
from triton_ways import DEVICE, DTYPES, by_triton, poisoned, triton_forward  # noqa: F401

from moefuse.errors import UserError
from moefuse.modeling import kernels
from moefuse.modeling.kernels import repeating, tiles, triton_coded_path
from moefuse.modeling.naive import naive_neurons
from moefuse.modeling.training import TrainedNeuronExperts

pytestmark = pytest.mark.usefixtures("by_triton", "poisoned")

SOME = Sizes(bits=("1.6", "3"), most=5)
BEYOND = {
    torch.float32: Sizes(tokens=41, experts=3, hidden=44, most=20, shared=18),
    torch.float16: Sizes(tokens=41, experts=3, hidden=140, most=70, shared=67),
}
"""More rows, neurons, numbers and columns than the smallest tile of each table has."""


@given(layers().map(lambda sizes: replace(sizes, bits=sizes.bits[::3])), st.integers(0, 1000))
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_outputs_and_gradients_are_those_of_the_slow_twin(sizes: Sizes, seed: int) -> None:
    module, _ = random_layer(sizes, seed)
    call = random_call(sizes, seed)
    expected = gradients(naive_neurons, module, call)

    actual = gradients(triton_forward, module, call)

    for name in expected:
        assert_close(actual[name].cpu(), expected[name])


@pytest.mark.parametrize(
    "kinds",
    [
        {"bits": ("1", "1.14"), "shared_bits": "16", "gain_bits": "3"},
        {"bits": ("1.33", "16"), "shared_bits": "1.6", "gain_bits": "16"},
        {"bits": ("2", "3"), "shared_bits": "3", "gain_bits": "1.14", "biased": True},
        {"bits": ("4", "8"), "shared": 0, "biased": True},
        {"bits": ("2", "3"), "shared": 0, "hidden": 128, "most": 5},
    ],
    ids=lambda kinds: "+".join(kinds["bits"]) + ("even" if "hidden" in kinds else ""),
)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_sizes_beyond_one_tile(kinds: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = replace(BEYOND.get(dtype, BEYOND[torch.float16]), **kinds)
    module, _ = random_layer(sizes)
    module.to(dtype)
    x_TD, index_TK, w_TK = random_call(sizes)
    x_TD = 0.1 * x_TD.to(dtype)

    y_TD = triton_forward(module, x_TD, index_TK, w_TK)

    expected = naive_neurons(module.cpu(), x_TD, index_TK, w_TK)
    assert_close(y_TD.float(), expected, 1e-4 if dtype == torch.float32 else BF16)
    assert y_TD.dtype == dtype


@pytest.mark.parametrize("gating", [GATINGS["clamped"], torch.nn.functional.gelu])
@torch.no_grad()
def test_gatings(gating: Any) -> None:
    module, _ = random_layer(SOME)
    plain = type(GATINGS["plain"])
    module.gating = gating if gating in GATINGS.values() else plain(gating)
    call = random_call(SOME)

    assert_close(triton_forward(module, *call), naive_neurons(module.cpu(), *call))


@torch.no_grad()
def test_however_rows_are_ordered_and_neurons_split_the_output_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repeating, "MOST_ROWS", 0)
    sizes = replace(SOME, most=20, tokens=4)
    module, _ = random_layer(sizes)
    call = random_call(sizes)
    expected = triton_forward(module, *call)

    monkeypatch.setattr(triton_coded_path, "MOST_COUNTED", 0)
    assert_close(triton_forward(module, *call), expected)
    for programs in (1, 1000):
        other = replace(tiles.CODED_IN_FP32, programs=programs)
        monkeypatch.setattr(triton_coded_path, "coded_tiles_for", lambda *_, other=other: other)
        assert_close(triton_forward(module, *call), expected)


@torch.no_grad()
def test_the_same_call_gives_the_same_bytes_and_tokens_do_not_see_each_other() -> None:
    module, _ = random_layer(SOME)
    call = random_call(SOME)
    together = triton_forward(module, *call)

    assert torch.equal(triton_forward(module, *call), together)
    alone = [triton_forward(module, *(part[t : t + 1] for part in call)) for t in (0, 4)]
    assert_close(torch.cat(alone), together[[0, 4]])


@torch.no_grad()
def test_all_tokens_may_choose_the_same_experts() -> None:
    sizes = replace(SOME, tokens=20)
    module, _ = random_layer(sizes)
    x_TD, index_TK, w_TK = random_call(sizes)
    index_TK = index_TK[:1].expand(20, -1)

    assert_close(
        triton_forward(module, x_TD, index_TK, w_TK),
        naive_neurons(module.cpu(), x_TD, index_TK, w_TK),
    )


@torch.no_grad()
def test_experts_whose_numbers_of_neurons_change_are_laid_out_anew() -> None:
    module, _ = random_layer(SOME)
    call = random_call(SOME)
    triton_forward(module, *call)
    module.widths.copy_(module.widths.flip(1))

    y_TD = triton_forward(module, *call)

    assert_close(y_TD, naive_neurons(module.cpu(), *call))


class Strange(torch.nn.Module):
    """Rows of a kind that no kernel knows."""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda module: setattr(module, "gating", object()), "silu, gelu and gpt-oss"),
        (lambda module: module.own.bits3.double(), "weights are torch.float64"),
        (lambda module: setattr(module, "shared", Strange()), "rows are Strange, neither"),
    ],
)
def test_what_triton_cannot_do_is_refused_if_asked_for_and_done_plainly_if_not(
    change: Any, told: str
) -> None:
    module, _ = random_layer(SOME)
    change(module.to(DEVICE))
    call = [tensor.to(DEVICE) for tensor in random_call(SOME)]

    with pytest.raises(UserError, match=f"MOEFUSE_KERNELS is 'triton', but .*{told}"):
        module(*call)
    kernels.use("auto")
    assert kernels.offered(module, *call) is None


def test_under_autocast_and_for_gradients_the_plain_way_is_taken() -> None:
    module, _ = random_layer(SOME)
    call = [tensor.to(DEVICE) for tensor in random_call(SOME)]
    module.to(DEVICE)
    kernels.use("auto")

    assert kernels.offered(module, *call) is None
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert kernels.obstacle(module, call[0]) == "autocast is on"
        assert kernels.offered(module, *call) is None


@torch.no_grad()
def test_the_trained_twin_is_computed_plainly() -> None:
    module, latents = random_layer(SOME)
    call = random_call(SOME)

    assert_close(TrainedNeuronExperts(module, latents)(*call), naive_neurons(module, *call))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_cuda_graph_holds_the_call() -> None:
    module, _ = random_layer(SOME)
    x_TD, index_TK, w_TK = (tensor.to(DEVICE) for tensor in random_call(SOME))
    module.to(DEVICE)(x_TD, index_TK, w_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = module(x_TD, index_TK, w_TK)
    x_TD.copy_(x_TD.flip(0))
    index_TK.copy_(index_TK.flip(0))

    graph.replay()

    assert_close(y_TD, module(x_TD, index_TK, w_TK))
