"""Whether vLLM's greedy tokens equal Transformers', student by student, eager and compiled.

20 prompts of mixed lengths, 64 new tokens each, one at a time and up to 16 at once, prefix caching
on and prompts read in chunks. Transformers computes on the CPU in fp32. Where a token differs, the
first difference is told with how far apart the two likeliest logits were there. Run it in an
environment that has vLLM, on a CPU or a GPU:

    .venv-engines/bin/python benchmarks/serving_tokens.py STUDENT ...
    python benchmarks/serving_tokens.py STUDENT ... --dtype bfloat16 --tensor-parallel-size 2
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import moefuse
from moefuse.artifacts import write_json, write_text
from moefuse.evaluation.machine import machine_meta

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("tests_engines", "tests")]

from engines import engine  # noqa: E402
from served import greedy, prompts_for  # noqa: E402


@torch.no_grad()
def first_gap(model: Any, prompt: list[int], expected: list[int], found: list[int]) -> float | None:
    """Return how far apart the two likeliest logits are where ``found`` first differs."""
    if found == expected:
        return None
    place = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    logits_V = model(torch.tensor([prompt + expected[:place]])).logits[0, -1]
    first, second = logits_V.topk(2).values.tolist()
    return first - second


def compare(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Serve one student in one way; return how many prompts have all tokens equal."""
    prompts = prompts_for(path)
    with engine(in_one_process=False) as started:
        made = started.generate(path, prompts, **options)
    if "error" in made:
        raise RuntimeError(f"vLLM stopped with {made['error']}\n{made['log']}")
    expected = greedy(path, prompts)
    model = moefuse.load(path, dtype="float32")
    row: dict[str, Any] = {"model": path.name, **options, "prompts": len(prompts)}
    for how in ("together", "alone"):
        gaps = [first_gap(model, *each) for each in zip(prompts, expected, made[how], strict=True)]
        different = [gap for gap in gaps if gap is not None]
        row[how] = len(gaps) - len(different)
        row[f"{how}_largest_gap"] = max(different, default=None)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = ["| Student | Mode | Equal, together | Equal, alone |", "| --- | --- | ---: | ---: |"]
    lines += [
        f"| {row['model']} | {'eager' if row['enforce_eager'] else 'compiled'} "
        f"| {row['together']} of {row['prompts']} | {row['alone']} of {row['prompts']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving_tokens"))
    asked = parser.parse_args()
    options = {
        "dtype": asked.dtype,
        "tensor_parallel_size": asked.tensor_parallel_size,
        "enable_expert_parallel": asked.enable_expert_parallel,
    }
    rows: list[dict[str, Any]] = []
    for path in asked.students:
        for eager in (True, False):
            rows.append(compare(path, {**options, "enforce_eager": eager}))
            print(table(rows), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = machine_meta(" ".join(sys.argv), device=device)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(asked.out.with_suffix(".json"), {"meta": meta, "rows": rows})
    write_text(asked.out.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
