"""Quantised students on a GPU beside a CPU, by Transformers and the quantisers' libraries alone.

    python benchmarks/quantized_devices.py STUDENT TEXTS QUANTISED...

STUDENT is the plain student, TEXTS a file of token sequences such as ``make quantizing`` leaves in
``runs/quantizing/texts.json``, QUANTISED what ``moefuse quantize`` wrote. One row each, and one for
each way of a user's own: KL(STUDENT || it), nats a token, computed on the CPU and on the GPU; bytes
of GPU memory that loading adds; greedy tokens per second there. In bf16, the libraries' usual
dtype. Needs no moefuse; a row that cannot be had says why.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

REPEATS, NEW = 3, 48
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def own_ways() -> dict[str, Any]:
    """Return configurations that users pass to ``from_pretrained``, as docs/quantizing.md has."""
    from torchao import quantization  # noqa: PLC0415
    from torchao.quantization.granularity import PerGroup  # noqa: PLC0415

    whole = quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    return {
        "BitsAndBytesConfig nf4": BitsAndBytesConfig(**NF4),
        "BitsAndBytesConfig 8 bits": BitsAndBytesConfig(load_in_8bit=True),
        "Int8WeightOnlyConfig": TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        "Int8DynamicActivationInt8WeightConfig": TorchAoConfig(
            quantization.Int8DynamicActivationInt8WeightConfig()
        ),
        "IntxWeightOnlyConfig": TorchAoConfig(whole),
        "Int4WeightOnlyConfig": TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32)),
    }


def load(path: Path, device: str, how: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load a model to ``device``."""
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": True, "device_map": device}
    if how is not None:
        options["quantization_config"] = how
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@torch.no_grad()
def log_probabilities(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """Return those of every next token, (S - 1, V) fp32 on the CPU for each text."""
    inputs = (torch.tensor([ids], device=model.device) for ids in texts)
    return [model(ids).logits[0, :-1].float().log_softmax(-1).cpu() for ids in inputs]


def divergence(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Return the mean KL(wanted || got), nats a token."""
    sums = [float((w.exp() * (w - g)).sum()) for w, g in zip(wanted, got, strict=True)]
    return sum(sums) / sum(map(len, wanted))


def tokens_a_second(model: Any) -> float:
    """Return greedy tokens per second of one sequence, the median of several runs."""
    prompt = torch.arange(5, 21, device=model.device)[None]
    spent = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        spent.append(time.perf_counter() - start)
    return NEW / median(spent[1:])


def measure(path: Path, how: Any, texts: list[list[int]], wanted: list[torch.Tensor]) -> str:
    """Return a row's cells; what either device cannot do is told in its place."""
    cells = []
    for device in ("cpu", "cuda"):
        before = torch.cuda.memory_allocated()
        try:
            model = load(path, device, how)
            taken = torch.cuda.memory_allocated() - before
            cells.append(f"{divergence(wanted, log_probabilities(model, texts)):.5f}")
            if device == "cuda":
                cells += [f"{taken / 1e6:.1f} MB", f"{tokens_a_second(model):.0f}"]
        except Exception as error:  # the row tells what it ended with
            cells.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("quantised", type=Path, nargs="*")
    parser.add_argument("--sequences", type=int, default=12)
    given = parser.parse_args()
    texts = json.loads(given.texts.read_text())[: given.sequences]
    wanted = log_probabilities(load(given.student, "cpu", None, torch.float32), texts)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| model | KL, CPU | KL, GPU | GPU memory | tokens/s |\n| --- | --- | --- | --- | --- |")
    rows = {"bf16": (given.student, None)}
    rows |= {path.name: (path, None) for path in given.quantised}
    rows |= {name: (given.student, how) for name, how in own_ways().items()}
    for name, (path, how) in rows.items():
        print(f"| {name} | {measure(path, how, texts, wanted)} |", flush=True)


if __name__ == "__main__":
    main()
