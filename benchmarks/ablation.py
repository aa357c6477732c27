"""What each part of the method is worth: one removed at a time, all else as it is, over seeds.

Own neurons are ablated at several budgets, bases with low-rank deltas at one number of groups.
Every setting is made by the stages of its own job, distilled, and measured on held-out text.
Artifacts are shared, so that a setting costs only what it changes.

Run it by ``make ablation``; it goes on where it was interrupted. Several processes with ``--part
0/4`` to ``--part 3/4`` measure side by side; the same command without ``--part`` then gathers what
they found and writes benchmarks/results/ablation.{json,md,png}.
"""

import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from moefuse import demo
from moefuse.arena.cells import part_of
from moefuse.arena.run import read_held_out
from moefuse.arena.students import run_stages
from moefuse.artifacts import fingerprint, read_json, write_atomically, write_json, write_text
from moefuse.comparison import DISTILLED, ONE_SHOT, HeldOut, fused, measure_contenders
from moefuse.config import GROUPINGS, build
from moefuse.console import say
from moefuse.demo.run import HELD_OUT_TOKENS
from moefuse.evaluation.plots import COLOURS, FAINT, INK
from moefuse.evaluation.report import Row, facts, machine_meta, report_json, row_from_json
from moefuse.evaluation.rows import TEACHER, mean_of
from moefuse.evaluation.run import load_model
from moefuse.evaluation.tables import human_bytes, markdown, short
from moefuse.pipeline import STAGES, Job

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TEACHER_PATH = demo.teacher_path()
AS_IT_IS = "as it is"
MEANS = "bases are means"
MEAN = {"base": "mean"}
LOW_RANK = "Bases and low-rank deltas"

Parts = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Setting:
    """One way of making the student: a ``form`` (a table), the ``part`` that is changed in it (a
    line), and the settings that both take."""

    form: str
    part: str
    values: dict[str, Any] = field(hash=False)


Measured = dict[Setting, list[Row]]


