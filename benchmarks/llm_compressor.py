"""llm-compressor's GPTQ and AWQ on a fused student, beside moefuse's own.

    python benchmarks/llm_compressor.py --python .venv-llm-compressor/bin/python

The bundled teacher fused to 8 groups, bases alone rounded to 4 bits in groups of 32 by the same
text; nothing is refitted and deltas stay in 16 bits, as llm-compressor leaves them. It runs by
``examples/llm_compressor_gptq.py`` in an environment of its own, given by its interpreter, without
moefuse. What it wrote has to generate there, and is then loaded here, by another Transformers, and
measured as ``benchmarks/quantizing.py`` does. Its AWQ is tried as a user would, and is told by the
error it ends with. Leaves ``llm_compressor.json`` and ``.md`` in ``results/``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantizing import GROUPS, RESULTS, measured_apart, write_texts

from moefuse import artifacts, demo
from moefuse.evaluation.machine import machine_meta
from moefuse.pipeline import fuse

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "llm_compressor_gptq.py"
AWQ = Path(__file__).with_name("llm_compressor_awq.py")
HELD_OUT, TOKENS = 24_576, 98_304
TEXT = str(demo.calibration_path())
OWN = [sys.executable, "-c", "from moefuse.cli import main; main()", "quantize"]
CASES = {
    "moefuse, w4a16, plain": ["--scheme", "w4a16", "--scales", "widest"],
    "moefuse, gptq": ["--scheme", "gptq", "--data", TEXT, "--no-refit"],
    "moefuse, awq": ["--scheme", "awq", "--data", TEXT, "--no-refit"],
    "llm-compressor, GPTQ": ["--observer", "minmax"],
    "llm-compressor, GPTQ, observer mse": ["--observer", "mse"],
}
AWQ_WAYS = ("default", "up to down", "up to down, unpinned")
GENERATES = """
import sys, torch
sys.modules["moefuse"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
print(model.generate(torch.arange(5, 21)[None], max_new_tokens=8, do_sample=False)[0].tolist())
"""
VERSIONS = """
import json
from importlib.metadata import version
names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
print(json.dumps({name: version(name) for name in names}))
"""


def run(*command: str | Path) -> tuple[int, str, dict[str, float]]:
    """Run a command; return its status, what it printed, its CPU seconds and greatest memory."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(list(map(str, command)), stdout=printed, stderr=printed)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    spent = {"seconds": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}
    return process.returncode, text.strip(), spent


def told(*command: str | Path) -> tuple[str, dict[str, float]]:
    """Run a command that has to succeed; return what it printed and what it took."""
    status, printed, spent = run(*command)
    if status:
        sys.exit(printed[-2000:])
    return printed, spent


def made(python: Path, name: str, student: Path, out: Path) -> dict[str, float]:
    """Round ``student`` into ``out``; return what it took."""
    options, tokens = CASES[name], ("--tokens", str(TOKENS))
    if name.startswith("moefuse"):
        calibrated = tokens if TEXT in options else ()
        command = [*OWN, student, out, *options, *calibrated, "--group-size", "32"]
        _, spent = told(*command, "--delta-bits", "16", "--overwrite")
        return spent
    _, spent = told(python, EXAMPLE, student, out, TEXT, *options, *tokens)
    told(python, "-c", GENERATES, out)
    return spent


def awq(python: Path, student: Path, out: Path, way: str) -> str | None:
    """Try llm-compressor's AWQ; return the line that it ended with, or None where it saved."""
    status, printed, _ = run(python, AWQ, student, out, TEXT, way)
    return printed.splitlines()[-1] if status else None


def measured(python: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Make all students, measure them and yield their rows."""
    out.mkdir(parents=True, exist_ok=True)
    fused, texts = out / "fused", out / "texts.json"
    if not fused.exists():
        fuse(demo.teacher_path(), fused, {"groups": GROUPS, "tokens": TOKENS, "steps": 120})
    write_texts(texts, HELD_OUT)
    begun = measured_apart(fused, texts, fused)
    yield {"model": "fused, bf16", **begun, "added": 0.0}

    def row(name: str, path: Path) -> dict[str, Any]:
        figures = measured_apart(path, texts, fused)
        return {"model": name, **figures, "added": figures["kl"] - begun["kl"]}

    for name in CASES:
        path = out / name.replace(", ", "-").replace(" ", "-")
        spent = made(python, name, fused, path)
        yield {**row(name, path), **spent}
    for way in AWQ_WAYS:
        name = f"llm-compressor, AWQ, {way}"
        path = out / name.replace(", ", "-").replace(" ", "-")
        error = awq(python, fused, path, way)
        yield row(name, path) if error is None else {"model": name, "error": error}


def line(row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    if "error" in row:
        return f"| {row['model']} | `{row['error']}` | | | | | |"
    spent = ("", "")
    if "seconds" in row:
        spent = (f"{row['seconds']:.0f} s", f"{row['peak'] / 1e6:.0f} MB")
    cells = (f"{row['kl']:.5f}", f"{row['added']:+.5f}", f"{row['kl_fused']:.5f}")
    disk = f"{row['disk'] / 1e6:.2f} MB"
    return f"| {' | '.join([row['model'], *cells, disk, *spent])} |"


def report(rows: list[dict[str, Any]], versions: dict[str, str]) -> None:
    """Write the rows and their table."""
    meta = machine_meta("make llm-compressor", llm_compressor=versions)
    artifacts.write_json(RESULTS / "llm_compressor.json", {"meta": meta, "rows": rows})
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = (
        f"By `make llm-compressor`: the bundled teacher fused to {GROUPS} groups, bases in 4 bits, "
        f"groups of 32, {TOKENS} tokens of calibration, nothing refitted, deltas in 16 bits; on "
        f"{meta['cpu']}, {meta['cores']} cores. {installed} round, Transformers "
        f"{meta['transformers']} measures: KL on {HELD_OUT} tokens of held-out text in fp32."
    )
    names = ("rounded by", "KL", "added", "KL to the fused", "disk", "CPU time", "most memory")
    titles = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines = ["# llm-compressor beside moefuse", "", text, "", *titles, *map(line, rows), ""]
    artifacts.write_text(RESULTS / "llm_compressor.md", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="where llm-compressor is")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizing"))
    given = parser.parse_args()
    versions = json.loads(told(given.python, "-c", VERSIONS)[0])
    rows: list[dict[str, Any]] = []
    for row in measured(given.python, given.out):
        rows.append(row)
        print(line(row), flush=True)
        report(rows, versions)


if __name__ == "__main__":
    main()
