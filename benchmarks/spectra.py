"""Why fusing experts is hard: what their weights and neurons look like, and where errors come from.

For every layer of a checkpoint: the spectra of the experts' deltas from their group's mean, how
alike the neurons of two experts are, how few neurons hold the output's energy, what part of the
error is due to bases, deltas, bits and grouping; and for one layer how the error of students falls
with distillation steps. All errors are on recorded tokens of held-out text.

Run it by ``make spectra``; it goes on where it was interrupted. Several processes with ``--part
0/4`` to ``--part 3/4`` measure side by side; the same command without ``--part`` then gathers what
they found and writes benchmarks/results/spectra.{json,md,png} and two more plots.
"""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from layer_measures import (
    down_roots,
    energy_left,
    errors,
    members_and_mean,
    ranks_up_to,
    shares,
    similarities,
)
from spectra_report import report, write_plots
from torch import Tensor, nn

from moefuse import demo
from moefuse.arena.cells import part_of
from moefuse.arena.lowbit import RoundedStudent
from moefuse.arena.run import read_held_out
from moefuse.arena.students import alone
from moefuse.artifacts import fingerprint, read_json, read_tensors, write_json, write_text
from moefuse.console import say
from moefuse.demo.run import HELD_OUT_TOKENS
from moefuse.distillation.loop import distill_layer, metric_root
from moefuse.evaluation.machine import machine_meta
from moefuse.fusion.choose import factor
from moefuse.fusion.keep import Kept, keep
from moefuse.fusion.plan_neurons import choices_of
from moefuse.grouping.assign import group_layer
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.lowrank import symmetric_root
from moefuse.pipeline import JUDGE_TOKENS, METRIC_DAMPING, Job
from moefuse.sizes import LayerPlan, load_experts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEACHER_PATH = demo.teacher_path()
TOPS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
OWN_BITS = ("1", "2", "3", "4")
ROUNDED_BITS = (4, 2)
RANDOM_GROUPINGS = 3
SAMPLED = 2**23
"""More numbers than this torch finds no quantiles of."""
LOW_RANK, OWN = "bases and deltas", "own neurons"

Found = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a ``kind`` (see ``KINDS``) of a ``layer`` (None: all of them), and of
    a student of ``form`` after ``steps`` where that is what is measured."""

    kind: str
    layer: int | None
    form: str | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        """The name of the cell's file, without ending."""
        parts = (self.kind, self.layer, self.form, self.steps)
        return "-".join(str(part).replace(" ", "-") for part in parts if part is not None)


class Bench:
    """The jobs whose artifacts are measured: bases and deltas, own neurons, own neurons without
    gradients, and one that records held-out text."""

    def __init__(
        self,
        checkpoint: Path,
        work: Path,
        values: Mapping[str, Any],
        sizes: Mapping[str, Any],
        held_out: str | None,
        held_out_tokens: int,
    ) -> None:
        def job(**more: Any) -> Job:
            return Job(checkpoint, work / "work", {**values, **more})

        own_size = {"expert_bits": sizes["expert_bits"]}
        self.work, self.pairs = work, sizes["pairs"]
        self.low_rank = job(groups=sizes["groups"])
        self.own = job(**own_size)
        self.raw = job(**own_size, sensitivity_tokens=0)
        self.text = read_held_out(self.low_rank, held_out, held_out_tokens)
        source = held_out or str(demo.heldout_path())
        tokens = held_out_tokens - held_out_tokens % self.own.calibration.sequence_length
        self.held_out = job(groups=sizes["groups"], data=source, tokens=tokens)

    def prepare(self) -> None:
        """Calibrate on both texts and weigh all neurons, unless that is done."""
        with alone(self.work / "prepare.lock"):
            for job in (self.own, self.raw, self.held_out):
                job.calibrate()
            self.own.group()
            self.raw.group()

    def layer(self, layer: int) -> "LayerBench":
        """Return what is measured of one layer."""
        return LayerBench(self, layer)

    def energies(self, layer: int) -> dict[str, Tensor]:
        """Return the energy of a layer's neurons, (E, F), by how it is measured."""
        jobs = {"raw": self.raw, "logits": self.own}
        name = f"layer-{layer:03d}.safetensors"
        return {
            kind: read_tensors(job.energies_directory / name)["energy_EF"]
            for kind, job in jobs.items()
        }

    @cached_property
    def mark(self) -> str:
        """What tells these settings and texts from all others."""
        jobs = (self.low_rank, self.own, self.raw)
        names = [job.distilled_directory.name for job in jobs]
        return fingerprint([names, self.held_out.store.directory.name, self.pairs])


