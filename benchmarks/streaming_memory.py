"""How much memory fusing takes: a teacher far larger than the memory that the job may have.

Writes a random DeepSeek-V2 teacher in bf16 to a temporary directory, a layer at a time, then runs
``moefuse fuse`` on it as a process of its own and samples that process's resident memory. Random
weights serve: memory and time do not depend on what they say. Leaves ``streaming_memory.json``,
``.md`` and ``.png`` in ``results/`` and removes the teacher.

    python benchmarks/streaming_memory.py            # 4.6 GB, some minutes on two cores
    python benchmarks/streaming_memory.py --layers 2 # a quick look
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moefuse.artifacts import write_atomically, write_json, write_text
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.console import track
from moefuse.evaluation.machine import machine_meta
from moefuse.families import family_of

LIMIT_BYTES = 2_500_000_000
SAMPLE_SECONDS = 0.02
KEPT_SAMPLES = 600
STAGES = ("check", "calibrate", "group", "factor", "distil", "assemble")
COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
CONFIG = {
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
    "intermediate_size": 2048,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "topk_method": "greedy",
}
# One round of factoring: singular values take most of the time and memory does not depend on it.
SETTINGS = {
    "groups": 8,
    "rank": 8,
    "alternations": 0,
    "tokens": 4096,
    "sequence-length": 256,
    "batch-size": 4,
    "steps": 10,
    "batch-tokens": 256,
}


def write_teacher(directory: Path, moe_layers: int) -> int:
    """Write the teacher, one shard a layer or so, and return its bytes."""
    config = AutoConfig.for_model("deepseek_v2", **CONFIG, num_hidden_layers=moe_layers + 1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family = family_of(config.to_dict())
    shape = family.shape(config.to_dict())
    generator = torch.Generator().manual_seed(0)
    total = 0
    with ShardedWriter(directory, 250_000_000) as writer:

        def add(name: str, size: tuple[int, ...]) -> None:
            nonlocal total
            tensor = torch.ones(size)
            if len(size) > 1:
                tensor.normal_(std=size[-1] ** -0.5, generator=generator)
            writer.add(name, tensor.bfloat16())
            total += 2 * tensor.numel()

        for name, tensor in model.state_dict().items():
            if ".experts." not in name:
                add(name, tuple(tensor.shape))
        for layer in track(shape.layers, "Writing the teacher"):
            for expert in range(shape.experts):
                names = family.expert_names(layer, expert)
                add(names.gate, (shape.intermediate, shape.hidden))
                add(names.up, (shape.intermediate, shape.hidden))
                add(names.down, (shape.hidden, shape.intermediate))
    config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return total


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{byte: at for at, byte in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def write_words(path: Path) -> None:
    """Write random words, enough for all calibration tokens."""
    words = random.Random(0)
    letters = "etaoinshrdlu"
    made = ("".join(words.choices(letters, k=words.randint(2, 9))) for _ in range(4000))
    path.write_text(" ".join(made), encoding="utf-8")


@dataclass(frozen=True)
class Sample:
    """Memory at one instant; ``anonymous_bytes`` leaves out pages that a file backs."""

    seconds: float
    stage: str
    resident_bytes: int
    anonymous_bytes: int


class Progress:
    """Tells a job's stage by which artifacts are there."""

    def __init__(self, work: Path, moe_layers: int) -> None:
        self.work, self.moe_layers, self.at = work, moe_layers, 0

    def stage(self) -> str:
        """Return the running stage; stages only ever go on."""
        done = {
            "check": "checked-*.json",
            "calibrate": "calibration-*/layer-???",
            "group": "groups-*/layer-???.json",
            "factor": "factors-*/layer-???.safetensors",
            "distil": "distilled-*/layer-???.safetensors",
        }
        while STAGES[self.at] in done:
            stage = STAGES[self.at]
            needed = 1 if stage == "check" else self.moe_layers
            if len(list(self.work.glob(done[stage]))) < needed:
                break
            self.at += 1
        return STAGES[self.at]


def memory(process: psutil.Process) -> tuple[int, int]:
    """Return resident and anonymous bytes of a process and its children."""
    family = [process, *process.children(recursive=True)]
    found = [member.memory_info() for member in family]
    resident = sum(info.rss for info in found)
    return resident, resident - sum(getattr(info, "shared", 0) for info in found)


def run(command: list[str], progress: Progress) -> tuple[list[Sample], dict[str, Any]]:
    """Run the job while sampling its memory; return the samples and what it printed as JSON."""
    samples: list[Sample] = []
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        watched = psutil.Process(child.pid)
        printed: list[str] = []
        reading = threading.Thread(target=lambda: printed.append(child.communicate()[0]))
        reading.start()
        while reading.is_alive():
            try:
                measured = memory(watched)
            except psutil.NoSuchProcess:
                break
            samples.append(Sample(time.monotonic() - start, progress.stage(), *measured))
            time.sleep(SAMPLE_SECONDS)
        reading.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {child.returncode}")
    return samples, json.loads(printed[0])


