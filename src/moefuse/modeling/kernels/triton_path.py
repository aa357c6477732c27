"""The fused experts by Triton: a few kernels, no copy of the weights, no wait for the host.

A CUDA graph captures them after one call outside the capture. Gradients are those of the plain
way, computed anew.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moefuse.modeling.kernels import repeating, triton_coded_path
from moefuse.modeling.kernels import triton_kernels as kernels
from moefuse.modeling.kernels.gatings import number_of
from moefuse.modeling.kernels.launching import launch, temporary
from moefuse.modeling.kernels.tiles import Product, Tiles, tiles_for
from moefuse.modeling.kernels.triton_order import (
    MOST_COUNTED,
    Places,
    Rows,
    filled,
    one_by_one,
    ordered,
    places_of,
    row_of_rank,
    sorted_rows,
    table,
)
from moefuse.modeling.kernels.triton_pairs import PairLayer, pairs_of, pays
from moefuse.modeling.kernels.weights import obstacle_of_weights, weights_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def _addresses(weights: list[Tensor]) -> Tensor:
    return table(tuple(weight.data_ptr() for weight in weights), weights[0].device)


@dataclass(frozen=True)
class _Layer:
    """One call: what all of its kernels share."""

    index_TK: Tensor
    weight_TK: Tensor
    places: Places
    tiles: Tiles
    precision: str

    @property
    def rows(self) -> int:
        return self.index_TK.numel()

    @property
    def experts(self) -> int:
        return len(self.places.expert)

    @property
    def groups(self) -> int:
        return len(self.places.first) - 1

    def inner(
        self, source: Tensor, a_ERI: Tensor, rows: Rows, *, shared_by: int | None, into: Tensor
    ) -> None:
        """Write ``A_e x`` of all rows into ``into`` (N, R), by tiles of an expert's rows.

        ``source`` has a row for every ``shared_by`` rows as they are numbered, or, with None, one
        for each in their order.
        """
        _, rank, width = a_ERI.shape
        tiles = self.tiles
        launch(
            kernels.inner_rows,
            (triton.cdiv(self.rows, tiles.inner_rows) + min(self.experts, self.rows),),
            source, a_ERI, rows.order, rows.start, self.places.every, self.places.expert, into,
            self.experts, width, shared_by or 1,
            RANK=rank, FILLED=filled(rank, 16), NUMBERED=shared_by is not None,
            ROWS=tiles.inner_rows,
            CHUNK=tiles.inner_chunk, PARTS=filled(self.experts), PRECISION=self.precision,
        )  # fmt: skip

    def inner_by_row(self, z_NF: Tensor, a_ERF: Tensor, rows: Rows, into: Tensor) -> None:
        """Do the same for ordered rows, one by one."""
        _, rank, width = a_ERF.shape
        launch(
            kernels.inner_by_row,
            (self.rows,),
            z_NF, a_ERF, rows.order, self.index_TK, into, width,
            RANK=rank, **row_of_rank(rank, self.rows),
        )  # fmt: skip

    def product(
        self, kernel: Any, tile: Product, width: int, rows: Rows, source: Tensor,
        bases: list[Tensor], *arguments: Any, rank: int, even: bool, **constants: Any,
    ) -> None:  # fmt: skip
        """Launch one of the two grouped products, ``width`` columns wide."""
        height = self.tiles.rows
        row_tiles = triton.cdiv(self.rows, height) + min(self.groups, self.rows)
        launch(
            kernel,
            (triton.cdiv(width, tile.columns), row_tiles),
            source, _addresses(bases), rows.order, rows.start, self.places.first, self.index_TK,
            self.places.of_expert, self.places.expert, self.weight_TK, *arguments,
            **constants, RANK=rank, LANES=self.places.lanes(rank), ROWS=height,
            COLUMNS=tile.columns, CHUNK=tile.chunk, PARTS=filled(self.groups), EVEN=even,
            PRECISION=self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def fused_experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    group_of_expert: Tensor,
    deltas: list[Tensor],
    extras: tuple[Tensor | None, Tensor | None, Tensor | None],
    gating: tuple[int, float, float],
) -> Tensor:
    """Return the fused experts' output, (T, D) in the dtype of ``x_TD``.

    ``gate_up`` and ``down`` are the G bases' weights, (2F, D) and (D, F); ``deltas`` none, or
    ``gate_up_a``, ``gate_up_b``, ``down_a`` and ``down_b`` as in ``LowRankDelta``; ``extras`` scale
    and bias (E, 2F) and down bias (E, D). All of one dtype, contiguous, on one device. ``gating``
    is the kernels' number of it, alpha and limit.
    """
    tokens, top_k = index_TK.shape
    number, intermediate = tokens * top_k, down[0].shape[1]
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    if number == 0:
        return out_TD
    layer = _Layer(
        index_TK.contiguous(),
        weight_TK.contiguous(),
        places_of(group_of_expert, len(down)),
        tiles_for(number, len(down), intermediate, x_TD.dtype),
        "ieee" if x_TD.dtype == torch.float32 else "tf32",
    )
    factors = dict(zip(FACTORS, deltas, strict=True)) if deltas else {}
    weights = _Weights(gate_up, down, group_of_expert, gating, *extras, **factors)
    x_TD = x_TD.contiguous()
    rows, inner_NR = _ordered(layer, weights, x_TD)
    down_shape = (weights.down_rank, intermediate)
    by_pairs = pays(tokens, top_k, layer.groups, layer.places.largest, down_shape)
    way = _by_pairs if by_pairs else _by_rows
    way(layer, weights, rows, x_TD, inner_NR, out_TD)
    return out_TD


@dataclass(frozen=True)
class _Weights:
    """All weights of a layer, as in ``fused_experts``."""

    gate_up: list[Tensor]
    down: list[Tensor]
    group_of_expert: Tensor
    gating: tuple[int, float, float]
    scale: Tensor | None
    bias: Tensor | None
    down_bias: Tensor | None
    gate_up_a: Tensor | None = None
    gate_up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.gate_up_a is None else self.gate_up_a.shape[1]

    @property
    def down_rank(self) -> int:
        return 0 if self.down_a is None else self.down_a.shape[1]


def _ordered(layer: _Layer, weights: _Weights, x_TD: Tensor) -> tuple[Rows, Tensor | None]:
    """Order the rows; return what the first factors of gate and up make of them, (N, R), too."""
    a_ERD, rank = weights.gate_up_a, weights.rank
    few = one_by_one(layer.rows, rank)
    inner_NR = temporary(x_TD, layer.rows, rank) if rank else None
    if layer.rows <= MOST_COUNTED:
        rows = ordered(layer.index_TK, layer.places, x_TD, a_ERD if few else None, inner_NR)
    else:
        rows = sorted_rows(layer.index_TK, layer.places)
    if a_ERD is not None and inner_NR is not None and not few:
        layer.inner(x_TD, a_ERD, rows, shared_by=layer.index_TK.shape[1], into=inner_NR)
    return rows, inner_NR


def _by_rows(
    layer: _Layer, weights: _Weights, rows: Rows, x_TD: Tensor, inner_NR: Tensor | None,
    into: Tensor,
) -> None:  # fmt: skip
    """Write the fused experts' output into ``into`` (T, D), every row multiplied by its base."""
    tokens, top_k = layer.index_TK.shape
    hidden, intermediate = weights.down[0].shape
    scale, bias, gating = weights.scale, weights.bias, weights.gating
    z_NF = temporary(x_TD, layer.rows, intermediate)
    tile = layer.tiles.gate_up
    layer.product(
        kernels.gate_up, tile, intermediate, rows, x_TD, weights.gate_up,
        scale, bias, inner_NR, weights.gate_up_b, z_NF,
        layer.groups, hidden, intermediate, top_k, *gating[1:],
        rank=weights.rank, even=hidden % tile.chunk == 0 and intermediate % tile.columns == 0,
        SCALE=scale is not None, BIAS=bias is not None, GATING=gating[0],
    )  # fmt: skip

    if weights.down_a is not None:
        inner_NR = temporary(x_TD, layer.rows, weights.down_rank)
        if one_by_one(layer.rows, weights.down_rank):
            layer.inner_by_row(z_NF, weights.down_a, rows, inner_NR)
        else:
            layer.inner(z_NF, weights.down_a, rows, shared_by=None, into=inner_NR)
    y_ND = temporary(x_TD, layer.rows, hidden)
    tile = layer.tiles.down
    layer.product(
        kernels.down, tile, hidden, rows, z_NF, weights.down,
        weights.down_bias, inner_NR, weights.down_b, y_ND,
        layer.groups, hidden, intermediate,
        rank=weights.down_rank,
        even=intermediate % tile.chunk == 0 and hidden % tile.columns == 0,
        BIAS=weights.down_bias is not None,
    )  # fmt: skip
    columns = min(1024, filled(hidden))
    launch(
        kernels.sum_slots, (tokens, triton.cdiv(hidden, columns)),
        y_ND, into, hidden, top_k, COLUMNS=columns,
    )  # fmt: skip


