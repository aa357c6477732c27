"""How long one layer's closed form takes: grouping, alignment and factoring, stage by stage.

The layer has DeepSeek-Coder-V2-Lite's shapes (64 experts, D 2048, F 1408, top-6) and random weights
in bf16: eight families of experts that are alike, their neurons permuted and scaled, so that both
ways of making bases are tried. It becomes 8 fused experts of rank 8. Reading the layer and its
calibration do not count. Leaves ``closed_form-DEVICE.json`` and ``.md`` in ``results/``.

    python benchmarks/closed_form.py                 # some minutes on two cores
    python benchmarks/closed_form.py --device cuda
    python benchmarks/closed_form.py --grouping weight
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moefuse.artifacts import write_json, write_text
from moefuse.config import GROUPINGS, FactorConfig
from moefuse.evaluation.machine import machine_meta
from moefuse.fusion import choose, neurons
from moefuse.fusion import factor as mean
from moefuse.grouping.assign import group_layer
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.modeling_moefuse import PlainGating
from moefuse.sizes import LayerPlan

E, D, F, K = 64, 2048, 1408, 6
FAMILIES, LIKENESS = 8, 0.85
PROFILED: tuple[tuple[ModuleType, str, str], ...] = (
    (choose, "resemblance", "how alike members are"),
    (mean, "align_group", "mean: match neurons"),
    (mean, "factor_matrices", "mean: bases and deltas"),
    (neurons, "importance", "neurons: importance"),
    (neurons, "_bases", "neurons: choose"),
    (neurons, "_fit_all_gains", "neurons: gains"),
    (neurons, "fit_down", "neurons: down projections"),
    (neurons, "_fit_deltas", "neurons: deltas"),
    (choose, "measure", "judge"),
)
TARGETS = {"cpu": 600.0, "cuda": 30.0}


class Profile:
    """Seconds spent in some functions; none of them calls another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block takes, the device's work included, for ``name``."""
        begin = self._now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - begin

    def watch(self) -> None:
        """Count the functions of ``PROFILED`` from now on."""
        for module, function, name in PROFILED:
            setattr(module, function, self._watched(getattr(module, function), name))

    def _watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*given, **named)

        return watched

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def make_experts(device: torch.device, generator: torch.Generator) -> Experts:
    """Make experts that come in families: a common part, their own, and neurons in any order."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    common = [(normal(F, 2 * D), normal(F, D)) for _ in range(FAMILIES)]
    gate_up = torch.empty(E, 2 * F, D, dtype=torch.bfloat16, device=device)
    down = torch.empty(E, D, F, dtype=torch.bfloat16, device=device)
    own = (1 - LIKENESS**2) ** 0.5
    for expert in range(E):
        rows, columns = common[expert % FAMILIES]
        order_F = torch.randperm(F, generator=generator)
        scale_F1 = torch.exp(0.3 * normal(F, 1))
        rows = (LIKENESS * rows + own * normal(F, 2 * D))[order_F] * D**-0.5
        columns = (LIKENESS * columns + own * normal(F, D))[order_F] * F**-0.5
        gate_FD, up_FD = rows.chunk(2, dim=1)
        # Up leans on gate, so that mean outputs are not zero and tell the families apart.
        gate_up[expert] = torch.cat([gate_FD, (gate_FD + up_FD) * 0.5**0.5 * scale_F1])
        down[expert] = (columns / scale_F1).T
    return Experts(gate_up, down, PlainGating(torch.nn.functional.silu))


def make_call(experts: Experts, tokens: int, generator: torch.Generator) -> ExpertsCall:
    """Make what the layer receives and returns, fp32: experts are chosen unequally often."""
    device = experts.down_EDF.device
    x_TD = torch.randn(tokens, D, generator=generator).to(device)
    logit_TE = torch.randn(tokens, E, generator=generator) + torch.linspace(0, 1.5, E)
    weight_TK, index_TK = (part.to(device) for part in logit_TE.softmax(-1).topk(K))
    y_TD = torch.zeros_like(x_TD)
    for expert in range(E):
        token_N, slot_N = (index_TK == expert).nonzero(as_tuple=True)
        output_ND = experts.run(expert, x_TD[token_N])
        y_TD.index_add_(0, token_N, output_ND * weight_TK[token_N, slot_N].unsqueeze(-1))
    return ExpertsCall(x_TD, index_TK.int(), weight_TK.float(), y_TD)


def measure(device: torch.device, groups: int, rank: int, grouping: str) -> dict[str, Any]:
    """Run the closed form once and return its profile and what came of it."""
    generator = torch.Generator().manual_seed(0)
    experts = make_experts(device, generator)
    options = FactorConfig()
    call = make_call(experts, options.fit_tokens + 4096, generator)
    statistics = LayerStatistics.empty(E, D)
    for rows in torch.arange(len(call.x_TD), device=device).split(4096):
        statistics.add(call.rows(rows), experts)
    if device.type == "cuda":
        # The first call of a library's routines loads them, once in a whole job.
        torch.linalg.cholesky(torch.eye(64, dtype=torch.float64, device=device))
        torch.linalg.eigh(torch.eye(64, dtype=torch.float64, device=device))
        torch.cuda.reset_peak_memory_stats(device)
    profile = Profile(device)
    profile.watch()
    whole = Profile(device)
    with whole.part("all"):
        with profile.part(f"group by {grouping}"):
            found = group_layer(statistics, experts, groups, grouping, x_SD=call.x_TD)
            group_of_expert = found.to(device)
        made = choose.factor(
            experts, statistics, call, group_of_expert, LayerPlan(groups, rank, scale=True), options
        )
    seconds = whole.seconds["all"]
    profile.seconds["everything else"] = seconds - sum(profile.seconds.values())
    rows = [{"part": part, "seconds": spent} for part, spent in profile.seconds.items()]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seconds": seconds,
        "base": made.base,
        "error": made.error,
        "peak_bytes": peak,
        "rows": rows,
    }


def render(meta: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the profile as Markdown."""
    target = TARGETS.get(torch.device(meta["kind"]).type)
    lines = [
        "# The closed form of one layer",
        "",
        f"{E} experts, D {D}, F {F}, top-{K}, bf16, to {meta['groups']} fused experts of rank "
        f"{meta['rank']}, fitted to 16,384 tokens, on {meta['device']} "
        f"({meta['cpu']}, {meta['threads']} threads): **{found['seconds']:.1f} s**"
        f"{f' of at most {target:.0f} s' if target else ''}. Bases kept: {found['base']}, relative "
        f"error {found['error']:.3f}.",
        "",
        "| part | seconds |",
        "| --- | ---: |",
    ]
    lines += [f"| {row['part']} | {row['seconds']:.2f} |" for row in found["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--grouping", choices=sorted(GROUPINGS), default="dominant")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    found = measure(torch.device(given.device), given.groups, given.rank, given.grouping)
    meta = machine_meta(
        f"python benchmarks/closed_form.py --device {given.device} --grouping {given.grouping}",
        device=given.device,
        kind=given.device,
        threads=torch.get_num_threads(),
        groups=given.groups,
        rank=given.rank,
        grouping=given.grouping,
        **{name: found[name] for name in ("seconds", "base", "error", "peak_bytes")},
    )
    name = "closed_form-" + torch.device(given.device).type
    if given.grouping != "dominant":
        name += "-" + given.grouping
    write_json(given.out / f"{name}.json", {"meta": meta, "rows": found["rows"]})
    write_text(given.out / f"{name}.md", render(meta, found))
    print(render(meta, found))


if __name__ == "__main__":
    main()