class LayerBench:
    """One layer: its experts, what they received of both texts, and students made of them."""

    def __init__(self, bench: Bench, layer: int) -> None:
        self.bench, self.layer = bench, layer
        self.job = bench.low_rank
        self.statistics = self.job.store.statistics(layer)
        self.experts: Experts = self.job.experts(layer).in_fp32()

    @property
    def weights(self) -> list[Any]:
        """All experts' weights."""
        return [self.experts.weights(e) for e in range(len(self.experts.down_EDF))]

    @cached_property
    def fit(self) -> ExpertsCall:
        """The calibration tokens that students are fitted to."""
        return self.job.store.sample(self.layer, self.job.factoring.fit_tokens).to(self.job.device)

    @cached_property
    def fit_and_judge(self) -> ExpertsCall:
        """The same and more, on which ways of making bases are compared."""
        tokens = self.job.factoring.fit_tokens + JUDGE_TOKENS
        return self.job.store.sample(self.layer, tokens).to(self.job.device)

    @cached_property
    def held_out(self) -> ExpertsCall:
        """The recorded tokens of held-out text."""
        return self.bench.held_out.store.all_calls(self.layer).to(self.job.device)

    @cached_property
    def root_DD(self) -> Tensor:
        """The root of the metric that says what the logits feel, (D, D)."""
        metric_DD = self.bench.own.metric(self.layer)
        assert metric_DD is not None
        return metric_root(metric_DD, METRIC_DAMPING)

    def error(self, student: nn.Module) -> dict[str, float]:
        """Return a student's errors on held-out tokens."""
        plain, felt = errors(student.eval(), self.held_out, self.root_DD)
        return {"error": plain, "felt": felt}

    def groups(self, count: int) -> Tensor:
        """Group the experts in the job's way, (E,)."""
        grouping = self.job.grouping.grouping
        x_SD = self.fit.x_TD
        found = group_layer(self.statistics, self.experts, count, grouping, x_SD=x_SD)
        return found.to(self.job.device)

    def random_groups(self, count: int, draw: int) -> Tensor:
        """Group the experts at random, as evenly as can be, (E,)."""
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(len(self.experts.down_EDF), generator=generator)
        return (order % count).to(self.job.device)

    def fused(self, base: str, rank: int, group_of_expert: Tensor) -> nn.Module:
        """Make bases and deltas in closed form."""
        plan = LayerPlan(int(group_of_expert.max()) + 1, rank, scale=True)
        options = replace(self.job.factoring, base=base, scale=True)
        made = factor(
            self.experts, self.statistics, self.fit_and_judge, group_of_expert, plan, options
        )
        return load_experts(made.state, self.experts, plan)

    def kept(self) -> Kept:
        """Make own neurons at the bits that the budget gives each."""
        job = self.bench.own
        chosen, plan = job.settled
        energy_EF = self.bench.energies(self.layer)["logits"].to(job.device)
        bits_EF = chosen[self.layer].to(job.device)
        choices = choices_of(job.size)
        return keep(self.experts, self.fit, energy_EF, bits_EF, choices, plan.layers[self.layer])

    def all_at(self, bits: str) -> nn.Module:
        """Make own neurons that are all there, at one number of bits."""
        count, _, width = self.experts.down_EDF.shape
        energy_EF = torch.ones(count, width, device=self.job.device)
        plan = LayerPlan(neurons={bits: count * width})
        bits_EF = torch.ones_like(energy_EF, dtype=torch.long)
        return keep(self.experts, self.fit, energy_EF, bits_EF, ("0", bits), plan).module


# What is measured.


