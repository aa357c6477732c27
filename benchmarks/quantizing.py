"""Every scheme of ``moefuse quantize`` on the bundled teacher, fused to 8 groups and unfused.

    python benchmarks/quantizing.py --out runs/quantizing

One table: KL to the teacher and to the fused student on held-out text (computed in fp32, but by
libraries' own layers in bf16), what rounding added to the first, bytes of weights on disk, resident
memory that loading adds, and greedy tokens per second (the median of several), each model in a
process of its own without moefuse. Leaves ``quantizing.json`` and ``.md`` in ``results/``.

The unfused teacher goes through the same command: written as a student with a base for every expert
and nothing beside, which is the teacher to the number. What Transformers makes of the teacher's own
files stands below: libraries skip its stacked experts; compressed-tensors is written expert by
expert here, rounded to the nearest.

Deltas take 8 bits where a row does not say otherwise. ``--only`` names schemes as in ``CASES``,
semicolons between; ``--seed`` is that of fusing and refitting. With either, or another number of
tokens or steps, the table is only printed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moefuse import artifacts, corpus, demo
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.evaluation.loading import load_tokenizer
from moefuse.evaluation.machine import machine_meta
from moefuse.export.plain import named_experts, named_rest
from moefuse.export.quantized import compressed, libraries
from moefuse.export.quantized.schemes import whole_codes
from moefuse.mathematics.integers import Grid, nearest
from moefuse.pipeline import fuse
from moefuse.quantize import quantize

GROUPS, LENGTH, REPEATS = 8, 512, 3
TEXT = {"data": str(demo.calibration_path())}
DATA = {**TEXT, "refit": False}
REFIT = {**TEXT, "refit": True}
PLAIN = {"scales": "widest"}
CASES: dict[str, dict[str, Any]] = {
    "w4a16, plain, 16-bit deltas": {"scheme": "w4a16", **PLAIN, "delta_bits": "16"},
    "w4a16, plain": {"scheme": "w4a16", **PLAIN},
    "w4a16, plain, 4-bit deltas": {"scheme": "w4a16", **PLAIN, "delta_bits": "4"},
    "w4a16": {"scheme": "w4a16", **DATA},
    "w4a16, refit": {"scheme": "w4a16", **REFIT},
    "w4a16, refit, predictions": {"scheme": "w4a16", **REFIT, "prediction_steps": 120},
    "w4a16, refit, predictions, 4-bit deltas": {
        "scheme": "w4a16",
        **REFIT,
        "prediction_steps": 120,
        "delta_bits": "4",
    },
    "gptq": {"scheme": "gptq", **DATA},
    "gptq, refit": {"scheme": "gptq", **REFIT},
    "awq": {"scheme": "awq", **DATA},
    "awq, refit": {"scheme": "awq", **REFIT},
    "w8a16": {"scheme": "w8a16", **DATA},
    "w8a8": {"scheme": "w8a8", **DATA},
    "fp8": {"scheme": "fp8", **DATA},
    "nf4": {"scheme": "nf4"},
    "nf4, refit": {"scheme": "nf4", **REFIT},
    "int4-torchao": {"scheme": "int4-torchao"},
    "int4-torchao, refit": {"scheme": "int4-torchao", **REFIT},
    "hqq4": {"scheme": "hqq4"},
    "hqq4, refit": {"scheme": "hqq4", **REFIT},
}
LIBRARIES = ("nf4", "torchao", "hqq4")
"""Parts of the names of rows whose layers compute in the dtype that they were rounded from."""
RESULTS = Path(__file__).with_name("results")
SUBJECTS = {
    "fused": {"groups": GROUPS, "tokens": 98_304, "steps": 120},
    "teacher": {"groups": 64, "rank": 0, "scale": False, "tokens": 4_096, "steps": 0},
}
"""What is quantised, by the settings of ``fuse``; the second is the teacher, expert by expert."""
FILES = "teacher's own files"
WRITTEN_HERE = ("w4a16", "w8a16", "w8a8", "fp8")
GRID = Grid(4, 32)


def quantize_files(scheme: str, out: Path) -> None:
    """Write the unfused teacher with routed experts in compressed-tensors, linear by linear."""
    reader = CheckpointReader.open(demo.teacher_path())
    layout, family = compressed.LAYOUTS[scheme], reader.family
    grid = compressed.grid_of(layout, {reader.shape.hidden, reader.shape.intermediate}, None)
    stay: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from named_rest(reader, None, None)
        for layer in range(family.layer_count(reader.config)):
            yield from named_rest(reader, layer, None)
            if layer not in reader.shape.layers:
                continue
            for name, weight_OI in named_experts(family, layer, reader.read_experts(layer)):
                rounded = nearest(weight_OI, grid, weight_OI.dtype, search=False, energy_I=None)
                yield from compressed.parts(name.removesuffix(".weight"), rounded, layout).items()

    partial = artifacts.partial_directory(out)
    with ShardedWriter(partial) as writer:
        for name, tensor in tensors():
            writer.add(name, tensor)
            if ".experts." not in name and name.endswith(".weight") and tensor.dim() == 2:
                stay.append(name.removesuffix(".weight"))
    settings = compressed.settings(layout, grid, stay)
    artifacts.write_json(
        partial / "config.json", {**reader.config, "quantization_config": settings}
    )
    artifacts.finish_directory(partial, out)


def loaded(path: Path, dtype: torch.dtype, method: str = "") -> Any:
    """Load a model by Transformers alone; ``method`` is a scheme that it is to be rounded by."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": True}
    if method:
        options["quantization_config"] = libraries.settings(method, dtype, ["lm_head"], GRID)
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def measure(path: Path, texts: Path, fused: Path, method: str) -> dict[str, float]:
    """Measure a model in this process, loaded by Transformers alone."""
    import psutil  # noqa: PLC0415

    before = psutil.Process().memory_info().rss
    model: Any = loaded(path, torch.bfloat16, method)
    memory = psutil.Process().memory_info().rss - before
    prompt = torch.arange(5, 21)[None]
    spent = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=48, min_new_tokens=48, do_sample=False)
        spent.append(time.perf_counter() - start)
    speed = 48 / median(spent[1:])
    if not any(part in f"{path.name} {method}" for part in LIBRARIES):
        model = loaded(path, torch.float32)
    judges = {"kl": demo.teacher_path(), "kl_fused": fused}
    told = {name: loaded(judge, torch.float32) for name, judge in judges.items()}
    total, count = dict.fromkeys(judges, 0.0), 0
    with torch.no_grad():
        for ids in json.loads(texts.read_text()):
            got = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            for name, judge in told.items():
                wanted = judge(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                total[name] += float((wanted.exp() * (wanted - got)).sum())
            count += len(ids) - 1
    disk = disk_of(path)
    means = {name: value / count for name, value in total.items()}
    return {**means, "disk": disk, "memory": memory, "speed": speed}


def disk_of(path: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measured_apart(path: Path, texts: Path, fused: Path, method: str = "") -> dict[str, float]:
    """Measure a model in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), str(texts), str(fused), method]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise NotMeasuredError(path, ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


class NotMeasuredError(RuntimeError):
    """What the process that was to measure a model ended with; ``reason`` is its last line."""

    def __init__(self, path: Path, printed: str) -> None:
        super().__init__(f"{path} was not measured:\n{printed[-2000:]}")
        self.reason = printed.strip().splitlines()[-1].partition(" For details")[0]


def write_texts(path: Path, tokens: int) -> None:
    """Write the held-out text as the tokens that all models read."""
    documents = corpus.load_documents(str(demo.heldout_path()))
    sequences = corpus.tokenize(
        documents, load_tokenizer(demo.teacher_path()), LENGTH, limit_tokens=tokens
    )
    artifacts.write_json(path, [sequence.tolist() for sequence in sequences])


def cell(row: dict[str, Any]) -> str:
    """Return a row's figures as cells of a table in Markdown."""
    if "reason" in row:
        return f"not loaded: {row['reason']} |  |  | {row['disk'] / 1e6:.2f} MB |  | "
    sizes = f"{row['disk'] / 1e6:.2f} MB | {row['memory'] / 1e6:.0f} MB"
    fused = "" if row["added"] is None else f"{row['added']:+.5f} | {row['kl_fused']:.5f}"
    return f"{max(row['kl'], 0.0):.5f} | {fused or ' | '} | {sizes} | {row['speed']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizing"))
    parser.add_argument("--held-out", type=int, default=24_576, help="tokens that measure")
    parser.add_argument("--tokens", type=int, default=98_304, help="tokens of calibration")
    parser.add_argument("--steps", type=int, help="steps of refitting [default: quantize's]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--measure", nargs=4)
    given = parser.parse_args()
    if given.measure:
        path, texts, fused, method = given.measure
        print(json.dumps(measure(Path(path), Path(texts), Path(fused), method)))
        return
    rows = measured(given)
    same = ("held_out", "tokens", "steps", "seed", "only")
    if all(getattr(given, name) == parser.get_default(name) for name in same):
        report(rows, given.held_out)