def _by_pairs(
    layer: _Layer, weights: _Weights, rows: Rows, x_TD: Tensor, inner_NR: Tensor | None,
    into: Tensor,
) -> None:  # fmt: skip
    """Write the same, every (token, group) pair multiplied by its base."""
    group_of_expert, down_a = weights.group_of_expert, weights.down_a
    by_pairs = PairLayer(
        layer.index_TK, layer.weight_TK, group_of_expert, layer.places, layer.precision
    )
    pairs = pairs_of(layer.index_TK, group_of_expert, layer.groups)
    columns = len(weights.gate_up[0])
    base_PH = by_pairs.product(x_TD, pairs.token, pairs, _addresses(weights.gate_up), columns)
    extras = (weights.scale, weights.bias)
    b_EHR = weights.gate_up_b
    z_NF = by_pairs.neurons(base_PH, pairs, rows, inner_NR, b_EHR, extras, weights.gating)
    made_NR = None
    if down_a is not None:
        made_NR = temporary(x_TD, layer.rows, weights.down_rank)
        layer.inner(z_NF, down_a, rows, shared_by=1, into=made_NR)
    row_P, made_PW = by_pairs.members(z_NF, made_NR, pairs)
    deltas = None if made_PW is None or weights.down_b is None else (made_PW, weights.down_b)
    columns = len(weights.down[0])
    y_PD = by_pairs.product(z_NF, row_P, pairs, _addresses(weights.down), columns, deltas)
    by_pairs.sums(y_PD, pairs, weights.down_bias, into)