def spectra(bench: Bench, cell: Cell) -> Found:
    """Measure what deltas of every rank leave: without a base, one base, several; neurons aligned
    or not; weights as they are or whitened by what they receive."""
    assert cell.layer is not None
    layer, groups = bench.layer(cell.layer), bench.low_rank.size.groups or 1
    moment_DD = layer.statistics.moment_DD / max(layer.statistics.tokens, 1)
    root_DD = symmetric_root(moment_DD)[0].float().to(layer.job.device)
    found: Found = []
    for count, aligned in ((0, False), (1, False), (1, True), (groups, False), (groups, True)):
        group_of_expert = layer.groups(max(count, 1)).cpu()
        mass_E = layer.statistics.mass_E.to(layer.job.device)
        whole, means = members_and_mean(layer.weights, group_of_expert, mass_E, aligned=aligned)
        roots = {"gate_up": root_DD, "down": down_roots(whole, layer.experts, layer.fit)}
        for matrix, root in roots.items():
            whole_EOI = torch.stack([_matrix(expert, matrix) for expert in whole])
            mean_EOI = torch.stack([_matrix(mean, matrix) for mean in means])
            delta_EOI = whole_EOI - mean_EOI if count else whole_EOI
            ranks = ranks_up_to(min(delta_EOI.shape[1:]))
            said = {"matrix": matrix, "groups": count, "aligned": aligned, "ranks": ranks}
            for whitened in (False, True):
                left = energy_left(delta_EOI, whole_EOI, ranks, root if whitened else None)
                found.append({**said, "whitened": whitened, "left": left})
    return found


def _matrix(expert: Any, name: str) -> Tensor:
    return expert.gate_up() if name == "gate_up" else expert.down_DF


def neurons(bench: Bench, cell: Cell) -> Found:
    """Measure how alike the neurons of two experts are."""
    assert cell.layer is not None
    generator = torch.Generator().manual_seed(cell.layer)
    found = similarities(bench.layer(cell.layer).weights, bench.pairs, generator)
    quantiles = {"low": 0.1, "median": 0.5, "high": 0.9}
    return [
        {
            "order": name,
            "mean": float(cosine_N.mean()),
            **{key: float(torch.quantile(cosine_N[:SAMPLED], q)) for key, q in quantiles.items()},
            "above_half": float((cosine_N > 0.5).float().mean()),
        }
        for name, cosine_N in found.items()
    ]


def concentration(bench: Bench, cell: Cell) -> Found:
    """Measure what share of the output's energy a few neurons hold, in a layer or in the model."""
    layers = bench.own.reader.shape.layers if cell.layer is None else (cell.layer,)
    by_layer = [bench.energies(layer) for layer in layers]
    return [
        {
            "energy": kind,
            "tops": list(TOPS),
            "shares": shares(torch.cat([e[kind].flatten() for e in by_layer]), TOPS),
        }
        for kind in ("raw", "logits")
    ]


def sources(bench: Bench, cell: Cell) -> Found:
    """Measure the error of students that nothing was trained of, one source after another."""
    assert cell.layer is not None
    layer, plan = bench.layer(cell.layer), bench.low_rank.plan.layers[cell.layer]
    default = layer.groups(plan.groups)
    found: Found = []
    for base in ("neurons", "mean"):
        for rank in (0, plan.rank):
            said = {"base": base, "rank": rank, "bits": None}
            student = layer.fused(base, rank, default)
            found.append({**said, "grouping": "default", **layer.error(student)})
            draws = [
                layer.error(layer.fused(base, rank, layer.random_groups(plan.groups, draw)))
                for draw in range(RANDOM_GROUPINGS)
            ]
            mean = {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}
            found.append({**said, "grouping": "random", **mean})
    for bits in ROUNDED_BITS:
        student = RoundedStudent(
            layer.fused("neurons", plan.rank, default), bits, torch.bfloat16
        ).finished()
        said = {"base": "neurons", "rank": plan.rank, "bits": str(bits), "grouping": "default"}
        found.append({**said, **layer.error(student)})
    said = {"base": None, "rank": None, "grouping": None}
    return found + [{**said, "bits": b, **layer.error(layer.all_at(b))} for b in OWN_BITS]


def steps(bench: Bench, cell: Cell) -> Found:
    """Measure a student of one layer after so many steps, each a distillation of its own."""
    assert cell.layer is not None and cell.steps is not None
    layer, low_rank = bench.layer(cell.layer), bench.low_rank
    if cell.form == LOW_RANK:
        plan = low_rank.plan.layers[cell.layer]
        base = low_rank.factoring.base
        student: Any = layer.fused(base, plan.rank, layer.groups(plan.groups))
        job, trained = low_rank, student
    else:
        job, kept = bench.own, layer.kept()
        student, trained = kept.module, kept.trained()
    if cell.steps:
        options = replace(job.distillation, steps=cell.steps)
        distill_layer(
            trained,
            job.call(cell.layer),
            options,
            seed=cell.layer,
            metric_root_DD=job.metric_root(cell.layer),
        )
        student = trained.packed() if cell.form == OWN else trained
    return [layer.error(student)]