class Bench:
    """What all settings share: the checkpoint, the settings that never change, the texts."""

    def __init__(
        self,
        checkpoint: Path,
        work: Path,
        values: Mapping[str, Any],
        held_out: str | None,
        held_out_tokens: int,
    ) -> None:
        self.checkpoint, self.work, self.values = checkpoint, work, values
        self.plain = self.job({})
        self.text: HeldOut = read_held_out(self.plain, held_out, held_out_tokens)

    def job(self, values: Mapping[str, Any]) -> Job:
        """Make the job of one setting."""
        return Job(self.checkpoint, self.work / "work", {**self.values, **values})

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The whole teacher in fp32."""
        plain = self.plain
        return load_model(plain.reader.directory, dtype="float32", device=plain.device)[0]

    def path(self, setting: Setting, seed: int) -> Path:
        """Return the file of what was measured; other texts and settings have another one."""
        given = {**self.values, **setting.values, "seed": seed}
        settled = {stage.__name__: asdict(build(stage, given)) for stage in STAGES}
        texts = [self.plain.store.directory.name, self.text.to_json()["fingerprint"]]
        name = re.sub(r"[^a-z0-9.]+", "-", f"{setting.form} {setting.part}".lower()).strip("-")
        return self.work / "cells" / f"{name}-seed{seed}-{fingerprint([settled, texts])}.json"


def neuron_parts(job: Job) -> Parts:
    """List what can be taken from own neurons; ``job`` makes them as they are."""
    planned = next(iter(job.plan.layers.values())).shared
    width = job.reader.shape.intermediate
    shared = (("no shared neurons", 0), (f"{width} shared neurons", width))
    found: Parts = [
        ("budget spread within layers only", {"spread": "layer"}),
        ("no gradients: raw output energy, squared error", {"sensitivity_tokens": 0}),
        ("distilled by squared error", {"loss": "output"}),
        ("distilled on the teacher's inputs", {"inputs": "teacher"}),
        *((name, {"shared": count}) for name, count in shared if count != planned),
        ("no distillation", {"steps": 0}),
    ]
    if job.size.bits == "auto":
        found += [(f"{bits}-bit neurons only", {"bits": bits}) for bits in ("1", "2", "4", "16")]
    return found


def low_rank_parts(job: Job) -> Parts:
    """List what can be taken from bases and deltas, or given to them."""
    rank = next(iter(job.plan.layers.values())).rank
    ranks = [count for count in (0, rank // 2, 2 * rank) if count != rank]
    return [
        (MEANS, MEAN),
        ("means, neurons not aligned", {**MEAN, "align": False}),
        ("means, whitened by the inputs", {**MEAN, "damping": 0.0}),
        ("means, half whitened", {**MEAN, "damping": 0.5}),
        ("means, no alternation", {**MEAN, "alternations": 0}),
        ("means, members weigh alike", {**MEAN, "routed_mass": False}),
        ("means, no scales", {**MEAN, "scale": False}),
        ("with biases", {"bias": True}),
        *(
            (f"groups by {grouping}", {"grouping": grouping})
            for grouping in GROUPINGS
            if grouping != job.grouping.grouping
        ),
        *((f"rank {count}, not {rank}", {"rank": count}) for count in dict.fromkeys(ranks)),
        ("distilled by what the logits feel", {"loss": "logits"}),
        ("no distillation", {"steps": 0}),
    ]


def settings_of(
    bench: Bench, budgets: Sequence[float], whole_budgets: Sequence[float], groups: Sequence[int]
) -> list[Setting]:
    """List every setting: own neurons at each budget (bits per number), of few bits and of 16
    alone, then bases and deltas at each number of groups."""
    forms: dict[str, dict[str, Any]] = {
        f"Own neurons at {bits:g} bpw": {"expert_bits": bits} for bits in budgets
    }
    for bits in whole_budgets:
        forms[f"Own 16-bit neurons at {bits:g} bpw"] = {
            "expert_bits": bits,
            "bits": "16",
        }
    forms |= {f"{LOW_RANK}, {count} groups": {"groups": count} for count in groups}
    found = []
    for form, values in forms.items():
        job = bench.job(values)
        parts = neuron_parts(job) if job.uses_neurons else low_rank_parts(job)
        found += [
            Setting(form, part, {**values, **more}) for part, more in [(AS_IT_IS, {}), *parts]
        ]
    return found


def measured(bench: Bench, setting: Setting, seed: int) -> list[Row]:
    """Make and measure one setting, or read what an earlier run measured; the teacher's row
    first."""
    path = bench.path(setting, seed)
    if not path.exists():
        start = time.monotonic()
        job = bench.job({**setting.values, "seed": seed})
        run_stages(job)
        stages = (ONE_SHOT, DISTILLED) if job.distillation.steps else (ONE_SHOT,)
        contenders = [replace(fused(job, stage), method=setting.part) for stage in stages]
        rows = measure_contenders(
            job, contenders, bench.text, teacher=bench.teacher, description=None
        )
        figures = ", ".join(f"{row.kl:.4f} {row.stage}" for row in rows[1:])
        seconds = time.monotonic() - start
        say(f"{setting.form}, {setting.part}, seed {seed}: KL {figures} ({seconds:.0f} s)")
        write_json(path, report_json({"setting": asdict(setting)}, rows))
    return [row_from_json(item) for item in read_json(path)["rows"]]


def gathered(bench: Bench, settings: Sequence[Setting], seeds: int) -> tuple[Row, Measured]:
    """Return the teacher's row and every setting's rows, over all seeds."""
    found = [(setting, measured(bench, setting, s)) for setting in settings for s in range(seeds)]
    rows = [row for _, measured_rows in found for row in measured_rows]
    teacher = next(row for row in rows if row.method == TEACHER)
    return teacher, {
        setting: [row for other, rows in found if other == setting for row in rows if row.stage]
        for setting in settings
    }


# What the figures say. ``part`` in ``Setting`` tells lines apart, so that rows can be looked up.


def staged(rows: Sequence[Row], stage: str) -> list[float]:
    """Return the KL of every seed at a stage; what is not distilled stays as it was one-shot."""
    found = [row.kl for row in rows if row.stage == stage and row.kl is not None]
    return found if found or stage == ONE_SHOT else staged(rows, ONE_SHOT)


def spread(values: Sequence[float]) -> str:
    """Return a mean and, over several seeds, the standard deviation, as people read them."""
    return short(mean(values)) + (f" ± {short(stdev(values))}" if len(values) > 1 else "")


def change(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return by how many percent a mean is above a reference's."""
    return 100 * (mean(values) / mean(reference) - 1)


