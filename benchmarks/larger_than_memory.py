"""Fusing layers of DeepSeek-V3's shapes: peak memory against one layer's, and waiting for the disk.

Writes a random checkpoint of the family deepseek_v3 with the true shapes of its layers (D 7168,
F 2048, latent attention with 128 heads, one shared expert, a dense layer first) and as many of the
256 experts as disk and memory have room for, drops it from the system's cache, and runs ``moefuse
fuse`` on it as a process of its own. The vocabulary is bytes: embeddings stay in memory besides the
layer, and their size says nothing about streaming.

Memory is what the process holds itself: ``RssAnon`` of /proc, which leaves out the pages of the
checkpoint that the system's cache holds and takes back whenever it needs them. It is compared to
one MoE layer, all its weights in the working dtype, plus one batch: what its tokens take when they
enter and leave a layer and in the experts that they chose. With ``--device cuda`` the device's
memory is compared in the same way. Leaves json, table and curve in ``results/larger_than_memory/``.

    python benchmarks/larger_than_memory.py                     # 48 experts, 12 GB of disk
    python benchmarks/larger_than_memory.py --experts 16 --moe-layers 1
    python benchmarks/larger_than_memory.py --device cuda --working bfloat16 --experts 256
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from streaming_memory import (
    COLOURS,
    STAGES,
    Progress,
    byte_tokenizer,
    stage_seconds,
    thinned,
    write_words,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moefuse.artifacts import read_json, write_atomically, write_json, write_text
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.console import say, track
from moefuse.evaluation.machine import machine_meta
from moefuse.families import family_of

LIMIT = 1.3
WAITING_LIMIT = 0.15
SAMPLE_SECONDS = 0.05
SHARD_BYTES = 2_000_000_000
DTYPES = ("bf16", "fp8")
BLOCK = 128
FP8_SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
WORKING = {"float32": 4, "bfloat16": 2, "float16": 2}
CONFIG = {
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18_432,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_nextn_predict_layers": 0,
}
SETTINGS = {
    "groups": 8,
    "rank": 8,
    "sequence-length": 128,
    "batch-size": 2,
    "steps": 10,
    "batch-tokens": 256,
    "held-out-tokens": 256,
}


def write_teacher(directory: Path, experts: int, moe_layers: int, dtype: str) -> dict[str, int]:
    """Write the checkpoint; return its bytes and the numbers of one MoE layer."""
    given = {**CONFIG, "n_routed_experts": experts, "num_hidden_layers": moe_layers + 1}
    config = AutoConfig.for_model("deepseek_v3", **given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family = family_of(config.to_dict())
    shape = family.shape(config.to_dict())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 26, generator=generator).bfloat16()
    numbers = {"teacher": 0, "layer": 0}
    with ShardedWriter(directory, SHARD_BYTES) as writer:

        def add(name: str, size: tuple[int, ...], layer: int | None) -> None:
            for stored, tensor in _stored(name, noise, size, generator, dtype):
                writer.add(stored, tensor)
            count = torch.Size(size).numel()
            numbers["teacher"] += count
            if layer == shape.layers[0]:
                numbers["layer"] += count

        for name, tensor in model.state_dict().items():
            if ".experts." not in name:
                add(name, tuple(tensor.shape), family.layer_of(name))
        for layer in track(shape.layers, "Writing the teacher"):
            for expert in range(shape.experts):
                names = family.expert_names(layer, expert)
                add(names.gate, (shape.intermediate, shape.hidden), layer)
                add(names.up, (shape.intermediate, shape.hidden), layer)
                add(names.down, (shape.hidden, shape.intermediate), layer)
    config.save_pretrained(directory)
    if dtype == "fp8":
        written = read_json(directory / "config.json")
        settings = {**written, "dtype": "bfloat16", "quantization_config": FP8_SETTINGS}
        write_json(directory / "config.json", settings)
    byte_tokenizer().save_pretrained(directory)
    numbers["bytes"] = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return numbers


def _stored(
    name: str, noise: Tensor, size: tuple[int, ...], generator: torch.Generator, dtype: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield what is stored of one weight: in fp8 every projection, with a scale for each block."""
    weight = _weights(noise, size, generator)
    if dtype != "fp8" or not name.endswith("_proj.weight"):
        yield name, weight
        return
    scale = torch.full([-(-length // BLOCK) for length in size], 2.0**-6)
    yield name, (weight * 2.0**6).to(torch.float8_e4m3fn)
    yield f"{name}_scale_inv", scale


def _weights(noise: Tensor, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Cut a weight out of the noise at a random place: drawing anew takes longer than the disk."""
    if len(size) == 1:
        return torch.ones(size, dtype=noise.dtype)
    count = torch.Size(size).numel()
    start = int(torch.randint(len(noise), (1,), generator=generator))
    repeated = noise.roll(-start) if count <= len(noise) else noise.repeat(-(-count // len(noise)))
    return (repeated[:count] * size[-1] ** -0.5).view(size)


def drop_from_cache(directory: Path) -> None:
    """Let the system's cache forget the checkpoint, as if it had just been copied there."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True)
class Sample:
    """Memory at one instant, in bytes; ``device`` is None without a GPU."""

    seconds: float
    stage: str
    anonymous: int
    device: int | None


class Watch:
    """Samples a process's own memory, and what the device holds beyond what it held before."""

    def __init__(self, device: str) -> None:
        self.device = device if device.startswith("cuda") else None
        self.before = self._device_bytes()

    def _device_bytes(self) -> int:
        if self.device is None:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def run(self, command: list[str], progress: Progress) -> tuple[list[Sample], dict[str, Any]]:
        """Run the job; return the samples and what it printed as JSON."""
        samples: list[Sample] = []
        start = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            printed: list[str] = []
            reading = threading.Thread(target=lambda: printed.append(child.communicate()[0]))
            reading.start()
            while reading.is_alive():
                anonymous = anonymous_bytes(child.pid)
                if anonymous is not None:
                    device = None if self.device is None else self._device_bytes() - self.before
                    now = time.monotonic() - start
                    samples.append(Sample(now, progress.stage(), anonymous, device))
                time.sleep(SAMPLE_SECONDS)
            reading.join()
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {child.returncode}")
        return samples, json.loads(printed[0])


def anonymous_bytes(process: int) -> int | None:
    """Return a process's memory that no file backs, or None once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
    return found[0] if found else None


def batch_bytes(itemsize: int) -> int:
    """Return what one batch takes: entering and leaving a layer, and in the chosen experts."""
    tokens = SETTINGS["sequence-length"] * SETTINGS["batch-size"]
    hidden, width = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    row = hidden + 3 * width + hidden
    return tokens * itemsize * (2 * hidden + CONFIG["num_experts_per_tok"] * row)


def render(meta: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    facts = meta["teacher"]
    unit, where = meta["unit_bytes"], meta["device"]
    lines = [
        "# Layers larger than memory has room for twice",
        "",
        f"A random checkpoint with the shapes of DeepSeek-V3's layers, {facts['experts']} of 256 "
        f"experts, a dense layer and {facts['moe_layers']} MoE layer(s), {facts['dtype']}, "
        f"{facts['bytes'] / 1e9:.1f} GB, not in the system's cache; fused to "
        f"{meta['settings']['groups']} experts of rank {meta['settings']['rank']} on "
        f"{meta['settings']['tokens']:,} tokens, computing in {meta['working']} on {where}.",
        "",
        f"One MoE layer takes {meta['layer_bytes'] / 1e9:.2f} GB in the working dtype, a batch "
        f"{meta['batch_bytes'] / 1e9:.2f} GB. Peak of the process's own memory (RssAnon, Python "
        f"and its libraries included): **{meta['peak_anonymous'] / 1e9:.2f} GB = "
        f"{meta['peak_anonymous'] / unit:.2f} times both** (at most {LIMIT}).",
    ]
    if meta["peak_device"] is not None:
        lines += [
            "",
            f"Peak of tensors on the device: **{meta['peak_device'] / 1e9:.2f} GB = "
            f"{meta['peak_device'] / unit:.2f} times both** (at most {LIMIT}).",
        ]
    lines += [
        "",
        f"Of {meta['seconds']:.0f} s **{meta['waiting_share']:.1%}** were spent waiting for the "
        f"checkpoint's disk (at most {WAITING_LIMIT:.0%}).",
        "",
        "| stage | seconds | peak own memory, GB | on the device, GB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for stage in STAGES:
        of_stage = [row for row in rows if row["stage"] == stage]
        if of_stage:
            own = max(row["anonymous"] for row in of_stage) / 1e9
            held = [row["device"] for row in of_stage if row["device"] is not None]
            device = f"{max(held) / 1e9:.2f}" if held else "-"
            spent = meta["stage_seconds"][stage]
            lines.append(f"| {stage} | {spent:.0f} | {own:.2f} | {device} |")
    machine = f"{meta['cpu']}, {meta['cores']} cores"
    lines += ["", f"{machine}; torch {meta['torch']}.", "", f"![Memory over time]({meta['plot']})"]
    return "\n".join(lines) + "\n"


def plot(meta: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory over time, a colour a stage, against one layer and the limit."""
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    key = "anonymous" if meta["peak_device"] is None else "device"
    ordered = sorted(rows, key=lambda row: row["seconds"])
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        inside = [at for at, row in enumerate(ordered) if row["stage"] == stage]
        if inside:
            part = ordered[inside[0] : inside[-1] + 2]
            minutes = [row["seconds"] / 60 for row in part]
            held = [row[key] / 1e9 for row in part]
            axes.fill_between(minutes, held, color=colour, alpha=0.35, linewidth=0)
            axes.plot(minutes, held, color=colour, linewidth=1.0, label=stage)
    unit = meta["unit_bytes"] / 1e9
    for height, words in ((unit, "one layer + batch"), (LIMIT * unit, f"{LIMIT} times that")):
        axes.axhline(height, color="#222222", linewidth=1.0, linestyle=(0, (4, 2.5)))
        axes.annotate(
            words,
            (0.995, height),
            xytext=(0, 2),
            textcoords="offset points",
            xycoords=("axes fraction", "data"),
            ha="right",
        )
    axes.set_xlim(0, ordered[-1]["seconds"] / 60)
    axes.set_ylim(0, max(LIMIT * unit, *(row[key] / 1e9 for row in rows)) * 1.12)
    axes.set_xlabel("minutes")
    axes.set_ylabel("the process's own memory (GB)" if key == "anonymous" else "GPU memory (GB)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=6, frameon=False, loc="upper left", fontsize=8)
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def fuse(folder: Path, given: argparse.Namespace) -> tuple[list[Sample], dict[str, Any]]:
    """Fuse the checkpoint in ``folder`` in a process of its own."""
    write_words(folder / "text.txt")
    flags = [f"--{flag}={value}" for flag, value in SETTINGS.items()]
    flags += [f"--tokens={given.tokens}", f"--fit-tokens={given.tokens * 3 // 4}"]
    flags += [f"--dtype={given.working}", f"--device={given.device}"]
    flags += [f"--data={folder / 'text.txt'}", f"--work={folder / 'work'}", "--json"]
    start = "from moefuse.cli import main; main()"
    command = [sys.executable, "-c", start, "fuse", str(folder / "teacher")]
    progress = Progress(folder / "work", given.moe_layers)
    drop_from_cache(folder / "teacher")
    return Watch(given.device).run([*command, str(folder / "student"), *flags], progress)


def main() -> None:
    """Write the checkpoint, fuse it under observation and leave the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--experts", type=int, default=48, help="routed experts, a multiple of 8")
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="to calibrate on")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="as stored")
    parser.add_argument("--working", choices=sorted(WORKING), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; it is reused")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "larger_than_memory"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moefuse-large-", dir=given.folder) as scratch:
        folder = given.folder or Path(scratch)
        note = folder / "teacher" / "numbers.json"
        if not note.exists():
            (folder / "teacher").mkdir()
            numbers = write_teacher(
                folder / "teacher", given.experts, given.moe_layers, given.dtype
            )
            write_json(note, numbers)
        numbers = json.loads(note.read_text())
        samples, result = fuse(folder, given)
        for made in ("work", "student"):
            shutil.rmtree(folder / made)
    report(given, numbers, samples, result)


def report(
    given: argparse.Namespace,
    numbers: dict[str, int],
    samples: list[Sample],
    result: dict[str, Any],
) -> None:
    """Write the results and say how they are; exit status 1 above a limit."""
    layer, batch = numbers["layer"] * WORKING[given.working], batch_bytes(WORKING[given.working])
    kind = torch.device(given.device).type
    meta = machine_meta(
        f"python benchmarks/larger_than_memory.py --experts {given.experts} --moe-layers "
        f"{given.moe_layers} --dtype {given.dtype} --working {given.working} --device {kind}",
        device=given.device,
        data={"name": "random words"},
        settings=SETTINGS | {"tokens": given.tokens},
        working=given.working,
        teacher={
            "experts": given.experts,
            "moe_layers": given.moe_layers,
            "dtype": given.dtype,
            "bytes": numbers["bytes"],
        },
        layer_bytes=layer,
        batch_bytes=batch,
        unit_bytes=layer + batch,
        peak_anonymous=max(sample.anonymous for sample in samples),
        peak_device=result["peak_device_bytes"],
        seconds=result["seconds"],
        waiting_share=result["waited_seconds"] / result["seconds"],
        stage_seconds={name: round(spent, 1) for name, spent in stage_seconds(samples).items()},
        plot=f"{kind}-{given.dtype}.png",
    )
    kept = thinned(samples, lambda sample: sample.anonymous)
    rows = [asdict(sample) | {"seconds": round(sample.seconds, 2)} for sample in kept]
    write_json(given.out / f"{kind}-{given.dtype}.json", {"meta": meta, "rows": rows})
    write_text(given.out / f"{kind}-{given.dtype}.md", render(meta, rows))
    plot(meta, rows, given.out / meta["plot"])
    say(render(meta, rows))
    key = "peak_anonymous" if meta["peak_device"] is None else "peak_device"
    if meta[key] > LIMIT * (layer + batch) or meta["waiting_share"] > WAITING_LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
