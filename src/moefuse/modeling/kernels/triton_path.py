"""The fused experts by Triton: six kernels, no copy of the weights, no wait for the host.

A CUDA graph captures them after one call outside the capture. Gradients are those of the plain
way, computed anew.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moefuse.modeling.kernels import triton_kernels as kernels
from moefuse.modeling.kernels.tiles import Product, tiles_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILU, GELU, CLAMPED = 0, 1, 2
"""Gatings as the kernels number them."""
MOST_COUNTED = 4096
"""Up to how many rows one kernel orders by counting; more are sorted."""


@dataclass(frozen=True)
class Places:
    """The experts numbered so that a group's members are neighbours.

    ``of_expert`` and ``expert`` (E) int32, each the other's inverse; ``first`` (G + 1) int32, the
    place of each group's first member; ``every`` (E + 1) int32, all places.
    """

    of_expert: Tensor
    expert: Tensor
    first: Tensor
    every: Tensor


_places: Any = WeakIdKeyDictionary()


def places_of(group_of_expert: Tensor, groups: int) -> Places:
    """Number the experts of ``group_of_expert`` (E); remembered until that tensor changes."""
    known = _places.get(group_of_expert)
    if known is not None and known[0] == group_of_expert._version:
        return known[1]
    group_E, expert = group_of_expert.sort(stable=True)
    every = torch.arange(len(expert) + 1, device=expert.device, dtype=torch.int32)
    first = torch.searchsorted(group_E, torch.arange(groups + 1, device=expert.device))
    of_expert = torch.empty_like(every[:-1]).scatter_(0, expert, every[:-1])
    found = Places(of_expert, expert.int(), first.int(), every)
    _places[group_of_expert] = (group_of_expert._version, found)
    return found


@lru_cache(4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def _addresses(weights: list[Tensor]) -> Tensor:
    return _table(tuple(weight.data_ptr() for weight in weights), weights[0].device)


@dataclass(frozen=True)
class Rows:
    """Rows in their order: ``order`` (N) int32, and ``start`` (E + 1) int32 by place."""

    order: Tensor
    start: Tensor


def order_rows(index_TK: Tensor, places: Places) -> Rows:
    """Order the rows of ``index_TK`` by their expert's place, equal ones by their number."""
    index_N = index_TK.reshape(-1)
    rows, experts = len(index_N), len(places.expert)
    if rows > MOST_COUNTED:
        place_N, order = places.of_expert[index_N].sort(stable=True)
        return Rows(order.int(), torch.searchsorted(place_N, places.every).int())
    order = torch.empty(rows, dtype=torch.int32, device=index_N.device)
    start = torch.empty(experts + 1, dtype=torch.int32, device=index_N.device)
    block = 16 if rows <= 512 else 64
    grid = (triton.cdiv(rows, block) + triton.cdiv(experts + 1, block),)
    kernels.order_rows[grid](
        index_N, places.of_expert, order, start, rows, experts, ROWS=block, CHUNK=128
    )
    return Rows(order, start)


def _filled(number: int, least: int = 1) -> int:
    return max(least, triton.next_power_of_2(number))


