"""Triton's kernels against the slow twin: interpreted on a CPU, compiled where there is a GPU."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from numeric import BF16, assert_close
from random_experts import Sizes, random_call, random_experts
from test_fused_experts import KINDS, assert_like_the_slow_twin, layers
from triton_ways import DEVICE, DTYPES, by_triton, poisoned, triton_forward  # noqa: F401

from moefuse.errors import UserError
from moefuse.modeling import kernels, modeling_moefuse
from moefuse.modeling.kernels import triton_order, triton_pairs, triton_path
from moefuse.modeling.kernels.tiles import tiles_for
from moefuse.modeling.naive import naive_forward

pytestmark = pytest.mark.usefixtures("by_triton", "poisoned")


@given(layers())
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_outputs_and_gradients_are_those_of_the_slow_twin(
    drawn: tuple[Sizes, dict[str, Any], int],
) -> None:
    assert_like_the_slow_twin(triton_forward, drawn)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("rank", [0, 5, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_beyond_one_tile(rank: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    sizes = Sizes(
        tokens=41, experts=9, top_k=4, groups=3, rank=rank, hidden=40, intermediate=72, hit=9
    )
    module = random_experts(sizes, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.3)
    x_TD, index_TK, w_TK = random_call(sizes)
    x_TD = x_TD.to(dtype)

    with torch.no_grad():
        y_TD = triton_forward(module, x_TD, index_TK, w_TK)

    expected = naive_forward(module.cpu(), x_TD, index_TK, w_TK)
    assert_close(y_TD.float(), expected, 1e-4 if dtype == torch.float32 else BF16)
    assert y_TD.dtype == dtype


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_are_multiplied_by_pairs(
    rank: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token's members of one group share a base's product; groups are of unlike sizes."""
    monkeypatch.setattr(triton_pairs, "MANY_ROWS", 1)
    monkeypatch.setattr(triton_order, "ONE_BY_ONE", 8)
    sizes = Sizes(
        tokens=41, experts=9, top_k=4, groups=3, rank=rank, hidden=40, intermediate=72, hit=8
    )
    module = random_experts(sizes, **options).requires_grad_(False).to(dtype)
    for parameter in module.parameters():
        parameter.mul_(0.3)
    module.group_of_expert.copy_(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2]))
    x_TD, index_TK, w_TK = random_call(sizes)
    x_TD = x_TD.to(dtype)
    used: list[Any] = []
    usual = triton_path._by_pairs
    monkeypatch.setattr(triton_path, "_by_pairs", lambda *given: used.append(usual(*given)))

    y_TD = triton_forward(module, x_TD, index_TK, w_TK)

    assert len(used) == 1
    expected = naive_forward(module.cpu(), x_TD, index_TK, w_TK)
    assert_close(y_TD.float(), expected, 1e-4 if dtype == torch.float32 else BF16)


def test_the_order_is_by_group_and_expert_and_both_ways_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = Sizes(tokens=50, rank=5, groups=4)
    module = random_experts(sizes, may_be_empty=True).requires_grad_(False)
    call = random_call(sizes)
    by_counting = triton_forward(module, *call)
    monkeypatch.setattr(triton_path, "MOST_COUNTED", 0)
    monkeypatch.setattr(triton_order, "ONE_BY_ONE", 0)

    assert_close(triton_forward(module, *call), by_counting)


def test_the_same_call_gives_the_same_bytes_and_tokens_do_not_see_each_other() -> None:
    sizes = Sizes(tokens=23, rank=3)
    module = random_experts(sizes, scale=True).requires_grad_(False)
    x_TD, index_TK, w_TK = random_call(sizes)
    together = triton_forward(module, x_TD, index_TK, w_TK)

    assert torch.equal(triton_forward(module, x_TD, index_TK, w_TK), together)
    alone = [
        triton_forward(module, x_TD[t : t + 1], index_TK[t : t + 1], w_TK[t : t + 1])
        for t in range(sizes.tokens)
    ]
    assert_close(torch.cat(alone), together)


def test_experts_that_change_groups_are_ordered_anew() -> None:
    sizes = Sizes()
    module = random_experts(sizes).requires_grad_(False)
    call = random_call(sizes)
    triton_forward(module, *call)
    module.group_of_expert.copy_(module.group_of_expert.flip(0))

    y_TD = triton_forward(module, *call)

    assert_close(y_TD, naive_forward(module.cpu(), *call))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda module: setattr(module, "gating", object()), "silu, gelu and gpt-oss"),
        (lambda module: module.bases[0].double(), "weights are torch.float64"),
    ],
)
def test_what_triton_cannot_do_is_refused_if_asked_for_and_done_plainly_if_not(
    change: Any, told: str
) -> None:
    module = random_experts(Sizes()).to(DEVICE)
    change(module)
    call = [tensor.to(DEVICE) for tensor in random_call(Sizes())]

    with pytest.raises(UserError, match=f"MOEFUSE_KERNELS is 'triton', but .*{told}"):
        module(*call)
    kernels.use("auto")
    assert kernels.offered(module, *call) is None


def test_few_groups_are_cut_into_smaller_tiles_and_many_are_not() -> None:
    """Two groups of 96 rows make 22 tiles of 128 rows, where a GPU has room for a hundred."""
    rows = [tiles_for(192, groups, 1408, torch.bfloat16).rows for groups in (1, 2)]
    assert rows == [64, 64]
    assert tiles_for(768, 8, 1408, torch.bfloat16).rows == 128
    assert tiles_for(192, 8, 1408, torch.bfloat16).rows == 32


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(UserError, match="MOEFUSE_KERNELS is 'fast'; choose from auto, triton"):
        kernels.use("fast")


def offered_by(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Look for kernels where a package called ``name`` offers them."""
    entry = EntryPoint("some", f"{name}.missing:way", "moefuse.kernels")
    monkeypatch.setattr(modeling_moefuse, "entry_points", lambda **_: [entry])
    return modeling_moefuse.installed_kernels.__wrapped__()


def test_a_package_that_is_not_there_offers_nothing_and_a_broken_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_offer").mkdir()
    (tmp_path / "broken_offer" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    assert offered_by("absent_offer", monkeypatch) is None
    with pytest.raises(ModuleNotFoundError, match=r"broken_offer\.missing"):
        offered_by("broken_offer", monkeypatch)
