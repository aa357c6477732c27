"""Requests and tokens a second and resident memory of vLLM: a teacher against its students.

Each is served alone by ``vllm serve`` and gets the same load: requests of mixed lengths, so many at
once. The teacher is run by vLLM's own class, on a CPU with what it needs there to be right
(docs/serving.md). Memory is that of all processes of the server, shared pages counted once, before
the load and at its end. Run it in the engines' environment:

    .venv-engines/bin/python benchmarks/serving.py TEACHER STUDENT ...
    python benchmarks/serving.py TEACHER STUDENT ... --at-once 1 8 32 128 --requests 512  # GPU
"""

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.machine import machine_meta
from moefuse.modeling import is_fused

sys.path.insert(0, str(Path(__file__).parents[1] / "tests_engines"))

from servers import Server, running

# vLLM's router on CPUs wants groups of experts where a DeepSeek model has none; one is the same.
TEACHER_FLAGS = ("--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}')
TEACHER_ENVIRONMENT = {"VLLM_MLA_DISABLE": "1"}


@dataclass(frozen=True)
class Load:
    """What every server is asked."""

    requests: int
    at_once: int
    longest_prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Measured:
    """One server under the load; memory in bytes."""

    model: str
    at_once: int
    requests_per_second: float
    new_tokens_per_second: float
    median_seconds: float
    checkpoint_bytes: int
    loaded_bytes: int
    peak_bytes: int


def prompts_of(load: Load, vocabulary: int) -> list[list[int]]:
    """Return the prompts, as token ids; the same for every server of one vocabulary."""
    draw = random.Random(0)
    lengths = [draw.randint(8, load.longest_prompt) for _ in range(load.requests)]
    return [[draw.randrange(5, vocabulary) for _ in range(length)] for length in lengths]


def memory_bytes(server: Server) -> int:
    """Return what the server's processes hold, a page that several share counted once in all."""
    root = psutil.Process(server.process.pid)
    return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])


def run_load(server: Server, load: Load, model: str, prompts: list[list[int]]) -> list[float]:
    """Send all requests, ``at_once`` of them at a time; return how long each took, in seconds."""
    client = server.client

    def ask(prompt: list[int]) -> float:
        start = time.monotonic()
        made = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=load.new_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert made.usage is not None
        assert made.usage.completion_tokens == load.new_tokens
        return time.monotonic() - start

    with ThreadPoolExecutor(load.at_once) as pool:
        return list(pool.map(ask, prompts))


def measure(path: Path, loads: list[Load], flags: list[str]) -> list[Measured]:
    """Serve one checkpoint and measure it under every load, after a warm-up."""
    config = json.loads((path / "config.json").read_text())
    command = ["vllm", "serve", str(path), "--no-enable-prefix-caching", *flags]
    environment: dict[str, str] = {}
    if not is_fused(config) and not torch.cuda.is_available():
        command += TEACHER_FLAGS
        if config.get("topk_group", 1) is None:
            command += ("--hf-overrides", json.dumps({"n_group": 1, "topk_group": 1}))
        environment = TEACHER_ENVIRONMENT
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command, Path(folder) / "log", **environment) as server,
    ):
        for load in loads:
            prompts = prompts_of(load, config["vocab_size"])
            run_load(server, load, str(path), prompts[: 2 * load.at_once])
            before = memory_bytes(server)
            start = time.monotonic()
            took = sorted(run_load(server, load, str(path), prompts))
            seconds = time.monotonic() - start
            found.append(
                Measured(
                    model=path.name,
                    at_once=load.at_once,
                    requests_per_second=load.requests / seconds,
                    new_tokens_per_second=load.requests * load.new_tokens / seconds,
                    median_seconds=took[len(took) // 2],
                    checkpoint_bytes=sum(f.stat().st_size for f in path.glob("*.safetensors")),
                    loaded_bytes=before,
                    peak_bytes=memory_bytes(server),
                )
            )
    return found


def table(rows: list[Measured]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| Model | At once | Requests/s | New tokens/s | Median request | Weights | Memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.model} | {row.at_once} | {row.requests_per_second:.2f} "
        f"| {row.new_tokens_per_second:.0f} | {row.median_seconds:.2f} s "
        f"| {row.checkpoint_bytes / 1e6:.1f} MB | {row.peak_bytes / 1e9:.2f} GB |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the command line names, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--longest-prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving"))
    options, flags = parser.parse_known_args()
    loads = [
        Load(options.requests, at_once, options.longest_prompt, options.new_tokens)
        for at_once in options.at_once
    ]
    rows: list[Measured] = []
    for path in options.checkpoints:
        rows += measure(path, loads, flags)
        print(table(rows), flush=True)
    details: dict[str, Any] = {"loads": [asdict(load) for load in loads], "flags": flags}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = machine_meta(" ".join(sys.argv), device=device, **details)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_suffix(".json"), {"meta": meta, "rows": [asdict(r) for r in rows]})
    write_text(options.out.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