KINDS = {
    "spectra": spectra,
    "neurons": neurons,
    "concentration": concentration,
    "sources": sources,
    "steps": steps,
}


def cells_of(layers: Sequence[int], counts: Sequence[int], middle: int) -> list[Cell]:
    """List all that is to be measured; ``counts`` of steps on the layer ``middle`` alone."""
    forms = (LOW_RANK, OWN)
    found = [Cell("steps", middle, form, count) for count in counts[::-1] for form in forms]
    found += [Cell(kind, layer) for kind in KINDS if kind != "steps" for layer in layers]
    return [*found, Cell("concentration", None)]


def measured(bench: Bench, cell: Cell) -> Found:
    """Measure one cell, or read what an earlier run measured."""
    path = bench.work / "cells" / bench.mark / f"{cell.name}.json"
    if not path.exists():
        start = time.monotonic()
        bench.prepare()
        with bench.own.suited_threads():
            found = KINDS[cell.kind](bench, cell)
        say(f"{cell.name} ({time.monotonic() - start:.0f} s)")
        write_json(path, [{**asdict(cell), **row} for row in found])
    return read_json(path)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Teacher to measure.")] = TEACHER_PATH,
    data: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Text to measure on.")] = None,
    work: Path = Path("runs/spectra"),
    results: Annotated[Path, typer.Option(help="Where the results are written.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Their files' name, without ending.")] = "spectra",
    part: Annotated[str | None, typer.Option(help="Measure only this part, such as 0/4.")] = None,
    groups: int = 8,
    expert_bits: Annotated[float, typer.Option(help="Budget of own neurons.")] = 1.0,
    pairs: Annotated[int, typer.Option(help="Pairs of experts whose neurons are matched.")] = 200,
    step_counts: Annotated[
        str, typer.Option(help="Numbers of distillation steps, commas between.")
    ] = "0,50,100,200,400,800",
    step_layer: Annotated[
        int | None, typer.Option(help="Layer that is distilled; the middle one without.")
    ] = None,
    tokens: int = 98_304,
    sequence_length: int = 512,
    batch_size: int = 8,
    held_out_tokens: int = HELD_OUT_TOKENS,
    fit_tokens: int = 16_384,
    sensitivity_tokens: int = 8192,
    batch_tokens: int = 1024,
    device: str = "auto",
    commit: Annotated[
        str | None, typer.Option(help="Commit to name where there is no git to ask.")
    ] = None,
) -> None:
    """Measure everything, then write the results."""
    start = time.monotonic()
    values = {
        "data": data,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "fit_tokens": fit_tokens,
        "sensitivity_tokens": sensitivity_tokens,
        "batch_tokens": batch_tokens,
        "device": device,
    }
    sizes = {"groups": groups, "expert_bits": expert_bits, "pairs": pairs}
    bench = Bench(checkpoint, work, values, sizes, held_out, held_out_tokens)
    layers = bench.own.reader.shape.layers
    middle = layers[len(layers) // 2] if step_layer is None else step_layer
    cells = cells_of(layers, [int(count) for count in step_counts.split(",")], middle)
    for cell in part_of(cells, part):
        measured(bench, cell)
    if part is not None:
        return
    rows = [row for cell in cells for row in measured(bench, cell)]
    meta = _meta(bench, commit, time.monotonic() - start)
    write_json(results / f"{name}.json", {"meta": meta, "rows": rows})
    pictures = write_plots(rows, results, name)
    write_text(results / f"{name}.md", report(rows, meta, pictures))


def _meta(bench: Bench, commit: str | None, seconds: float) -> dict[str, Any]:
    job = bench.own
    meta = machine_meta(
        f"python {shlex.join(sys.argv)}",
        device=job.device,
        data=bench.text.to_json(),
        calibration={**asdict(job.calibration), "data": None},
        distillation=asdict(job.distillation),
        groups=bench.low_rank.size.groups,
        expert_bits=job.size.expert_bits,
        seconds=round(seconds, 1),
    )
    return meta | {"commit": commit or meta["commit"]}


if __name__ == "__main__":
    sys.exit(typer.run(main))
