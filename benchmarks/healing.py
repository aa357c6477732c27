"""Healing, method against method: KL to the teacher before and after, and its way there.

At each of 16, 8, 4 and 2 fused experts a layer, with several seeds: this design's bases and deltas,
this design under a budget of the same bytes (own neurons at low bits), pruning by REAP's score and
merging by HC-SMoE. All are distilled layer by layer first, take the same bytes of routed experts
(rivals a little more, their experts being whole), and are healed alike: the same tokens of the same
text in the same order, everything trained, the same rates.

The text is that of ``package_text.py``, Python that the teacher has not learnt by heart. Run it by
``make healing``; it goes on where it was interrupted. Several processes with ``--part 0/24`` to
``--part 23/24`` share it, the same command without gathers.
"""

import copy
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from dense_products import multiply_densely
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse import corpus, demo
from moefuse.arena.bench import alone
from moefuse.arena.lowbit import round_to
from moefuse.arena.students import run_stages
from moefuse.artifacts import read_json, write_atomically, write_json, write_tensors, write_text
from moefuse.comparison import (
    DISTILLED,
    FUSED,
    Contender,
    contender_row,
    fused,
    measure_models,
    model_with,
    read_held_out_for,
    rivals,
    teacher_row,
)
from moefuse.config import HealConfig, build
from moefuse.console import say
from moefuse.evaluation.machine import machine_meta
from moefuse.evaluation.report import report_json, row_from_json
from moefuse.evaluation.rows import TEACHER, Row
from moefuse.evaluation.run import load_model
from moefuse.evaluation.tables import markdown
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.text import PackedText, pack
from moefuse.healing.trainer import steps_of, tokens_per_row, train
from moefuse.modeling.training import stored_to_trained, trained_to_stored
from moefuse.pipeline import Job

HEALED = "healed"
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "healing"
TEXT = ROOT / "runs" / "packages.jsonl"
GROUPS = (16, 8, 4, 2)
WITH_RIVALS = (8, 4, 2)
NEURONS = "fused-neurons"
METHODS = (FUSED, NEURONS, "reap", "hc-smoe")
CALIBRATION: dict[str, Any] = {"tokens": 98_304, "dtype": "float32"}
HELD_OUT_TOKENS = 12_288
CURVE_TOKENS = 8192
GENTLY = {"code_rate": 1e-4, "rate": 2e-5, "router_rate": 2e-5}
"""Rates of low-bit students, which have little left to heal; docs/research.md, section 16."""
COLOURS: dict[str, str] = dict(
    zip(METHODS, ("#2a6f97", "#7b2d8b", "#c8553d", "#588157"), strict=True)
)


