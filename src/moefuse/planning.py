"""``moefuse plan``: what a size costs, from headers alone, and how plans and results are shown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moefuse.checkpoint.headers import read_headers
from moefuse.config import (
    CalibrateConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    SizeConfig,
    build,
)
from moefuse.devices import choose_device, choose_dtype, stored_dtype
from moefuse.families import family_of
from moefuse.fusion.plan import Estimate, describe_teacher, estimate, make_plan, matrix_rate
from moefuse.sizes import Plan


@dataclass(frozen=True)
class Planned:
    """A plan with what carrying it out takes."""

    source: str
    plan: Plan
    estimate: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"source": self.source, **self.plan.to_json(), "estimate": asdict(self.estimate)}


def plan_checkpoint(
    checkpoint: str | Path, values: Mapping[str, Any], *, revision: str | None = None
) -> Planned:
    """Plan a student of ``checkpoint``, a directory or hub id, reading only its headers.

    ``values`` are settings by name (``groups``, ``rank``, ``params``, ``bytes``, ``tokens``, ...).
    Raises ``UserError`` for a size that cannot be had.
    """
    headers = read_headers(checkpoint, revision=revision)
    family = family_of(headers.config)
    teacher = describe_teacher(headers.config, headers.tensors, family)
    plan = make_plan(teacher, build(SizeConfig, values), build(FactorConfig, values))
    compute = build(ComputeConfig, values)
    device = choose_device(compute.device)
    stored = stored_dtype(headers.tensors, family, headers.config)
    dtype = choose_dtype(compute.dtype, stored, device)
    expected = estimate(
        teacher,
        plan,
        build(CalibrateConfig, values),
        build(DistillConfig, values),
        build(FactorConfig, values),
        working_itemsize=torch.empty(0, dtype=dtype).element_size(),
        rate=matrix_rate(device, dtype),
    )
    return Planned(str(checkpoint), plan, expected)


def render_plan(planned: Planned) -> Table:
    """Return a table of what the student will be and what making it takes."""
    plan, expected = planned.plan, planned.estimate
    table = _table(f"Plan for {planned.source}")
    _add_layers(table, plan)
    table.add_row("time, estimated", _duration(expected.seconds))
    table.add_row("disk, student and artifacts", _bytes(expected.disk_bytes))
    table.add_row("peak memory, estimated", _bytes(expected.memory_bytes))
    return table


def render_result(result: Any) -> Table:
    """Return a table of what ``fuse`` made."""
    table = _table(f"Fused: {result.out}")
    _add_layers(table, result.plan)
    for layer, error in result.errors.items():
        values = f"{error['before']:.4f} one-shot, {error['after']:.4f} distilled"
        table.add_row(f"relative error, layer {layer}", values)
    table.add_row("time", _duration(result.seconds))
    table.add_row("peak resident memory", _bytes(result.peak_bytes))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    return table


def _add_layers(table: Table, plan: Plan) -> None:
    for (groups, rank), layers in _runs(plan).items():
        table.add_row(f"layers {layers}", f"{groups} fused experts, deltas of rank {rank}")
    table.add_row("parameters", f"{_count(plan.parameters)} of {_count(plan.teacher_parameters)}")
    table.add_row("active per token, at most", _count(plan.active_parameters))
    table.add_row("bytes", f"{_bytes(plan.bytes)} of {_bytes(plan.teacher_bytes)}")
    table.add_row("bytes of the fused experts", _bytes(plan.expert_bytes))


def _runs(plan: Plan) -> dict[tuple[int, int], str]:
    """Say which layers have which groups and rank, as ranges: ``1-26``."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer, chosen in plan.layers.items():
        found.setdefault((chosen.groups, chosen.rank), []).append(layer)
    return {key: _ranges(layers) for key, layers in found.items()}


def _ranges(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.3f} M"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.3f} GB" if number >= 1e8 else f"{number / 1e6:.3f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
