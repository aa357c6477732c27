"""Grouped products against the slow twin: with Triton between them, and with PyTorch alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numeric import BF16
from random_experts import STRANGE, Sizes, random_call, random_experts
from test_fused_experts import KINDS, assert_like_the_slow_twin, gradients, layers
from torch import Tensor

from moefuse.errors import UserError
from moefuse.modeling import FusedExperts, kernels
from moefuse.modeling.kernels import grouped_path, joining
from moefuse.modeling.naive import naive_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU PyTorch alone between the products would add in no certain order, and is not taken.
BETWEEN = ["triton"] if DEVICE == "cuda" else ["triton", "torch"]


@pytest.fixture(autouse=True)
def grouped() -> Iterator[None]:
    kernels.use("grouped")
    yield
    kernels.use("auto")


@pytest.fixture(params=BETWEEN)
def between(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute what lies between products by Triton or by PyTorch."""
    if request.param == "torch":
        monkeypatch.setattr(joining, "by_triton", lambda _: False)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill whatever is allocated without a value with NaN, and what no group's product writes."""

    def poison(make: Any) -> Any:
        def made(*given: Any, **options: Any) -> Tensor:
            tensor = make(*given, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    def product(x_NI: Tensor, weight_EOI: Tensor, last_E: Tensor) -> Tensor:
        y_NO = multiply(x_NI, weight_EOI, last_E)
        after_N = torch.arange(len(y_NO), device=y_NO.device) >= last_E[-1]
        return y_NO.masked_fill(after_N.unsqueeze(-1), float("nan"))

    multiply = grouped_path.product
    monkeypatch.setattr(grouped_path, "product", product)
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def grouped_forward(module: FusedExperts, x_TD: Tensor, index_TK: Tensor, w_TK: Tensor) -> Tensor:
    assert module.fast_compute is kernels.offered
    on_device = module.to(DEVICE)
    return on_device(x_TD.to(DEVICE), index_TK.to(DEVICE), w_TK.to(DEVICE)).cpu()


@st.composite
def aligned(draw: st.DrawFn) -> tuple[Sizes, dict[str, Any], int]:
    """Draw layers whose widths a GPU's grouped products take."""
    sizes, options, seed = draw(layers())
    wide = {"hidden": 8 * (1 + sizes.hidden % 3), "intermediate": 8 * (1 + sizes.intermediate % 2)}
    return Sizes(**{**vars(sizes), **wide}), options, seed


@pytest.mark.usefixtures("between")
@pytest.mark.parametrize("dense_ranks", [0, 256])
@given(drawn=aligned())
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_outputs_and_gradients_are_those_of_the_slow_twin(
    dense_ranks: int, drawn: tuple[Sizes, dict[str, Any], int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_path, "DENSE_RANKS", dense_ranks)
        assert_like_the_slow_twin(grouped_forward, drawn)


LAYER = Sizes(
    tokens=13, experts=9, top_k=4, groups=3, rank=5, hidden=40, intermediate=72, hit=8
)  # fmt: skip
# Rounding takes gates over gpt-oss's limit and back, where its gradient jumps.
SMOOTH = [kind for kind in KINDS if "gating" not in kind]


def small_experts(**options: Any) -> FusedExperts:
    """Return random experts whose output is about as large as their input."""
    module = random_experts(LAYER, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    return module


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of each difference over that of what is expected."""
    return {
        name: float((actual[name].cpu().float() - tensor.float()).norm() / tensor.float().norm())
        for name, tensor in expected.items()
    }


@pytest.mark.usefixtures("between")
@pytest.mark.parametrize("options", SMOOTH)
def test_bf16_differs_from_the_slow_twin_by_rounding(options: dict[str, Any]) -> None:
    module = small_experts(**options).to(torch.bfloat16)
    x_TD, index_TK, w_TK = random_call(LAYER)
    call = (x_TD.to(torch.bfloat16), index_TK, w_TK)

    actual = gradients(grouped_forward, module, call)

    assert actual["y_TD"].dtype == torch.bfloat16
    expected = gradients(naive_forward, module.cpu(), call)
    assert max(errors(actual, expected).values()) < BF16


@pytest.mark.usefixtures("between")
@pytest.mark.parametrize("options", [*SMOOTH[-1:], {**KINDS[-1], "bias": True}])
def test_autocast_computes_in_its_dtype_and_returns_the_inputs(options: dict[str, Any]) -> None:
    module = small_experts(**options)

    def in_bf16(module: FusedExperts, *call: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return grouped_forward(module, *call)

    actual = gradients(in_bf16, module, random_call(LAYER))

    assert all(tensor.dtype == torch.float32 for tensor in actual.values())
    expected = gradients(naive_forward, module.cpu(), random_call(LAYER))
    found = errors(actual, expected)
    assert 1e-3 < found["y_TD"] < BF16
    if options in SMOOTH:
        assert max(found.values()) < BF16


def test_no_token_gives_no_output() -> None:
    sizes = Sizes(**{**vars(LAYER), "tokens": 0})

    y_TD = grouped_forward(random_experts(sizes, scale=True), *random_call(sizes))

    assert y_TD.shape == (0, sizes.hidden)


@pytest.mark.usefixtures("between")
def test_groups_and_experts_that_no_token_needs_get_gradients_of_zero() -> None:
    sizes = Sizes(tokens=8, experts=8, top_k=2, groups=4, hit=2, hidden=16, intermediate=8)
    module = random_experts(sizes, scale=True, bias=True)
    module.group_of_expert.copy_(torch.tensor([0, 2, 0, 2, 3, 3, 3, 0]))
    x_TD, index_TK, w_TK = random_call(sizes)
    idle = sorted(set(range(sizes.experts)) - set(index_TK.unique().tolist()))

    found = gradients(grouped_forward, module, (x_TD, index_TK, w_TK))

    assert not found["bases.1.gate_up_proj.weight"].any()
    assert not found["bases.1.down_proj.weight"].any()
    for name, gradient in found.items():
        if name.startswith(("delta", "scale", "bias")):
            assert gradient.any() and not gradient[idle].any()


@pytest.mark.usefixtures("between")
@pytest.mark.parametrize("dense_ranks", [0, 256])
def test_running_twice_gives_the_same_bits(
    dense_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_path, "DENSE_RANKS", dense_ranks)
    tokens = 3000 if DEVICE == "cuda" else 8
    sizes = Sizes(
        tokens=tokens, experts=6, top_k=4, groups=2, rank=5, hidden=64, intermediate=48, hit=6
    )
    module = random_experts(sizes, scale=True, bias=True).to(torch.bfloat16)
    x_TD, index_TK, w_TK = random_call(sizes)
    call = (x_TD.to(torch.bfloat16), index_TK, w_TK)

    first, second = (gradients(grouped_forward, module, call) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        *STRANGE,
        (lambda module: module.__setattr__("bases", random_experts(Sizes()).bases), "16 bytes"),
    ],
)
def test_what_grouped_products_cannot_do_is_refused(change: Any, told: str) -> None:
    module = random_experts(LAYER)
    change(module)
    module = module.to(DEVICE)
    call = [tensor.to(DEVICE) for tensor in random_call(LAYER)]

    with pytest.raises(UserError, match=f"MOEFUSE_KERNELS is 'grouped', but .*{told}"):
        module(*call)


@pytest.mark.skipif(DEVICE == "cpu", reason="grouped products are chosen on a GPU alone")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_takes_them_where_gradients_are_wanted(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[bool] = []
    real = grouped_path.forward
    monkeypatch.setattr(grouped_path, "forward", lambda *call: taken.append(True) or real(*call))
    kernels.use("auto")
    module = random_experts(LAYER).to(DEVICE)
    call = [tensor.to(DEVICE) for tensor in random_call(LAYER)]

    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        module(*call)
        with torch.no_grad():
            module(*call)

    assert len(taken) == autocast
