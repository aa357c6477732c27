"""How much memory the loss of healing takes, in chunks and from whole logits.

Each measurement is a process of its own: hidden states of so many tokens, a head of D 2048 to a
vocabulary of 102,400 (DeepSeek-Coder-V2-Lite's), in fp32, the forward KL and its gradients. What is
told is the peak of resident memory above what hidden states, head and its gradient take. Leaves
``healing_memory.json``, ``.md`` and ``.png`` in ``results/``.

    python benchmarks/healing_memory.py
    python benchmarks/healing_memory.py --tokens 256 512  # a quick look
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from moefuse.artifacts import write_atomically, write_json, write_text
from moefuse.config import HealConfig
from moefuse.console import track
from moefuse.evaluation.machine import machine_meta
from moefuse.healing.losses import LiveTargets, chunked_loss
from moefuse.mathematics.divergence import forward_kl

VOCABULARY, HIDDEN = 102_400, 2048
TOKENS = (512, 1024, 2048)
WAYS = {"whole": "#D55E00", "chunks": "#0072B2"}
MEGABYTE = 1e6


def measure(way: str, tokens: int) -> dict[str, Any]:
    """Compute the loss and its gradients once, in this process."""
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(head.weight, std=HIDDEN**-0.5)
    head.weight.grad = torch.zeros_like(head.weight)
    teacher_TD = torch.randn(tokens, HIDDEN)
    student_TD = (teacher_TD + 0.3 * torch.randn(tokens, HIDDEN)).requires_grad_()
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    loss = _loss(way, teacher_TD, student_TD, head)
    loss.backward()
    # The kernel counts in units of 1024 bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "way": way,
        "tokens": tokens,
        "loss": float(loss.detach()),
        "megabytes": (peak - before) / MEGABYTE,
        "seconds": time.monotonic() - start,
    }


def _loss(way: str, teacher_TD: Tensor, student_TD: Tensor, head: nn.Linear) -> Tensor:
    if way == "whole":
        with torch.no_grad():
            teacher_TV = head(teacher_TD)
        return forward_kl(teacher_TV, head(student_TD)).mean()
    next_T = torch.zeros(len(student_TD), dtype=torch.int64)
    targets = LiveTargets(teacher_TD, head)
    return chunked_loss(student_TD, head, targets, next_T, HealConfig()) / len(student_TD)


def measure_elsewhere(way: str, tokens: int) -> dict[str, Any]:
    """Measure in a process of its own, whose peak nothing else has raised."""
    command = [sys.executable, __file__, "--one", way, "--tokens", str(tokens)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(ran.stdout)


def render(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "# Memory of the loss of healing",
        "",
        f"Vocabulary {VOCABULARY:,}, D {HIDDEN:,}, fp32, forward KL and its gradients; peak above "
        "hidden states, head and its gradient. `python benchmarks/healing_memory.py`",
        "",
        "| tokens | whole logits | in chunks | times less | seconds, whole | seconds, in chunks |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tokens in sorted({row["tokens"] for row in rows}):
        whole, chunks = (
            next(row for row in rows if (row["way"], row["tokens"]) == (way, tokens))
            for way in WAYS
        )
        lines.append(
            f"| {tokens:,} | {whole['megabytes']:,.0f} MB | {chunks['megabytes']:,.0f} MB | "
            f"{whole['megabytes'] / chunks['megabytes']:.1f} | {whole['seconds']:.1f} | "
            f"{chunks['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory against tokens."""
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for way, colour in WAYS.items():
        found = [row for row in rows if row["way"] == way]
        sizes = [row["megabytes"] / 1000 for row in found]
        label = "whole logits" if way == "whole" else "in chunks"
        axes.plot([row["tokens"] for row in found], sizes, "o-", color=colour, label=label)
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel("peak memory of the loss, GB")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False)
    write_atomically(
        path, lambda file: figure.savefig(file, format="png", metadata={"Software": None})
    )


def main() -> None:
    """Measure all and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.tokens[0])))
        return
    pairs = [(way, tokens) for tokens in given.tokens for way in WAYS]
    rows = [measure_elsewhere(*pair) for pair in track(pairs, "Measure")]
    command = "python benchmarks/healing_memory.py"
    meta = machine_meta(command, vocabulary=VOCABULARY, hidden=HIDDEN)
    write_json(given.out / "healing_memory.json", {"meta": meta, "rows": rows})
    write_text(given.out / "healing_memory.md", render(rows))
    plot(rows, given.out / "healing_memory.png")


if __name__ == "__main__":
    main()
