"""Text generated end to end: DeepSeek-Coder-V2-Lite's shapes, fused against original.

Both are of true size (the original 15.7 B parameters) and randomly initialised, which takes the
time that trained weights take; random routers spread tokens evenly. Transformers' ``generate``
writes new tokens after a prompt, greedily, for batches of several sizes: with a dynamic cache, and
with a static one, which compiles the model. The original runs with its fastest experts
implementation. Each model has a process of its own; both do everything once, which is when they
compile, at the same time, and are then timed in turn, cell by cell. Device memory is what was most
held by a process the first time, after the model was made.

    python benchmarks/generating.py --device cuda
    python benchmarks/generating.py --layers 2 --new-tokens 8          # a few minutes on a CPU
"""

import argparse
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DeepseekV2ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v2 import DeepseekV2Config

from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.machine import machine_meta
from moefuse.modeling import fused_classes

GROUPS, RANK = 8, 8
FUSED, ORIGINAL = "fused", "original"
PROMPT_TOKENS = 32
REPEATS = 5
READY = "ready"
LITE: dict[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "topk_method": "greedy",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""Sizes of DeepSeek-Coder-V2-Lite's ``config.json``."""


def make_model(name: str, layers: int, device: str) -> PreTrainedModel:
    """Make one of the two models, in bf16, random."""
    config: Any = DeepseekV2Config(**{**LITE, "num_hidden_layers": layers})
    kind: Any = DeepseekV2ForCausalLM
    if name == FUSED:
        config_class, _, kind = fused_classes("deepseek_v2")
        layer = {"groups": GROUPS, "rank": RANK, "delta": "low_rank", "scale": True, "bias": False}
        moe_layers = range(LITE["first_k_dense_replace"], layers)
        block = {"layers": {str(number): layer for number in moe_layers}}
        config = config_class(**{**config.to_dict(), "moefuse": block})
    else:
        config._experts_implementation = "grouped_mm" if device != "cpu" else None
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = kind(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def generated(model: PreTrainedModel, batch: int, new_tokens: int, *, static: bool) -> float:
    """Generate once; seconds."""
    generator = torch.Generator().manual_seed(batch)
    size = (batch, PROMPT_TOKENS)
    ids = torch.randint(5, LITE["vocab_size"], size, generator=generator).to(model.device)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    if static:
        options["cache_implementation"] = "static"
    start = time.perf_counter()
    model.generate(ids, do_sample=False, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(given: argparse.Namespace) -> None:
    """Measure one model: do everything once, then a cell for every line of input."""
    model = make_model(given.model, given.layers, given.device)
    parameters = sum(p.numel() for p in model.parameters())
    cuda = torch.device(given.device).type == "cuda"
    held: dict[tuple[bool, int], int | None] = {}
    sizes = [(static, batch) for static in (False, True) for batch in given.batches]
    for static, batch in sizes:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        spent = generated(model, batch, given.new_tokens, static=static)
        held[static, batch] = torch.cuda.max_memory_allocated() if cuda else None
        print(f"{given.model}, batch {batch}, static {static}: {spent:.0f} s at first", flush=True)
    print(READY, flush=True)
    for (static, batch), _ in zip(sizes, sys.stdin, strict=False):
        spent = [
            generated(model, batch, given.new_tokens, static=static) for _ in range(1 + REPEATS)
        ][1:]
        cell = {
            "model": given.model,
            "parameters": parameters,
            "cache": "static, compiled" if static else "dynamic",
            "batch": batch,
            "tokens_per_second": batch * given.new_tokens / median(spent),
            "spread": (max(spent) - min(spent)) / 2 / median(spent),
            "device_bytes": held[static, batch],
        }
        print(json.dumps(cell), flush=True)
        print(READY, flush=True)


def started(name: str, given: argparse.Namespace) -> subprocess.Popen:
    """Start one model's process."""
    command = [sys.executable, __file__, "--model", name, "--device", given.device]
    command += ["--layers", str(given.layers), "--new-tokens", str(given.new_tokens)]
    command += ["--batches", *map(str, given.batches)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def lines_until(process: subprocess.Popen, last: str) -> Iterator[str]:
    """Yield what a process prints, showing it, until it has printed ``last`` or has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.rstrip() == last:
            return
        print(line, end="", flush=True)
        yield line
    process.wait()


def of_models(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both models; what one was done with when it failed is kept."""
    processes = {name: started(name, given) for name in (FUSED, ORIGINAL)}
    for process in processes.values():
        deque(lines_until(process, READY), maxlen=0)
    cells = []
    for process in [*processes.values()] * 2 * len(given.batches):
        if process.poll() is None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        cells += [json.loads(line) for line in lines_until(process, READY) if line[0] == "{"]
    for name, process in processes.items():
        if process.wait():
            print(f"{name}: ended with status {process.returncode}")
    return cells


def table(cells: list[dict[str, Any]], given: argparse.Namespace, meta: dict[str, Any]) -> str:
    """Return the table in Markdown, fused beside original."""
    titles = ("cache", "batch", "fused, tokens/s", "original, tokens/s", "times")
    lines = [f"| {' | '.join(titles)} | fused, GB | original, GB |", "| --- |" + " ---: |" * 6]
    by_place = {(cell["model"], cell["cache"], cell["batch"]): cell for cell in cells}
    for (name, cache, batch), fused in by_place.items():
        if name != FUSED:
            continue
        both = fused, by_place.get((ORIGINAL, cache, batch))
        rates = [cell["tokens_per_second"] if cell else None for cell in both]
        times = f"{rates[0] / rates[1]:.2f}" if rates[0] and rates[1] else "-"
        sizes = [
            f"{cell['device_bytes'] / 1e9:.1f}" if cell and cell["device_bytes"] else "-"
            for cell in both
        ]
        figures = [*(f"{rate:,.1f}" if rate else "-" for rate in rates), times, *sizes]
        lines.append(f"| {cache} | {batch} | {' | '.join(figures)} |")
    told = (
        f"DeepSeek-Coder-V2-Lite's shapes, {given.layers} layers, random weights in bf16; {GROUPS} "
        f"fused experts of rank {RANK} against the original (grouped_mm on a GPU); "
        f"{given.new_tokens} new tokens after {PROMPT_TOKENS}, medians of {REPEATS}. "
        f"{meta['device']}, torch {meta['torch']}, transformers {meta['transformers']}."
    )
    return "\n".join(["# Generating", "", told, "", *lines, ""])


def main() -> None:
    """Measure both models and leave ``generating-DEVICE.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=LITE["num_hidden_layers"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--model", choices=(FUSED, ORIGINAL), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.model:
        measure(given)
        return
    cells = of_models(given)
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"generating-{torch.device(given.device).type}"
    meta = machine_meta("python benchmarks/generating.py", device=given.device)
    write_json(given.out / f"{name}.json", {"meta": meta, "rows": cells})
    write_text(given.out / f"{name}.md", table(cells, given, meta))


if __name__ == "__main__":
    main()
