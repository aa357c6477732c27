"""Experts of own and shared neurons, coded or plain, by Triton: codes are read, never unpacked.

Four launches (a fifth where a code stands for 5, 6 or 7 numbers), none of which waits for the host.
What depends on how many neurons each expert has is computed at the first call and remembered.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moefuse.modeling.kernels import triton_coded_kernels as kernels
from moefuse.modeling.kernels.launching import launch, temporary
from moefuse.modeling.kernels.tiles import MOST_SPLITS, CodedTiles, coded_tiles_for
from moefuse.modeling.kernels.triton_order import (
    MOST_COUNTED,
    Places,
    filled,
    ordered,
    sorted_rows,
    table,
)

ALIGNED = 16
"""Bytes that the addresses of all weights are a multiple of."""
Kind = tuple[int, int, int, int]
"""Numbers V of a code, V filled up, bits of a code (0: plain numbers) and bytes of a row."""


@dataclass(frozen=True)
class Plan:
    """Where the experts' neurons lie: ``spans`` (parts, kinds, 3) int32 as the kernels read it, the
    experts in their own order, and the ``blocks`` of the part that has most."""

    spans: Tensor
    places: Places
    blocks: int


_plans: Any = WeakIdKeyDictionary()


def plan_of(widths: Tensor, used: tuple[int, ...], shared: int, block: int) -> Plan:
    """Lay out blocks of ``block`` neurons: those of ``widths`` (all kinds, E) in the rows ``used``,
    and ``shared`` shared ones.

    Remembered until ``widths`` changes; reading it waits for the host.
    """
    version = 0 if widths.is_inference() else widths._version
    known = _plans.get(widths)
    if known is None or known[0] != version:
        known = _plans[widths] = (version, {})
    key = (used, shared, block)
    if key not in known[1]:
        known[1][key] = _laid_out(widths[list(used)], shared, block)
    return known[1][key]


def _laid_out(widths: Tensor, shared: int, block: int) -> Plan:
    experts = widths.shape[1]
    count_EW = widths.cpu().int().T
    begin_EW = count_EW.cumsum(0) - count_EW
    if shared:
        # One part more, and one kind more, which it alone has neurons of.
        count_EW = torch.nn.functional.pad(count_EW, (0, 1, 0, 1))
        begin_EW = torch.nn.functional.pad(begin_EW, (0, 1, 0, 1))
        count_EW[-1, -1] = shared
    blocks_EW = (count_EW + block - 1) // block
    until_EW = blocks_EW.cumsum(1)
    spans = torch.stack([begin_EW, count_EW, until_EW - blocks_EW], -1).int()
    every = torch.arange(experts + 1, dtype=torch.int32, device=widths.device)
    small = torch.uint8 if experts <= 256 else torch.int32
    first, sortable = every[:: max(experts, 1)], every[:-1].to(small)
    places = Places(every[:-1], every[:-1], first, every, sortable, experts)
    most = int(until_EW[:, -1].max()) if until_EW.numel() else 0
    return Plan(spans.to(widths.device), places, most)


@dataclass(frozen=True)
class _Neurons:
    """The kinds of a layer's neurons as the kernels know them.

    ``kinds`` what is known when a kernel is compiled, ``used`` the rows of ``widths`` that the own
    ones are, ``gain`` that of the gains, ``addresses`` the table of (kinds + 1, 5) int64.
    """

    kinds: tuple[Kind, ...]
    used: tuple[int, ...]
    gain: Kind | None
    addresses: Tensor

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """What the columns of codes are: (1, 1) or, where codes are filled up, V and that."""
        of_kind = [(v, full) if v != full else (1, 1) for v, full, _, _ in self.kinds]
        return tuple(dict.fromkeys(of_kind))


def _neurons_of(module: Any, device: torch.device) -> _Neurons:
    # A kind that no neuron is of is left out: kernels are compiled for the others.
    used = tuple(number for number, rows in enumerate(module.own.values()) if _count(rows))
    own = [list(module.own.items())[number] for number in used]
    rows_of = [rows for _, rows in own]
    biases = [None if module.own_bias is None else module.own_bias[name] for name, _ in own]
    gains: list[Any] = []
    if module.shared is not None:
        rows_of.append(module.shared)
        biases.append(module.shared_bias)
        gains.append(module.gain)
    numbers: list[int] = []
    for rows, bias in zip([*rows_of, *gains], [*biases, *(None for _ in gains)], strict=True):
        numbers += [*_addresses(rows), 0 if bias is None else bias.weight.data_ptr(), _count(rows)]
    return _Neurons(
        tuple(_kind(rows) for rows in rows_of),
        used,
        _kind(gains[0]) if gains else None,
        table(tuple(numbers), device),
    )


def _is_coded(rows: Any) -> bool:
    # By name, because the classes of a checkpoint's own file are not moefuse's.
    return type(rows).__name__ == "CodedRows"


def _count(rows: Any) -> int:
    return rows.codes.shape[1] if _is_coded(rows) else rows.shape[1]


def _kind(rows: Any) -> Kind:
    if not _is_coded(rows):
        return 1, 1, 0, 0
    return rows.vector, filled(rows.vector), rows.code_bits, rows.codes.shape[2]


def _addresses(rows: Any) -> tuple[int, int, int]:
    if not _is_coded(rows):
        return rows.weight.data_ptr(), 0, 0
    return rows.codes.data_ptr(), rows.codebook.data_ptr(), rows.scale.data_ptr()


def obstacle(module: Any) -> str | None:
    """Say what of the rows of ``module`` the kernels cannot read, or None."""
    groups = [module.own, module.own_bias]
    every = [rows for group in groups if group is not None for rows in group.values()]
    every += [module.shared, module.gain, module.shared_bias]
    for rows in every:
        if rows is not None and type(rows).__name__ not in ("CodedRows", "PlainRows"):
            return f"rows are {type(rows).__name__}, neither CodedRows nor PlainRows"
    tensors = [*module.parameters(), *module.buffers()]
    if any(not tensor.is_contiguous() or tensor.data_ptr() % ALIGNED for tensor in tensors):
        return f"a weight does not lie in one piece at a multiple of {ALIGNED} bytes"
    return None


def neuron_experts(
    module: Any,
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gating: tuple[int, float, float],
) -> Tensor:
    """Return the output of a ``NeuronExperts`` without an ``obstacle``, (T, D) in ``x_TD``'s dtype.

    ``gating`` is the kernels' number of it, alpha and limit.
    """
    out_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    if not x_TD.numel():
        return out_TD
    x_TD, index_TK, weight_TK = x_TD.contiguous(), index_TK.contiguous(), weight_TK.contiguous()
    neurons = _neurons_of(module, x_TD.device)
    tiles = coded_tiles_for(index_TK.numel(), module.num_experts, x_TD.dtype)
    shared = 0 if module.shared is None else _count(module.shared)
    pieces_PND, pieces = None, 0
    if neurons.kinds:
        plan = plan_of(module.widths, neurons.used, shared, tiles.neurons)
        call = _Call(x_TD, index_TK, weight_TK, neurons, plan, tiles, module.num_experts)
        pieces_PND = call.down(call.values(gating, biased=module.down_bias is not None))
        pieces = len(pieces_PND)
    _summed(pieces_PND, pieces, index_TK, weight_TK, module.down_bias, shared > 0, out_TD)
    return out_TD


def _summed(
    pieces_PND: Tensor | None,
    pieces: int,
    index_TK: Tensor,
    weight_TK: Tensor,
    bias_ED: Tensor | None,
    shared: bool,
    out_TD: Tensor,
) -> None:
    tokens, top_k = index_TK.shape
    width = out_TD.shape[1]
    columns = min(128 if tokens <= 64 else 512, filled(width))
    launch(
        kernels.sum_pieces, (tokens, triton.cdiv(width, columns)),
        pieces_PND, index_TK, weight_TK, bias_ED, out_TD,
        tokens * top_k, tokens * (top_k + shared), top_k,
        WIDTH=width, PIECES=pieces, SHARED=shared, BIAS=bias_ED is not None,
        SLOTS=filled(top_k + shared), COLUMNS=columns,
    )  # fmt: skip


class _Call:
    """One call: what its two products share."""

    def __init__(
        self,
        x_TD: Tensor,
        index_TK: Tensor,
        weight_TK: Tensor,
        neurons: _Neurons,
        plan: Plan,
        tiles: CodedTiles,
        experts: int,
    ) -> None:
        self.x_TD, self.index_TK, self.weight_TK = x_TD, index_TK, weight_TK
        self.neurons, self.plan, self.tiles, self.experts = neurons, plan, tiles, experts
        self.tokens, self.top_k = index_TK.shape
        self.number = index_TK.numel()
        shared_rows = self.tokens if neurons.gain else 0
        self.all_rows = self.number + shared_rows
        self.own_tiles = triton.cdiv(self.number, tiles.rows) + min(experts, self.number)
        self.row_tiles = self.own_tiles + triton.cdiv(shared_rows, tiles.rows)
        self.z_width = plan.blocks * tiles.neurons
        counted = self.number <= MOST_COUNTED
        self.rows = (
            ordered(index_TK, plan.places, x_TD) if counted else sorted_rows(index_TK, plan.places)
        )
        self.piece_dtype = torch.float32 if counted else x_TD.dtype
        self.tables = self._filled_codebooks()

    @property
    def common(self) -> dict[str, Any]:
        """What both products are compiled for."""
        return {
            "KINDS": self.neurons.kinds,
            "WIDTH": self.x_TD.shape[1],
            "ROWS": self.tiles.rows,
            "NEURONS": self.tiles.neurons,
            "PARTS": filled(self.experts),
            "PRECISION": "ieee" if self.x_TD.dtype == torch.float32 else "tf32",
        }

    def _filled_codebooks(self) -> Tensor:
        """Return the codebooks that are to be filled up, or, if none is, anything of the dtype."""
        kinds = self.neurons.kinds
        if all(vector == full for vector, full, _, _ in kinds):
            return self.x_TD
        size = len(kinds) * kernels.ENTRIES.value * kernels.WIDEST.value
        tables = temporary(self.x_TD, size)
        launch(kernels.fill_codebooks, (len(kinds),), self.neurons.addresses, tables, KINDS=kinds)
        return tables

    def values(self, gating: tuple[int, float, float], *, biased: bool) -> Tensor:
        """Return the weighted values of all rows' neurons, (rows, blocks * neurons), in order."""
        z_NO = temporary(self.x_TD, self.all_rows, self.z_width)
        tiles = self.tiles
        launch(
            kernels.neurons, (self.plan.blocks, self.row_tiles),
            self.x_TD, self.rows.order, self.rows.start, self.plan.places.every, self.index_TK,
            self.weight_TK, self.plan.spans, self.neurons.addresses, self.tables, z_NO,
            self.experts, self.number, self.tokens, self.top_k, self.own_tiles, self.z_width,
            *gating[1:],
            GAIN=self.neurons.gain, BIAS=biased, GATING=gating[0], CHUNK=tiles.chunk,
            num_warps=tiles.warps, num_stages=tiles.stages, **self.common,
        )  # fmt: skip
        return z_NO

    def down(self, z_NO: Tensor) -> Tensor:
        """Return what is to be summed of all rows, (pieces, rows, D), as the rows are numbered."""
        width, tiles, steps = self.x_TD.shape[1], self.tiles, self.neurons.steps
        columns = max(
            triton.cdiv(triton.cdiv(width, step), tiles.columns // full) for step, full in steps
        )
        busy = columns * min(self.experts, self.number)
        splits = min(
            filled(triton.cdiv(tiles.programs, busy)), MOST_SPLITS, filled(self.plan.blocks)
        )
        pieces = len(steps) * splits
        y_PND = temporary(self.x_TD, pieces, self.all_rows, width, dtype=self.piece_dtype)
        launch(
            kernels.down, (columns * pieces, self.row_tiles),
            z_NO, self.rows.order, self.rows.start, self.plan.places.every, self.plan.spans,
            self.neurons.addresses, self.tables, y_PND,
            self.experts, self.number, self.tokens, self.all_rows, self.own_tiles, self.z_width,
            STEPS=steps, SPLITS=splits, COLUMNS=tiles.columns,
            num_warps=tiles.down_warps, num_stages=tiles.down_stages, **self.common,
        )  # fmt: skip
        return y_PND