@dataclass(frozen=True)
class Cell:
    """One student that is healed."""

    method: str
    groups: int
    seed: int

    @property
    def name(self) -> str:
        """The cell's file, without ending."""
        return f"{self.method}-{self.groups}-seed{self.seed}"


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    out: Path
    device: str
    teacher: PreTrainedModel
    text: PackedText
    curve: PackedText
    options: HealConfig
    mixed: bool

    def job(self, values: dict[str, Any]) -> Job:
        """Return the job of one size, on the calibration that all share."""
        data = {"data": str(demo.calibration_path()), "device": self.device}
        return Job(demo.teacher_path(), self.out / "work", {**CALIBRATION, **data, **values})

    def student(self, cell: Cell) -> tuple[Job, Contender]:
        """Make a cell's student, distilled layer by layer."""
        job = self.job({"groups": cell.groups, "seed": cell.seed})
        if cell.method == NEURONS:
            bits = 8 * job.plan.expert_bytes / job.sizes.expert_parameters
            job = self.job({"expert_bits": bits, "seed": cell.seed})
        elif cell.method != FUSED:
            with alone(job.work / "calibrate.lock"):
                job.calibrate()
            found = rivals(job, cell.method, distilled=True)
            return job, next(c for c in found if c.stage == DISTILLED)
        run_stages(job)
        return job, replace(fused(job, DISTILLED), method=cell.method)

    def directory(self, cell: Cell) -> Path:
        """Return where a cell's checkpoints lie while it is healed."""
        return self.out / "training" / cell.name

    def healed(self, cell: Cell, model: PreTrainedModel, job: Job) -> list[dict[str, Any]]:
        """Heal a cell's student in place, from its last checkpoint on; returns the log."""
        stored_to_trained(model)
        if self.device != "cpu":
            multiply_densely(model)
        log = train(
            model,
            LiveTeacher(self.teacher, job.reader.family),
            self.text,
            job.reader.family,
            replace(self.options, **(GENTLY if cell.method == NEURONS else {})),
            directory=self.directory(cell),
            seed=cell.seed,
            device=self.device,
            mixed=self.mixed,
            held_out=self.curve,
            description=None,
        )
        trained_to_stored(model)
        return log

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Heal a cell's student; returns its rows before and after, and the way between."""
        start = time.monotonic()
        job, contender = self.student(cell)
        before = model_with(self.teacher, job.reader.family, contender.students)
        model = copy.deepcopy(before)
        made = time.monotonic()
        log = self.healed(cell, model, job)
        round_to(model.parameters(), job.stored)
        held_out = read_held_out_for(job, demo.heldout_path(), HELD_OUT_TOKENS)
        shutil.rmtree(self.directory(cell))
        models = {TEACHER: self.teacher, DISTILLED: before, HEALED: model}
        found = measure_models(job, models, held_out, teacher=self.teacher, description=None)
        seconds = time.monotonic() - made
        after = replace(contender, stage=HEALED, seconds=contender.seconds + seconds)
        rows = [
            teacher_row(job, found[TEACHER]),
            contender_row(job, contender, found[DISTILLED]),
            contender_row(job, after, found[HEALED]),
        ]
        rows = [rows[0], *(replace(row, groups=cell.groups) for row in rows[1:])]
        told = " to ".join(f"{row.kl:.4f}" for row in rows[1:])
        say(f"{cell.name}: KL {told} ({time.monotonic() - start:.0f} s)")
        return {"rows": report_json({}, rows)["rows"], "curve": self.curve_of(log)}

    def curve_of(self, log: list[dict[str, Any]]) -> list[tuple[float, float]]:
        """Return a log's KL on held-out text, after how many tokens."""
        per_step = tokens_per_row(self.text) * self.options.batch_size
        return [(line["step"] * per_step, line["eval_loss"]) for line in log if "eval_loss" in line]

    def so_far(self, cell: Cell) -> dict[str, Any]:
        """Return the way of a cell that is not done: of its last checkpoint, if there is one."""
        states = [
            read_json(path) for path in self.directory(cell).glob("checkpoint-*/trainer_state.json")
        ]
        last = max(states, key=lambda state: state["global_step"], default={"log_history": []})
        return {"rows": [], "curve": self.curve_of(last["log_history"])}


def cells(seeds: int, methods: tuple[str, ...], groups: tuple[int, ...]) -> Iterator[Cell]:
    """List all cells; where no rival is asked for, this design's alone."""
    for seed in range(seeds):
        for count in groups:
            for method in methods if count in WITH_RIVALS else (FUSED,):
                yield Cell(method, count, seed)


