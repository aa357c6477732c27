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
import time
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
    """Run a command; return its status, what it printed, its seconds and its greatest memory."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(list(map(str, command)), stdout=printed, stderr=printed)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    spent = {"seconds": time.perf_counter() - begun, "peak": used.ru_maxrss * 1024}
    return process.returncode, text.strip(), spent


def told(*command: str | Path) -> tuple[str, dict[str, float]]:
    """Run a command that has to succeed; return its last line and what it took."""
    status, printed, spent = run(*command)
    if status:
        sys.exit(printed[-2000:])
    return printed.splitlines()[-1], spent


def made(python: Path, name: str, student: Path, out: Path) -> dict[str, Any]:
    """Round ``student`` into ``out``; return what it took and how many tokens bases saw."""
    options, tokens = CASES[name], ("--tokens", str(TOKENS))
    if name.startswith("moefuse"):
        calibrated = tokens if TEXT in options else ()
        command = [*OWN, student, out, *options, *calibrated, "--group-size", "32"]
        _, spent = told(*command, "--delta-bits", "16", "--overwrite")
        return dict(spent)
    said, spent = told(python, EXAMPLE, student, out, TEXT, *options, *tokens)
    told(python, "-c", GENERATES, out)
    return {**spent, "said": said}


def awq(python: Path, student: Path, out: Path, way: str) -> str | None:
    """Try llm-compressor's AWQ; return the line that it ended with, or None where it saved."""
    status, printed, _ = run(python, AWQ, student, out, TEXT, way)
    return printed.splitlines()[-1] if status else None


def measured(python: Path, out: Path) -> list[dict[str, Any]]:
    """Make all students and measure them."""
    out.mkdir(parents=True, exist_ok=True)
    fused, texts = out / "fused", out / "texts.json"
    if not fused.exists():
        fuse(demo.teacher_path(), fused, {"groups": GROUPS, "tokens": TOKENS, "steps": 120})
    write_texts(texts, HELD_OUT)
    rows: list[dict[str, Any]] = []

    def add(name: str, path: Path, spent: dict[str, Any]) -> None:
        figures = measured_apart(path, texts, fused)
        added = figures["kl"] - (rows[0] if rows else figures)["kl"]
        rows.append({"model": name, **figures, "added": added, **spent})
        print(line(rows[-1]), flush=True)

    add("fused, bf16", fused, {})
    for name in CASES:
        path = out / name.replace(", ", "-").replace(" ", "-")
        add(name, path, made(python, name, fused, path))
    for way in AWQ_WAYS:
        name, path = f"llm-compressor, AWQ, {way}", out / f"llm-compressor-awq-{len(rows)}"
        error = awq(python, fused, path, way)
        if error is None:
            add(name, path, {})
        else:
            rows.append({"model": name, "error": error})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return a row of the table in Markdown."""
    if "error" in row:
        return f"| {row['model']} | `{row['error']}` | | | | | | |"
    spent = ("", "")
    if "seconds" in row:
        spent = (f"{row['seconds']:.0f} s", f"{row['peak'] / 1e6:.0f} MB")
    cells = (f"{row['kl']:.5f}", f"{row['added']:+.5f}", f"{row['kl_fused']:.5f}")
    disk = f"{row['disk'] / 1e6:.2f} MB"
    return f"| {' | '.join([row['model'], *cells, disk, *spent, row.get('said', '')])} |"


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
    names = ("rounded by", "KL", "added", "KL to the fused", "disk", "time", "memory", "")
    titles = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    lines = ["# llm-compressor beside moefuse", "", text, "", *titles, *map(line, rows), ""]
    artifacts.write_text(RESULTS / "llm_compressor.md", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="where llm-compressor is")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizing"))
    given = parser.parse_args()
    versions = json.loads(told(given.python, "-c", VERSIONS)[0])
    report(measured(given.python, given.out), versions)


if __name__ == "__main__":
    main()