def thinned(samples: list[Any], held: Callable[[Any], int]) -> Iterator[Any]:
    """Keep of every run of samples of one stage the one that held most, and so every peak."""
    width = max(1, len(samples) // KEPT_SAMPLES)
    for stage in STAGES:
        of_stage = [sample for sample in samples if sample.stage == stage]
        for begin in range(0, len(of_stage), width):
            yield max(of_stage[begin : begin + width], key=held)


def stage_seconds(samples: list[Any]) -> dict[str, float]:
    """Return the wall time of every stage; samples have ``stage`` and ``seconds``."""
    spent: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for before, after in pairwise(samples):
        spent[before.stage] += after.seconds - before.seconds
    return spent


def table(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results in words and one small table, as Markdown."""
    facts = meta["teacher"]
    peak = max(row["resident_bytes"] for row in rows)
    lines = [
        "# Memory while fusing",
        "",
        f"A random DeepSeek-V2 teacher of {facts['bytes'] / 1e9:.2f} GB in bf16 "
        f"({facts['moe_layers']} MoE layers of {facts['experts']} experts; one layer's routed "
        f"experts take {facts['layer_bytes'] / 1e6:.0f} MB in bf16, twice that in fp32), fused to "
        f"{meta['settings']['groups']} experts a layer at rank {meta['settings']['rank']} on "
        f"{meta['settings']['tokens']:,} calibration tokens, on a CPU. Peak resident memory: "
        f"**{peak / 1e9:.2f} GB**, {peak / facts['bytes']:.0%} of the teacher.",
        "",
        "| stage | seconds | peak resident | of it not backed by a file |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        of_stage = [row for row in rows if row["stage"] == stage]
        if of_stage:
            resident = max(row["resident_bytes"] for row in of_stage)
            anonymous = max(row["anonymous_bytes"] for row in of_stage)
            seconds = meta["stage_seconds"][stage]
            lines.append(
                f"| {stage} | {seconds:.0f} | {resident / 1e9:.2f} GB | {anonymous / 1e9:.2f} GB |"
            )
    machine = f"{meta['cpu']}, {meta['threads']} thread(s)"
    lines += [
        "",
        "Resident memory is that of the whole process, Python, torch and mapped files included, "
        f"sampled every {SAMPLE_SECONDS * 1000:.0f} ms. {machine}; torch {meta['torch']}.",
        "",
        "![Resident memory over time](streaming_memory.png)",
        "",
    ]
    return "\n".join(lines)


def plot(meta: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw resident memory over time, a colour a stage, with the teacher's size for comparison."""
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    whole = meta["teacher"]["bytes"] / 1e9
    ordered = sorted(rows, key=lambda row: row["seconds"])
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        inside = [at for at, row in enumerate(ordered) if row["stage"] == stage]
        if not inside:
            continue
        part = ordered[inside[0] : inside[-1] + 2]
        minutes = [row["seconds"] / 60 for row in part]
        resident = [row["resident_bytes"] / 1e9 for row in part]
        axes.fill_between(minutes, resident, color=colour, alpha=0.35, linewidth=0)
        axes.plot(minutes, resident, color=colour, linewidth=1.0, label=stage)
    axes.axhline(whole, color="#222222", linewidth=1.0, linestyle=(0, (4, 2.5)))
    axes.annotate(
        f"the teacher in bf16: {whole:.2f} GB",
        (0.995, whole),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
    )
    axes.set_xlim(0, ordered[-1]["seconds"] / 60)
    axes.set_ylim(0, max(whole, *(row["resident_bytes"] / 1e9 for row in rows)) * 1.06)
    axes.set_xlabel("minutes")
    axes.set_ylabel("resident memory (GB)")
    peak = max(row["resident_bytes"] for row in rows) / 1e9
    axes.set_title(f"Fusing a {whole:.1f} GB teacher takes {peak:.2f} GB", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.93))
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def main() -> None:
    """Write the teacher, fuse it under observation and leave the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=22, help="MoE layers of the teacher")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).with_name("results"), help="where to write"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moefuse-memory-") as name:
        folder = Path(name)
        (folder / "teacher").mkdir()
        total = write_teacher(folder / "teacher", options.layers)
        write_words(folder / "text.txt")
        flags = [f"--{flag}={value}" for flag, value in SETTINGS.items()]
        arguments = [folder / "teacher", folder / "student", f"--data={folder / 'text.txt'}"]
        program = Path(sys.executable).with_name("moefuse")
        command = [str(part) for part in (program, "fuse", *arguments, *flags, "--json")]
        work = folder / "student.work"
        samples, result = run(command, Progress(work, options.layers))
    layer_bytes = CONFIG["n_routed_experts"] * 3 * 2
    layer_bytes *= CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"]
    meta = machine_meta(
        f"python benchmarks/streaming_memory.py --layers {options.layers}",
        data={"name": "random words"},
        threads=torch.get_num_threads(),
        settings=SETTINGS,
        teacher={
            "bytes": total,
            "moe_layers": options.layers,
            "experts": CONFIG["n_routed_experts"],
            "layer_bytes": layer_bytes,
        },
        student_bytes=result["plan"]["bytes"],
        peak_bytes_by_the_kernel=result["peak_bytes"],
        seconds=round(samples[-1].seconds, 1),
        stage_seconds={name: round(spent, 1) for name, spent in stage_seconds(samples).items()},
    )
    kept = thinned(samples, lambda sample: sample.resident_bytes)
    rows = [vars(sample) | {"seconds": round(sample.seconds, 2)} for sample in kept]
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "streaming_memory.json", {"meta": meta, "rows": rows})
    write_text(options.results / "streaming_memory.md", table(meta, rows))
    plot(meta, rows, options.results / "streaming_memory.png")
    peak = max(row["resident_bytes"] for row in rows)
    print(f"peak {peak / 1e9:.3f} GB of at most {LIMIT_BYTES / 1e9:.1f} GB")
    if peak > LIMIT_BYTES:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
