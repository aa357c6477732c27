"""Tokens a second of fused GGUF files in llama.cpp on the CPU, beside their teachers' own files.

For every way of storing numbers, a teacher's file and its students' are loaded together and asked
in turn, so that whatever else the machine does falls on all of them alike: new tokens after a short
prompt, for one sequence and for several at once, and a long prompt read. Medians of some rounds.

Two teachers: the bundled one, which is tiny, and a larger one of the same architecture with random
weights, whose students are random too: speed does not ask what the numbers are. It needs the engine
that ``make llama-cpp`` builds:

    make llama-cpp llama-cpp-speed
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moefuse import demo
from moefuse.artifacts import write_json, write_text
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.evaluation.machine import machine_meta
from moefuse.export.assemble import assemble
from moefuse.export.gguf.write import export_gguf
from moefuse.sizes import LayerPlan, make_experts

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from llama.together import Together

RESULTS = Path(__file__).parent / "results/llama_cpp"
QUANTS = ("F16", "Q8_0", "Q4_K_M")
LARGER = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
FORMS = {"bundled": ((8, 8), (2, 8)), "larger": ((8, 32), (2, 32))}
"""Students of each teacher: groups and rank."""
PROMPT, LONG = 16, 256


@dataclass(frozen=True)
class Row:
    """One file asked in one way; speeds are medians in tokens a second over all sequences."""

    model: str
    method: str
    groups: int | None
    rank: int | None
    quant: str
    sequences: int
    file_bytes: int
    new_tokens_per_second: float
    prompt_tokens_per_second: float


def larger_teacher(out: Path) -> Path:
    """Save a random model with the bundled teacher's tokenizer."""
    config = AutoConfig.from_pretrained(demo.teacher_path(), **LARGER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(demo.teacher_path()).save_pretrained(out)
    return out


def random_student(teacher: Path, out: Path, groups: int, rank: int) -> Path:
    """Save a student of ``teacher`` with random bases, deltas and scales, as ``fuse`` would."""
    reader = CheckpointReader.open(teacher)
    plan = LayerPlan(groups, rank, scale=True)

    def state(_: int) -> dict[str, torch.Tensor]:
        module = make_experts(reader.shape, plan, "cpu")
        module.reset_parameters()
        return module.state_dict()

    assemble(
        reader,
        dict.fromkeys(reader.shape.layers, plan),
        state,
        out,
        dtype=torch.bfloat16,
        max_shard_bytes=4_000_000_000,
        job="random",
        tokenizer_class=None,
        describe=lambda folder: write_text(folder / "README.md", "Random weights."),
    )
    return out


def checkpoints(model: str, home: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield a teacher and its students, each with what a row says of it."""
    teacher = demo.teacher_path() if model == "bundled" else larger_teacher(home / "teacher")
    yield {"model": model, "method": "teacher", "groups": None, "rank": None}, teacher
    for groups, rank in FORMS[model]:
        student = random_student(teacher, home / f"{groups}-{rank}", groups, rank)
        yield {"model": model, "method": "fused", "groups": groups, "rank": rank}, student


def timed(engine: Together, prompt: int, new: int) -> tuple[float, float]:
    """Return tokens a second of reading ``prompt`` tokens and of ``new`` steps after them."""
    count = len(engine.used)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 4000, (count, prompt + new), generator=draw).tolist()
    engine.forget()
    begun = time.perf_counter()
    engine.feed([row[:prompt] for row in ids])
    read = time.perf_counter()
    for step in range(prompt, prompt + new):
        engine.feed([row[step : step + 1] for row in ids])
    done = time.perf_counter()
    return count * prompt / (read - begun), count * new / (done - read) if new else 0.0


def measure(
    files: list[Path], sequences: int, given: argparse.Namespace
) -> list[tuple[float, float]]:
    """Return prompt and new tokens a second of each file, medians of rounds taken in turn."""
    rounds: list[list[tuple[float, float]]] = [[] for _ in files]
    long = LONG // sequences
    with ExitStack() as stack:
        engines = [
            stack.enter_context(Together(path, sequences, LONG, threads=given.threads, exact=False))
            for path in files
        ]
        for number in range(given.rounds + 1):
            for engine, found in zip(engines, rounds, strict=True):
                read, _ = timed(engine, long, 0)
                _, made = timed(engine, PROMPT, given.new)
                if number:  # the first round warms up
                    found.append((read, made))
    return [medians(found) for found in rounds]


def medians(found: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the medians of what was measured in pairs."""
    read, made = zip(*found, strict=True)
    return statistics.median(read), statistics.median(made)


def compare(model: str, given: argparse.Namespace) -> Iterator[Row]:
    """Write the files of one teacher and its students, and measure them."""
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        home = Path(folder)
        told = list(checkpoints(model, home))
        for quant in QUANTS:
            files = [home / f"{number}.gguf" for number in range(len(told))]
            for (_, checkpoint), path in zip(told, files, strict=True):
                export_gguf(checkpoint, path, quant=quant, pre_tokenizer="qwen2", overwrite=True)
            for sequences in (1, 8):
                found = measure(files, sequences, given)
                for (what, _), path, (read, made) in zip(told, files, found, strict=True):
                    yield Row(
                        **what,
                        quant=quant,
                        sequences=sequences,
                        file_bytes=path.stat().st_size,
                        new_tokens_per_second=round(made, 1),
                        prompt_tokens_per_second=round(read, 1),
                    )


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, each with how many times its teacher's speed it has."""
    lines = [
        "| Model | Stored as | File | New tokens/s, 1 sequence | 8 sequences | Prompt tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in (row for row in rows if row.sequences == 1):
        same = [
            r for r in rows if (r.model, r.groups, r.quant) == (row.model, row.groups, row.quant)
        ]
        own = [r for r in rows if (r.model, r.groups, r.quant) == (row.model, None, row.quant)]
        speeds = [r.new_tokens_per_second for r in same] + [row.prompt_tokens_per_second]
        against = [r.new_tokens_per_second for r in own] + [own[0].prompt_tokens_per_second]
        name = (
            f"{row.model} teacher"
            if row.groups is None
            else f"fused, {row.groups} groups, rank {row.rank}"
        )
        cells = [
            f"{speed:,.0f}" + ("" if row.groups is None else f" ({speed / base:.2f} x)")
            for speed, base in zip(speeds, against, strict=True)
        ]
        lines.append(
            f"| {name} | {row.quant} | {row.file_bytes / 1e6:,.1f} MB | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    told = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    told.add_argument("--models", nargs="+", default=list(FORMS), choices=list(FORMS))
    told.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    told.add_argument("--rounds", type=int, default=5)
    told.add_argument("--new", type=int, default=32, help="new tokens of each sequence in a round")
    told.add_argument("--scratch", help="where files are written meanwhile, some 5 GB")
    given = told.parse_args()
    rows: list[Row] = []
    for model in given.models:
        for row in compare(model, given):
            print(row, flush=True)
            rows.append(row)
    details = {"threads": given.threads, "rounds": given.rounds, "new_tokens": given.new}
    meta = machine_meta(
        "benchmarks/llama_cpp_speed.py", engine="llama-cpp-python 0.3.36", **details
    )
    write_json(RESULTS.with_suffix(".json"), {"meta": meta, "rows": [asdict(row) for row in rows]})
    by = f"Written by `make llama-cpp-speed`, threads: {given.threads}, commit `{meta['commit']}`."
    written = f"{table(rows)}\n\n{by}\n"
    write_text(RESULTS.with_suffix(".md"), written)
    print(written)


if __name__ == "__main__":
    main()