def of_form(found: Measured, form: str) -> dict[str, list[Row]]:
    """Return a form's rows by part."""
    return {setting.part: rows for setting, rows in found.items() if setting.form == form}


def table(parts: Mapping[str, list[Row]]) -> str:
    """Return one form's Markdown table; where bases can be means, also compared with those."""
    titles = ["Part", "Expert bytes", "Bits per number", "KL one-shot", "Change"]
    titles += ["KL distilled", "Change"] + ([f"Against {MEANS}"] if MEANS in parts else [])
    return markdown(titles, [_line(parts, part) for part in parts])


def _line(parts: Mapping[str, list[Row]], part: str) -> list[str]:
    rows = parts[part]
    cells = [
        part,
        human_bytes(mean_of(rows, "expert_bytes") or 0),
        f"{mean_of(rows, 'bpw') or 0:.3f}",
    ]
    for stage in (ONE_SHOT, DISTILLED):
        values = staged(rows, stage)
        cells += [spread(values), _percent(parts, part, AS_IT_IS, stage)]
    if MEANS in parts:
        is_one = part.startswith("means")
        cells.append(_percent(parts, part, MEANS, DISTILLED) if is_one else "")
    return cells


def _percent(parts: Mapping[str, list[Row]], part: str, reference: str, stage: str) -> str:
    if part == reference:
        return ""
    return f"{change(staged(parts[part], stage), staged(parts[reference], stage)):+.1f} %"


def report(found: Measured, meta: Mapping[str, Any], picture: str) -> str:
    """Return the report as Markdown."""
    forms = list(dict.fromkeys(setting.form for setting in found))
    tables = [f"## {form}\n\n{table(of_form(found, form))}" for form in forms]
    return (
        "\n\n".join(
            [
                "# What each part is worth",
                f"![Change of the KL by part]({picture})",
                "One part is taken away, or put in, at a time; all else is as it is. KL is "
                "KL(teacher || student) in nats per token of held-out text, mean ± standard "
                "deviation over seeds; a change above zero is what the part is worth. Where "
                "nothing is distilled, the distilled column repeats the other.",
                *tables,
                "## How this was made",
                facts(meta),
            ]
        )
        + "\n"
    )


