"""The CPU's own way against the slow twin: one token, and many expert by expert."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from numeric import BF16, assert_close
from random_experts import STRANGE, Sizes, random_call, random_experts
from test_fused_experts import KINDS, layers
from torch import Tensor
from triton_ways import poisoned  # noqa: F401

from moefuse.errors import UserError
from moefuse.modeling import FusedExperts, kernels
from moefuse.modeling.kernels import cpu_path
from moefuse.modeling.naive import naive_forward

MANY = Sizes(tokens=13, experts=9, top_k=4, groups=3, rank=5, hidden=40, intermediate=72, hit=8)
ONE = Sizes(**{**vars(MANY), "tokens": 1})


@pytest.fixture(autouse=True)
def by_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for the CPU's way, and for more than one token take none but the way for many."""
    monkeypatch.setattr(cpu_path, "FEWEST_ROWS", 0)
    monkeypatch.setattr(cpu_path, "FEWEST_HALF_ROWS", 0)
    kernels.use("cpu")
    yield
    kernels.use("auto")


@torch.no_grad()
def cpu_forward(module: FusedExperts, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    assert module.fast_compute is kernels.offered
    return module(x_TD, index_TK, w_TK)


@pytest.mark.usefixtures("poisoned")
@given(drawn=layers())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_outputs_are_those_of_the_slow_twin(drawn: tuple[Sizes, dict[str, Any], int]) -> None:
    sizes, options, seed = drawn
    module = random_experts(sizes, seed=seed, may_be_empty=True, **options)
    call = random_call(sizes, seed=seed)

    assert_close(cpu_forward(module, *call), naive_forward(module, *call))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sizes", [ONE, MANY])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", KINDS)
def test_half_precision_differs_from_the_slow_twin_by_rounding(
    options: dict[str, Any], dtype: torch.dtype, sizes: Sizes
) -> None:
    module = random_experts(sizes, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    x_TD, index_TK, w_TK = random_call(sizes)

    y_TD = cpu_forward(module, x_TD.to(dtype), index_TK, w_TK)

    assert y_TD.dtype == dtype
    assert_close(y_TD.float(), naive_forward(module, x_TD.to(dtype), index_TK, w_TK), BF16)


@pytest.mark.parametrize("fewest", [0, 10])
def test_no_token_gives_no_output(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_path, "FEWEST_ROWS", fewest)
    sizes = Sizes(tokens=0)

    y_TD = cpu_forward(random_experts(sizes, scale=True), *random_call(sizes))

    assert y_TD.shape == (0, sizes.hidden)


@pytest.mark.parametrize("tokens", [1, 3, 21, 40])
def test_any_gating_and_any_number_of_rows_for_a_base(tokens: int) -> None:
    """A base's few rows are multiplied otherwise; a gating may return what it is given."""
    sizes = Sizes(tokens=tokens, experts=4, top_k=2, groups=2, hit=4)
    module = random_experts(sizes, scale=True)
    module.gating = lambda _, up: up
    call = random_call(sizes)

    assert_close(cpu_forward(module, *call), naive_forward(module, *call))


@torch.no_grad()
@pytest.mark.parametrize("sizes", [ONE, MANY])
def test_a_compiled_graph_holds_it_whole(sizes: Sizes) -> None:
    module, call = random_experts(sizes, scale=True), random_call(sizes)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(*call), cpu_forward(module, *call))


@pytest.mark.parametrize("tokens", [1, 21])
def test_running_twice_gives_the_same_bits(tokens: int) -> None:
    sizes = Sizes(**{**vars(MANY), "tokens": tokens})
    module, call = random_experts(sizes, scale=True), random_call(sizes)

    assert torch.equal(cpu_forward(module, *call), cpu_forward(module, *call))


def test_it_is_chosen_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = cpu_path.forward
    monkeypatch.setattr(
        cpu_path, "forward", lambda *call: taken.append(len(call[1])) or real(*call)
    )
    kernels.use("auto")
    module, call = random_experts(MANY), random_call(MANY)

    assert module(*call).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module(*call)
    assert not taken
    with torch.no_grad():
        module(*call)
    module.requires_grad_(False)(*call)
    assert taken == [MANY.tokens] * 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *STRANGE,
        (
            lambda module: module.bases[1].up.register_forward_pre_hook(lambda *_: None),
            "a base is more than its weight",
        ),
        (lambda module: module.to("meta"), "the input is on meta"),
    ],
)
def test_what_it_cannot_do_is_refused_if_asked_for_and_done_plainly_if_not(
    change: Any, told: str
) -> None:
    module = random_experts(MANY).requires_grad_(False)
    module.bases[1].up = module.bases[1].gate_up_proj
    change(module)
    call = [t.to("meta") if "meta" in told else t for t in random_call(MANY)]

    with pytest.raises(UserError, match=f"MOEFUSE_KERNELS is 'cpu', but .*{told}"):
        module(*call)
    kernels.use("auto")
    assert kernels.offered(module, *call) is None


def test_gradients_and_autocast_are_refused() -> None:
    module, call = random_experts(MANY), random_call(MANY)

    with pytest.raises(UserError, match="'cpu', but gradients are wanted"):
        module(*call)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match="'cpu', but autocast is on"),
    ):
        module(*call)