def obstacle(module: Any, x_TD: Tensor) -> str | None:
    """Say what of ``module`` or ``x_TD`` (T, D) the kernels cannot compute, or None."""
    found = None
    if x_TD.dtype not in DTYPES:
        found = f"they compute float32, bfloat16 and float16, not {x_TD.dtype}"
    elif torch.is_autocast_enabled(x_TD.device.type):
        found = "autocast is on"
    elif number_of(module.gating) is None:
        found = "they know silu, gelu and gpt-oss's gating alone"
    elif _has_neurons(module):
        found = triton_coded_path.obstacle(module)
    elif module.delta is not None and type(module.delta).__name__ != "LowRankDelta":
        found = "they know low-rank deltas alone"
    found = found or obstacle_of_weights(module, x_TD)
    if found is None and not all(weight.is_contiguous() for weight in weights_of(module)):
        found = "a weight does not lie in one piece"
    return found


def _has_neurons(module: Any) -> bool:
    return type(module).__name__ == "NeuronExperts"


def _computed(module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    gating = number_of(module.gating)
    assert gating is not None
    if _has_neurons(module):
        with torch.cuda.device_of(x_TD):
            return triton_coded_path.neuron_experts(module, x_TD, index_TK, weight_TK, gating)
    delta = module.delta
    # Triton launches on the current device, which need not be the weights'.
    with torch.cuda.device_of(x_TD):
        return fused_experts(
            x_TD,
            index_TK,
            weight_TK,
            [base.gate_up_proj.weight for base in module.bases],
            [base.down_proj.weight for base in module.bases],
            module.group_of_expert,
            [] if delta is None else [getattr(delta, name) for name in FACTORS],
            (module.scale, module.bias, module.down_bias),
            gating,
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
            if not y_TD.requires_grad:  # neuron experts without a neuron
                return (None,) * len(ctx.needs_input_grad)
            found = iter(torch.autograd.grad(y_TD, asked, towards_TD, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


def forward(
    module: Any, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, with_gradients: bool
) -> Tensor:
    """Return the output of ``module``, (T, D), for which there is no ``obstacle``."""
    if with_gradients:
        weights = module.parameters()
        return _WithGradients.apply(module, index_TK, x_TD, weight_TK, *weights)  # type: ignore[return-value]
    return repeating.computed(module, (x_TD, index_TK, weight_TK), _computed)