def fused_experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    group_of_expert: Tensor,
    deltas: list[Tensor],
    scale: Tensor | None,
    bias: Tensor | None,
    down_bias: Tensor | None,
    gating: int,
    alpha: float,
    limit: float,
) -> Tensor:
    """Return the fused experts' output, (T, D) in the dtype of ``x_TD``.

    ``gate_up`` and ``down`` are the G bases' weights, (2F, D) and (D, F); ``deltas`` none, or
    ``gate_up_a``, ``gate_up_b``, ``down_a`` and ``down_b`` as in ``LowRankDelta``; ``scale`` and
    ``bias`` (E, 2F), ``down_bias`` (E, D). All of one dtype, contiguous, on one device.
    """
    tokens, top_k = index_TK.shape
    hidden, intermediate = down[0].shape
    out_TD = torch.empty_like(x_TD)
    if tokens == 0:
        return out_TD
    x_TD, index_TK, weight_TK = x_TD.contiguous(), index_TK.contiguous(), weight_TK.contiguous()
    places = places_of(group_of_expert, len(down))
    rows = order_rows(index_TK, places)
    number, experts, groups = tokens * top_k, len(places.expert), len(down)
    tiles = tiles_for(number, groups, x_TD.dtype)
    precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
    row_tiles = triton.cdiv(number, tiles.rows) + min(groups, number)
    common = {"ROWS": tiles.rows, "PARTS": _filled(groups), "PRECISION": precision}

    def inner(source: Tensor, a_ERI: Tensor, by_token: bool) -> Tensor:
        _, rank, width = a_ERI.shape
        inner_NR = x_TD.new_empty(number, rank)
        grid = (triton.cdiv(number, tiles.inner_rows) + min(experts, number),)
        kernels.inner_rows[grid](
            source, a_ERI, rows.order, rows.start, places.every, places.expert, inner_NR,
            experts, width, top_k,
            RANK=rank, FILLED=_filled(rank, 16), BY_TOKEN=by_token, ROWS=tiles.inner_rows,
            CHUNK=tiles.inner_chunk, PARTS=_filled(experts), PRECISION=precision,
        )  # fmt: skip
        return inner_NR

    def product(kernel: Any, tile: Product, width: int, *arguments: Any, **constants: Any) -> None:
        grid = (triton.cdiv(width, tile.columns), row_tiles)
        kernel[grid](
            *arguments, **common, **constants, COLUMNS=tile.columns, CHUNK=tile.chunk,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    inner_NR = inner(x_TD, deltas[0], True) if deltas else None
    z_NF = x_TD.new_empty(number, intermediate)
    tile = tiles.gate_up
    product(
        kernels.gate_up, tile, intermediate,
        x_TD, _addresses(gate_up), rows.order, rows.start, places.first, index_TK,
        places.of_expert, places.expert, weight_TK, scale, bias, inner_NR,
        deltas[1] if deltas else None, z_NF,
        groups, hidden, intermediate, top_k, alpha, limit,
        RANK=deltas[0].shape[1] if deltas else 0,
        FILLED=_filled(deltas[0].shape[1], 16) if deltas else 16,
        SCALE=scale is not None, BIAS=bias is not None, GATING=gating,
        EVEN=hidden % tile.chunk == 0 and intermediate % tile.columns == 0,
    )  # fmt: skip
    inner_NR = inner(z_NF, deltas[2], False) if deltas else None
    y_ND = x_TD.new_empty(number, hidden)
    tile = tiles.down
    product(
        kernels.down, tile, hidden,
        z_NF, _addresses(down), rows.order, rows.start, places.first, index_TK,
        places.of_expert, places.expert, weight_TK, down_bias, inner_NR,
        deltas[3] if deltas else None, y_ND,
        groups, hidden, intermediate,
        RANK=deltas[2].shape[1] if deltas else 0,
        FILLED=_filled(deltas[2].shape[1], 16) if deltas else 16,
        BIAS=down_bias is not None,
        EVEN=intermediate % tile.chunk == 0 and hidden % tile.columns == 0,
    )  # fmt: skip
    columns = min(1024, _filled(hidden))
    kernels.sum_slots[(tokens, triton.cdiv(hidden, columns))](
        y_ND, out_TD, hidden, top_k, COLUMNS=columns
    )
    return out_TD


def _gating_of(gating: Any) -> tuple[int, float, float] | None:
    """Return the kernels' number, alpha and limit of a gating that they know."""
    # By name, because the classes of a checkpoint's own file are not moefuse's.
    if type(gating).__name__ == "ClampedGating":
        return CLAMPED, gating.alpha, gating.limit
    activation = getattr(gating, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    number = {"silu": SILU, "SiLU": SILU, "SiLUActivation": SILU, "gelu": GELU, "GELU": GELU}
    exact = getattr(activation, "approximate", "none") == "none"
    return (number[name], 0.0, 0.0) if name in number and exact else None


def obstacle(module: Any, x_TD: Tensor) -> str | None:
    """Say what of ``module`` or ``x_TD`` (T, D) the kernels cannot compute, or None."""
    if x_TD.dtype not in DTYPES:
        return f"they compute float32, bfloat16 and float16, not {x_TD.dtype}"
    if torch.is_autocast_enabled(x_TD.device.type):
        return "autocast is on"
    if _gating_of(module.gating) is None:
        return "they know silu, gelu and gpt-oss's gating alone"
    if module.delta is not None and type(module.delta).__name__ != "LowRankDelta":
        return "they know low-rank deltas alone"
    for base in module.bases:
        for linear in (base.gate_up_proj, base.down_proj):
            if type(linear) is not torch.nn.Linear:
                return f"a base is a {type(linear).__name__}, not a plain nn.Linear"
    for parameter in module.parameters():
        if parameter.dtype != x_TD.dtype or parameter.device != x_TD.device:
            return f"weights are {parameter.dtype} on {parameter.device}, the input is not"
        if not parameter.is_contiguous():
            return "a weight does not lie in one piece"
    return None


def _computed(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    gating = _gating_of(module.gating)
    assert gating is not None
    delta = module.delta
    factors = ("gate_up_a", "gate_up_b", "down_a", "down_b")
    return fused_experts(
        x_TD,
        index_TK,
        weight_TK,
        [base.gate_up_proj.weight for base in module.bases],
        [base.down_proj.weight for base in module.bases],
        module.group_of_expert,
        [] if delta is None else [getattr(delta, name) for name in factors],
        module.scale,
        module.bias,
        module.down_bias,
        *gating,
    )


class _PlainWay(torch.nn.Module):
    """A fused module that is computed plainly, for ``functional_call``."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *call: Tensor) -> Tensor:
        return self.module.plain_compute(*call)


class _WithGradients(torch.autograd.Function):
    """The kernels' output with the gradients of the plain way, computed anew."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, module: Any, index_TK: Tensor, x_TD: Tensor, weight_TK: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(index_TK, x_TD, weight_TK, *weights)
        return _computed(module, x_TD, index_TK, weight_TK)

    @staticmethod
    def backward(ctx: Any, towards_TD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        index_TK, *given = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(want)
                for tensor, want in zip(given, wanted, strict=True)
            ]
            x_TD, weight_TK, *weights = leaves
            names = [f"module.{name}" for name, _ in ctx.module.named_parameters()]
            y_TD = torch.func.functional_call(
                _PlainWay(ctx.module),
                dict(zip(names, weights, strict=True)),
                (x_TD, index_TK, weight_TK),
            )
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(y_TD, asked, towards_TD, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


def forward(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the output of ``module``, (T, D), for which there is no ``obstacle``."""
    weights = list(module.parameters())
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, weight_TK, *weights)):
        return _WithGradients.apply(module, index_TK, x_TD, weight_TK, *weights)  # type: ignore[return-value]
    return _computed(module, x_TD, index_TK, weight_TK)
