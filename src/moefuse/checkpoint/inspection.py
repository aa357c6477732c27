"""What a checkpoint is made of, and what fusing it would cost, from its headers alone.

Parameters are counted as Transformers loads them: the scales of a quantised checkpoint are bytes
but no parameters, and layers beyond ``num_hidden_layers`` (multi-token prediction) are listed and
not added. *Active* means all weights but the experts a token did not choose, embeddings included,
which is how most model cards count.

A fused layer stores G base experts of 3 D F numbers and, at rank R, two low-rank pairs for each of
its E original experts: R x D and 2F x R for the stacked gate and up, R x F and D x R for down.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from moefuse.checkpoint.formats import format_of, quantization_method
from moefuse.checkpoint.headers import CheckpointHeaders, read_headers
from moefuse.checkpoint.promises import check_experts
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.families import Family, MoeShape, family_of
from moefuse.families.base import optional

GROUPS = (32, 16, 8, 4, 2, 1)
RANKS = (0, 8, 32, 128)
BF16_BYTES = 2

EMBEDDINGS = "embeddings"
ATTENTION = "attention"
DENSE = "dense MLP"
ROUTED = "routed experts"
SHARED = "shared experts"
ROUTERS = "routers"
OTHER = "norms and other"
UNUSED = "multi-token prediction (not loaded)"
PARTS = (EMBEDDINGS, ATTENTION, DENSE, ROUTED, SHARED, ROUTERS, OTHER, UNUSED)

_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "weight_scale_2")


@dataclass(frozen=True)
class Part:
    """How much one kind of weight takes."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """The size of the whole model fused to ``groups`` experts with deltas of ``rank``."""

    groups: int
    rank: int
    parameters: int
    bytes: int
    """In bfloat16."""


@dataclass(frozen=True)
class Inspection:
    """Everything that ``moefuse inspect`` shows."""

    source: str
    family: str
    layers: int
    moe_layers: int
    dense_layers: int
    experts: int
    top_k: int
    shared_experts: int
    hidden: int
    intermediate: int
    parts: tuple[Part, ...]
    parameters: int
    active_parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Bytes stored in each dtype, the largest first."""
    quantization: str | None
    quantized_bits: float | None
    """Stored bits of a quantised number, scales included; None where none is, or not known how."""
    context: int | None
    """Longest input in tokens."""
    rope: str | None
    """How positions are stretched beyond the pretraining length."""
    costs: tuple[Cost, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values under the names of the fields."""
        return asdict(self)


def inspect_checkpoint(source: str | Path, *, revision: str | None = None) -> Inspection:
    """Inspect a local directory or a hub id without reading any weights.

    Raises ``UserError`` when it is no whole checkpoint of a known Mixture-of-Experts family.
    """
    headers = read_headers(source, revision=revision)
    config = headers.config
    family = family_of(config)
    shape = family.shape(config)
    if quantization_method(config) is None or format_of(config) is not None:
        check_experts(headers, family, shape)
    parts = _parts(headers, family, shape)
    loaded = [part for part in parts if part.name != UNUSED]
    routed = len(shape.layers) * shape.layer_numbers
    total = sum(part.parameters for part in loaded)
    layers = family.layer_count(config)
    return Inspection(
        source=headers.source,
        family=family.model_type,
        layers=layers,
        moe_layers=len(shape.layers),
        dense_layers=layers - len(shape.layers),
        experts=shape.experts,
        top_k=shape.top_k,
        shared_experts=shape.shared_experts,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        parts=parts,
        parameters=total,
        active_parameters=total - routed + routed * shape.top_k // shape.experts,
        bytes=sum(part.bytes for part in loaded),
        dtypes=_bytes_by_dtype(headers),
        quantization=quantization_method(config),
        quantized_bits=_quantized_bits(headers),
        context=optional(config, "max_position_embeddings", 0) or None,
        rope=_rope(config),
        costs=fusion_costs(total - routed, shape),
    )


def fusion_costs(outside: int, shape: MoeShape) -> tuple[Cost, ...]:
    """Return what each number of groups and each rank would cost.

    ``outside`` counts the parameters that are not in routed experts. Groups that are not fewer
    than the experts, and ranks that are not below the matrices' own, are left out.
    """
    ranks = [rank for rank in RANKS if rank < min(shape.hidden, shape.intermediate)]
    return tuple(
        Cost(groups, rank, size, size * BF16_BYTES)
        for groups in GROUPS
        if groups < shape.experts
        for rank in ranks
        for size in [outside + fused_parameters(shape, groups, rank)]
    )


def fused_parameters(shape: MoeShape, groups: int, rank: int) -> int:
    """Return the parameters of all layers' fused experts, deltas included."""
    matrices = 3 * shape.hidden * shape.intermediate
    base = groups * matrices
    deltas = shape.experts * rank * (2 * shape.hidden + 3 * shape.intermediate)
    biases = shape.experts * (shape.expert_numbers - matrices)
    return len(shape.layers) * (base + deltas + biases)


def _parts(headers: CheckpointHeaders, family: Family, shape: MoeShape) -> tuple[Part, ...]:
    parameters: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    layers = family.layer_count(headers.config)
    sparse = frozenset(shape.layers)
    for tensor in headers.tensors.values():
        part = _part_of(tensor.name, family, layers, sparse)
        stored[part] += tensor.stored_bytes
        parameters[part] += _parameters(tensor)
    # Packed formats hide the count; the sizes that the configuration promises do not.
    parameters[ROUTED] = len(shape.layers) * shape.layer_numbers
    return tuple(Part(name, parameters[name], stored[name]) for name in PARTS if stored[name])


def _parameters(tensor: TensorInfo) -> int:
    return 0 if tensor.name.rpartition(".")[2] in _SCALES else tensor.numel


def _part_of(name: str, family: Family, layers: int, sparse: frozenset[int]) -> str:
    layer = family.layer_of(name)
    if name.startswith(family.unused) or (layer is not None and layer >= layers):
        return UNUSED
    if layer is None:
        return EMBEDDINGS if "embed" in name or "lm_head" in name else OTHER
    inside = family.module_name(name).removeprefix(family.layer_prefix(layer))
    if inside.split(".")[0] in family.attention_names:
        return ATTENTION
    if not inside.startswith(family.moe_name + "."):
        return OTHER
    if layer not in sparse:
        return DENSE
    starts = {
        family.experts_name + ".": ROUTED,
        family.shared_prefix: SHARED,
        family.router_name + ".": ROUTERS,
    }
    child = inside.removeprefix(family.moe_name + ".")
    return next((part for start, part in starts.items() if child.startswith(start)), OTHER)


def _quantized_bits(headers: CheckpointHeaders) -> float | None:
    quantised = [tensor for tensor in headers.tensors.values() if tensor.parts]
    numbers = sum(tensor.numel for tensor in quantised)
    return 8 * sum(tensor.stored_bytes for tensor in quantised) / numbers if numbers else None


def _quantization(inspection: Inspection) -> str:
    if inspection.quantization is None:
        return "none"
    bits = inspection.quantized_bits
    told = "not read by moefuse" if bits is None else f"{bits:.2f} bits a number"
    return f"{inspection.quantization}, {told}"


def _bytes_by_dtype(headers: CheckpointHeaders) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for tensor in headers.tensors.values():
        for part in tensor.stored:
            counted[part.dtype] += part.nbytes
    return dict(counted.most_common())


def _rope(config: Mapping[str, Any]) -> str | None:
    """Describe the scaling of positions; Transformers 5 keeps it under ``rope_parameters``."""
    settings = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(settings, Mapping):
        return None
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    told = [str(kind)]
    if "factor" in settings:
        told.append(f"factor {settings['factor']}")
    if "original_max_position_embeddings" in settings:
        told.append(f"from {settings['original_max_position_embeddings']} tokens")
    return ", ".join(told)


def render_inspection(inspection: Inspection) -> Group:
    """Return three tables for a terminal: the model, its parts, and what fusing would cost."""
    return Group(_facts(inspection), "", _part_table(inspection), "", _cost_table(inspection))


def _facts(inspection: Inspection) -> Table:
    table = Table.grid(padding=(0, 2))
    dtypes = (f"{dtype} {_bytes(size)}" for dtype, size in inspection.dtypes.items())
    context = "unknown" if inspection.context is None else f"{inspection.context:,} tokens"
    rows = {
        "Checkpoint": escape(inspection.source),
        "Family": inspection.family,
        "Layers": f"{inspection.layers} ({inspection.moe_layers} with experts, "
        f"{inspection.dense_layers} dense)",
        "Experts": f"{inspection.experts} routed, {inspection.top_k} per token, "
        f"{inspection.shared_experts} shared",
        "Widths": f"hidden {inspection.hidden}, expert {inspection.intermediate}",
        "Stored as": ", ".join(dtypes),
        "Quantisation": _quantization(inspection),
        "Context": context + (f" ({inspection.rope})" if inspection.rope else ""),
    }
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _part_table(inspection: Inspection) -> Table:
    table = Table("Part", title="Parameters", title_justify="left")
    table.add_column("Parameters", justify="right")
    table.add_column("Stored", justify="right")
    for part in inspection.parts:
        table.add_row(part.name, _count(part.parameters), _bytes(part.bytes))
    table.add_section()
    table.add_row("total", _count(inspection.parameters), _bytes(inspection.bytes))
    table.add_row("active per token", _count(inspection.active_parameters), "")
    return table


def _cost_table(inspection: Inspection) -> Table:
    ranks = sorted({cost.rank for cost in inspection.costs})
    table = Table("Fused experts", title="Size after fusing (bf16)", title_justify="left")
    for rank in ranks:
        table.add_column("no deltas" if rank == 0 else f"rank {rank}", justify="right")
    told = {
        (cost.groups, cost.rank): f"{_count(cost.parameters)}, {_bytes(cost.bytes)}"
        for cost in inspection.costs
    }
    for groups in sorted({cost.groups for cost in inspection.costs}, reverse=True):
        table.add_row(str(groups), *(told[groups, rank] for rank in ranks))
    return table


def _count(number: int) -> str:
    return _scaled(number, ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")), "")


def _bytes(number: int) -> str:
    return _scaled(number, ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")), "B")


def _scaled(number: int, units: tuple[tuple[int, str], ...], smallest: str) -> str:
    for unit, name in units:
        if number >= unit:
            return f"{number / unit:.3f} {name}"
    return f"{number} {smallest}".rstrip()