def plot(found: Measured, path: Path) -> None:
    """Draw by how many percent every part changes the distilled KL, a panel for every form."""
    forms = list(dict.fromkeys(setting.form for setting in found))
    heights = [len(of_form(found, form)) for form in forms]
    figure = Figure(figsize=(8.4, 0.26 * sum(heights) + 0.9 * len(forms)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(forms), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, form in zip(panels, forms, strict=True):
        _bars(axes, form, of_form(found, form))
    panels[-1].set_xlabel("Change of the distilled KL, percent; to the right: worse without it")
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    )


def _bars(axes: Axes, form: str, parts: Mapping[str, list[Row]]) -> None:
    reference = staged(parts[AS_IT_IS], DISTILLED)
    shown = [part for part in parts if part not in (AS_IT_IS, "no distillation")]
    widths = [change(staged(parts[part], DISTILLED), reference) for part in shown]
    errors = [_deviation(staged(parts[part], DISTILLED), reference) for part in shown]
    colours = [COLOURS[1] if width > 0 else COLOURS[0] for width in widths]
    axes.barh(shown, widths, xerr=errors, color=colours, ecolor=INK, height=0.66)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_title(f"{form}: KL {spread(reference)}", loc="left", fontsize=10, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _deviation(values: Sequence[float], reference: Sequence[float]) -> float:
    return 100 * stdev(values) / mean(reference) if len(values) > 1 else 0.0


def numbers(text: str) -> list[float]:
    """Read numbers with commas between."""
    return [float(word) for word in text.split(",") if word.strip()]


def main(
    checkpoint: Annotated[Path, typer.Option(help="Teacher to fuse.")] = TEACHER_PATH,
    data: Annotated[str | None, typer.Option(help="Calibration text.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Text to measure on.")] = None,
    work: Path = Path("runs/ablation"),
    results: Annotated[Path, typer.Option(help="Where the results are written.")] = RESULTS,
    name: Annotated[str, typer.Option(help="Their files' name, without ending.")] = "ablation",
    seeds: int = 3,
    part: Annotated[str | None, typer.Option(help="Measure only this part, such as 0/4.")] = None,
    expert_bits: Annotated[
        str, typer.Option(help="Budgets of own neurons, bits per number, commas between.")
    ] = "1,0.5",
    whole_bits: Annotated[
        str, typer.Option(help="Budgets of own neurons that all have 16 bits.")
    ] = "4",
    groups: Annotated[str, typer.Option(help="Groups of bases with low-rank deltas.")] = "8",
    tokens: int = 98_304,
    sequence_length: int = 512,
    batch_size: int = 8,
    held_out_tokens: int = HELD_OUT_TOKENS,
    fit_tokens: int = 16_384,
    sensitivity_tokens: int = 8192,
    steps: int = 400,
    batch_tokens: int = 1024,
    device: str = "auto",
    commit: Annotated[
        str | None, typer.Option(help="Commit to name where there is no git to ask.")
    ] = None,
) -> None:
    """Measure every setting with every seed, then write the results."""
    start = time.monotonic()
    values = {
        "data": data,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "fit_tokens": fit_tokens,
        "sensitivity_tokens": sensitivity_tokens,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "device": device,
    }
    bench = Bench(checkpoint, work, values, held_out, held_out_tokens)
    settings = settings_of(
        bench, numbers(expert_bits), numbers(whole_bits), [int(g) for g in numbers(groups)]
    )
    # Seeds outside, so that processes side by side seldom wait for each other's artifacts.
    for setting, seed in part_of([(one, s) for s in range(seeds) for one in settings], part):
        measured(bench, setting, seed)
    if part is not None:
        return
    teacher, found = gathered(bench, settings, seeds)
    meta = _meta(bench, seeds, commit, time.monotonic() - start)
    written = report_json({}, [teacher, *(row for rows in found.values() for row in rows)])["rows"]
    forms = [None, *(setting.form for setting, rows in found.items() for _ in rows)]
    rows = [{"form": form, **row} for form, row in zip(forms, written, strict=True)]
    write_json(results / f"{name}.json", {"meta": meta, "rows": rows})
    plot(found, results / f"{name}.png")
    write_text(results / f"{name}.md", report(found, meta, f"{name}.png"))


def _meta(bench: Bench, seeds: int, commit: str | None, seconds: float) -> dict[str, Any]:
    job = bench.plain
    meta = machine_meta(
        f"python {shlex.join(sys.argv)}",
        device=job.device,
        data=bench.text.to_json(),
        calibration={**asdict(job.calibration), "data": None},
        distillation=asdict(job.distillation),
        seeds=list(range(seeds)),
        seconds=round(seconds, 1),
    )
    return meta | {"commit": commit or meta["commit"]}


if __name__ == "__main__":
    sys.exit(typer.run(main))