class Rows(list[dict[str, Any]]):
    """The table's rows as they are measured; every one is printed as it comes."""

    def __init__(self, texts: Path, fused: Path) -> None:
        super().__init__()
        self.texts, self.fused = texts, fused

    def add(self, name: str, path: Path, method: str = "") -> None:
        """Measure a model. Those of the teacher's own files may say why they cannot be loaded."""
        try:
            row: dict[str, Any] = measured_apart(path, self.texts, self.fused, method)
        except NotMeasuredError as error:
            if not name.startswith(FILES):
                raise
            row = {"disk": disk_of(path), "reason": error.reason}
        begun = self[0]["kl"] if self else row["kl"]
        added = row["kl"] - begun if name.startswith("fused") else None
        self.append({"model": name, **row, "added": added})
        print(f"| {name} | {cell(self[-1])} |", flush=True)


def measured(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Make what is not there yet and measure it."""
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    texts = out / "texts.json"
    seed = {"seed": given.seed}
    write_texts(texts, given.held_out)
    rows = Rows(texts, out / "fused")
    text = {"tokens": given.tokens, "steps": given.steps, **seed}
    only = [part.strip() for part in given.only.split(";") if part]
    for subject, sizes in SUBJECTS.items():
        model = out / subject
        if not model.exists():
            fuse(demo.teacher_path(), model, {**sizes, **seed})
        rows.add(f"{subject}, bf16", model)
        for name, values in cases_of(subject):
            if only and name not in only:
                continue
            made = out / f"{subject}-{name.replace(', ', '-').replace(' ', '-')}"
            if not made.exists():
                quantize(model, made, {**values, **(text if "data" in values else {})})
            rows.add(f"{subject}, {name}", made)
    if not only:
        add_files(rows, out)
    return rows


def cases_of(subject: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the cases that there are of a model; experts of the teacher have no deltas to teach."""
    for name, values in CASES.items():
        needs_deltas = "delta_bits" in values or "prediction_steps" in values
        learns_deltas_alone = values.get("refit") and not whole_codes(values["scheme"])
        if subject == "fused" or not (needs_deltas or learns_deltas_alone):
            yield name, values


def add_files(rows: Rows, out: Path) -> None:
    """Measure the teacher's own files as they are and under what Transformers makes of them."""
    rows.add(f"{FILES}, bf16", demo.teacher_path())
    for scheme in WRITTEN_HERE:
        made = out / f"files-{scheme}"
        if not made.exists():
            quantize_files(scheme, made)
        rows.add(f"{FILES}, {scheme}", made)
    for scheme in libraries.SCHEMES:
        rows.add(f"{FILES}, {scheme} (experts skipped)", demo.teacher_path(), scheme)


def report(rows: list[dict[str, Any]], tokens: int) -> None:
    """Write the rows and their table."""
    meta = machine_meta("make quantizing", device="cpu")
    artifacts.write_json(RESULTS / "quantizing.json", {"meta": meta, "rows": rows})
    told = (
        f"By `make quantizing`: the bundled teacher fused to {GROUPS} groups, the teacher through "
        "the same command (a base for every expert, nothing beside) and what Transformers makes of "
        f"its own files, on {meta['cpu']}, {meta['cores']} cores; KL on {tokens} tokens of "
        "held-out text in fp32 (in bf16 by libraries' layers), tokens per second in bf16, medians "
        f"of {REPEATS}."
    )
    names = ("model", "KL", "added", "KL to the fused", "disk", "memory", "tokens/s")
    titles = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines = [f"| {row['model']} | {cell(row)} |" for row in rows]
    text = "\n".join(["# Quantised students", "", told, "", *titles, *lines, ""])
    artifacts.write_text(RESULTS / "quantizing.md", text)


if __name__ == "__main__":
    main()
