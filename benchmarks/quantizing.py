"""Every scheme of ``moefuse quantize`` on the bundled teacher fused to 8 groups, and on itself.

    python benchmarks/quantizing.py --out runs/quantizing

One table: KL to the teacher on held-out text, bytes of weights on disk, resident memory that
loading adds, and greedy tokens per second (the median of several), each model in a process of its
own without moefuse. Leaves ``quantizing.json`` and ``.md`` in ``results/``. What is made of the
unfused teacher is what Transformers makes of it: libraries skip its stacked experts;
compressed-tensors is written expert by expert here, rounded to the nearest.
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
from moefuse.export.quantized import compressed
from moefuse.mathematics.integers import nearest
from moefuse.pipeline import fuse
from moefuse.quantize import quantize

GROUPS, TOKENS, LENGTH, REPEATS = 8, 8192, 256, 3
DATA = {"data": str(demo.calibration_path()), "tokens": 16_384}
PLAIN = {"scales": "widest"}
CASES: dict[str, dict[str, Any]] = {
    "w4a16, plain": {"scheme": "w4a16", **PLAIN},
    "w4a16, refit": {"scheme": "w4a16", "refit": True, **DATA},
    "gptq": {"scheme": "gptq", **DATA},
    "gptq, refit": {"scheme": "gptq", "refit": True, **DATA},
    "w8a16": {"scheme": "w8a16", **DATA},
    "w8a8": {"scheme": "w8a8", **DATA},
    "fp8": {"scheme": "fp8", **DATA},
    "nf4": {"scheme": "nf4", **DATA},
    "int4-torchao": {"scheme": "int4-torchao", **DATA},
}
RESULTS = Path(__file__).with_name("results")
ON_TEACHER = ("w4a16", "w8a16", "w8a8", "fp8")


def quantize_teacher(scheme: str, out: Path) -> None:
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


def measure(path: Path, texts: Path, method: str) -> dict[str, float]:
    """Load a model by Transformers alone, in this process, and measure it."""
    import psutil  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        BitsAndBytesConfig,
    )

    options: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": True}
    if method == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    before = psutil.Process().memory_info().rss
    model: Any = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    memory = psutil.Process().memory_info().rss - before
    prompt = torch.arange(5, 21)[None]
    spent = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=48, min_new_tokens=48, do_sample=False)
        spent.append(time.perf_counter() - start)
    speed = 48 / median(spent[1:])
    teacher = AutoModelForCausalLM.from_pretrained(demo.teacher_path(), dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in json.loads(texts.read_text()):
            wanted = teacher(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            got = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            total += float((wanted.exp() * (wanted - got)).sum())
            count += len(ids) - 1
    disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return {"kl": total / count, "disk": disk, "memory": memory, "speed": speed}


def measured_apart(path: Path, texts: Path, method: str = "") -> dict[str, float]:
    """Measure a model in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), str(texts), method]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{path} was not measured:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def write_texts(path: Path) -> None:
    """Write the held-out text as the tokens that all models read."""
    documents = corpus.load_documents(str(demo.heldout_path()))
    sequences = corpus.tokenize(
        documents, load_tokenizer(demo.teacher_path()), LENGTH, limit_tokens=TOKENS
    )
    artifacts.write_json(path, [sequence.tolist() for sequence in sequences])


def cell(row: dict[str, Any]) -> str:
    """Return a row's figures as cells of a table in Markdown."""
    sizes = f"{row['disk'] / 1e6:.2f} MB | {row['memory'] / 1e6:.0f} MB"
    return f"{row['kl']:.4f} | {sizes} | {row['speed']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizing"))
    parser.add_argument("--measure", nargs=3)
    given = parser.parse_args()
    if given.measure:
        path, texts, method = given.measure
        print(json.dumps(measure(Path(path), Path(texts), method)))
        return
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    fused, texts = out / "fused", out / "texts.json"
    if not fused.exists():
        fuse(demo.teacher_path(), fused, {"groups": GROUPS, "tokens": 98_304, "steps": 120})
    write_texts(texts)
    rows: list[dict[str, Any]] = []

    def add(name: str, path: Path, method: str = "") -> None:
        rows.append({"model": name, **measured_apart(path, texts, method)})
        print(f"| {name} | {cell(rows[-1])} |", flush=True)

    add("fused, bf16", fused)
    for name, values in CASES.items():
        made = out / name.replace(", ", "-").replace(" ", "-")
        if not made.exists():
            quantize(fused, made, values)
        add(f"fused, {name}", made)
    add("teacher, bf16", demo.teacher_path())
    for scheme in ON_TEACHER:
        made = out / f"teacher-{scheme}"
        if not made.exists():
            quantize_teacher(scheme, made)
        add(f"teacher, {scheme}", made)
    add("teacher, nf4 (experts skipped)", demo.teacher_path(), "nf4")
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Write the rows and their table."""
    meta = machine_meta("make quantizing", device="cpu")
    artifacts.write_json(RESULTS / "quantizing.json", {"meta": meta, "rows": rows})
    told = (
        f"By `make quantizing`: the bundled teacher fused to {GROUPS} groups and the teacher "
        f"itself, computed in bf16 on {meta['cpu']}, {meta['cores']} cores; {TOKENS} tokens of "
        f"held-out text, medians of {REPEATS}."
    )
    titles = ["| model | KL | disk | memory | tokens/s |", "| --- | --- | --- | --- | --- |"]
    lines = [f"| {row['model']} | {cell(row)} |" for row in rows]
    text = "\n".join(["# Quantised students", "", told, "", *titles, *lines, ""])
    artifacts.write_text(RESULTS / "quantizing.md", text)


if __name__ == "__main__":
    main()