def main(
    out: Annotated[Path, typer.Option(help="Cells and artifacts.")] = Path("runs/healing"),
    results: Annotated[Path, typer.Option(help="Where the report goes.")] = RESULTS,
    text: Annotated[Path, typer.Option(help="JSONL by package_text.py.")] = TEXT,
    device: str = "cpu",
    mixed: Annotated[bool, typer.Option(help="Compute in bf16 around fp32 weights.")] = False,
    seeds: int = 3,
    tokens: str = "24M",
    methods: str = ",".join(METHODS),
    groups: str = "16,8,4,2",
    unfinished: Annotated[bool, typer.Option(help="Report though cells are missing.")] = False,
    part: Annotated[str | None, typer.Option(help="Only this part, such as 0/24.")] = None,
) -> None:
    """Heal every cell that is not done yet, and report."""
    options = build(HealConfig, {"tokens": tokens, "logging_steps": 50, "save_steps": 250})
    # The matrices are small: full fp32 products would take most of the time and change nothing.
    torch.backends.cuda.matmul.allow_tf32 = True
    teacher, tokenizer = load_model(demo.teacher_path(), dtype="float32", device=device)
    if device != "cpu":
        multiply_densely(teacher)
    length = options.sequence_length
    packed = read_packed(out / "text.safetensors", text, tokenizer, length)
    curve = pack(
        corpus.load_documents(demo.heldout_path()), tokenizer, length, tokens=CURVE_TOKENS, seed=0
    )
    steps = steps_of(packed, options, 1)
    options = replace(options, eval_steps=max(1, steps // 12))
    bench = Bench(out, device, teacher, packed, curve, options, mixed)
    wanted = list(cells(seeds, tuple(methods.split(",")), tuple(map(int, groups.split(",")))))
    index, count = map(int, part.split("/")) if part else (0, 1)
    for cell in wanted[index::count]:
        path = out / "cells" / f"{cell.name}.json"
        if not path.exists():
            write_json(path, bench.measured(cell))
    done = {c: read_json(p) for c in wanted if (p := out / "cells" / f"{c.name}.json").exists()}
    if len(done) == len(wanted) or unfinished:
        report({c: done.get(c) or bench.so_far(c) for c in wanted}, bench, results)


def read_packed(
    path: Path, text: Path, tokenizer: PreTrainedTokenizerBase, length: int
) -> PackedText:
    """Return the text packed, which one process of several does once for all."""
    with alone(path.with_suffix(".lock")):
        if not path.exists():
            packed = pack(corpus.load_documents(text), tokenizer, length, tokens=10**9, seed=0)
            write_tensors(path, vars(packed))
    return PackedText(**load_file(path))


def report(done: dict[Cell, Any], bench: Bench, results: Path) -> None:
    """Write the report: rows, table and curves."""
    rows: list[Row] = []
    for found in done.values():
        of_cell = [row_from_json(row) for row in found["rows"]]
        rows += of_cell if not rows else of_cell[1:]
    meta = machine_meta(
        "python benchmarks/healing.py",
        device=bench.device,
        data={"name": "heldout.jsonl", "tokens": HELD_OUT_TOKENS},
        healing={k: v for k, v in vars(bench.options).items() if v is not None},
        healing_text=f"package_text.py, {bench.text.tokens:,} tokens",
        mixed=bench.mixed,
        rates_of_low_bits=GENTLY,
        calibration=CALIBRATION,
    )
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "healing.json", report_json(meta, rows))
    curves = {cell.name: found["curve"] for cell, found in done.items() if found["curve"]}
    write_json(results / "curves.json", curves)
    write_text(results / "healing.md", _markdown(rows, done))
    _plot(done, results / "healing.png")


def _kl(rows: list[Row], method: str, groups: int, stage: str) -> list[float]:
    return [
        row.kl
        for row in rows
        if (row.method, row.groups, row.stage) == (method, groups, stage) and row.kl is not None
    ]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _markdown(rows: list[Row], done: dict[Cell, Any]) -> str:
    finished = sum(bool(found["rows"]) for found in done.values())
    titles = ["Fused experts", "Method", "Expert bytes", "Seeds", "KL distilled", "KL healed"]
    titles += ["Healed / distilled", f"Healed KL / {FUSED}", f"Healed KL / {NEURONS}"]
    lines = []
    for groups in sorted({row.groups for row in rows if row.groups}, reverse=True):
        ours = [_kl(rows, method, groups, HEALED) for method in (FUSED, NEURONS)]
        for method in METHODS:
            before, after = (_kl(rows, method, groups, stage) for stage in (DISTILLED, HEALED))
            if after:
                size = next(
                    r.expert_bytes for r in rows if (r.method, r.groups) == (method, groups)
                )
                lines.append(
                    [
                        str(groups),
                        method,
                        f"{(size or 0) / 1e6:.2f} MB",
                        str(len(after)),
                        _spread(before),
                        _spread(after),
                        f"{mean(after) / mean(before):.2f}",
                        *(f"{mean(after) / mean(of):.2f}" if of else "" for of in ours),
                    ]
                )
    return f"""# Healing

By `make healing`; {finished} of {len(done)} students are healed to the end.

![KL against tokens](healing.png)

{markdown(titles, lines)}
"""


def _plot(done: dict[Cell, Any], path: Path) -> None:
    groups = sorted({cell.groups for cell in done}, reverse=True)
    figure = Figure(figsize=(3.2 * len(groups), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, groups, strict=True):
        for cell, found in done.items():
            if cell.groups == count and found["curve"]:
                tokens, values = zip(*found["curve"], strict=True)
                millions = [number / 1e6 for number in tokens]
                axes.plot(millions, values, color=COLOURS[cell.method], linewidth=1)
        axes.set_title(f"{count} fused experts", fontsize=10)
        axes.set_xlabel("Million tokens", fontsize=9)
        axes.set_yscale("log")
        axes.grid(axis="y", color="0.9", linewidth=0.6)
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(ticks := (0.02, 0.05, 0.1, 0.2, 0.5), [str(tick) for tick in ticks])
    panels[0].set_ylabel("KL to the teacher, nats per token", fontsize=9)
    lines = [Line2D([], [], color=COLOURS[method], label=method) for method in METHODS]
    panels[-1].legend(handles=lines, fontsize=8, frameon=False)
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    )


if __name__ == "__main__":
    sys.exit(typer.run(main))
