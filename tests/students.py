"""Students of tiny teachers, fused in no time: nothing is distilled."""

from pathlib import Path
from typing import Any

import torch
from running import write_text
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from moefuse.pipeline import fuse

QUICKLY = {"tokens": 512, "sequence_length": 64, "batch_size": 4, "steps": 0}


def student_of(home: Path, family: str, **settings: Any) -> Path:
    """Return a student of a family's tiny teacher, made in ``home`` unless it is there.

    Text lies in ``home`` as ``text.txt``; it is written if need be.
    """
    text = home / "text.txt"
    if not text.exists():
        write_text(text)
    out = home / f"{family}-{'-'.join(f'{k}{v}' for k, v in settings.items())}"
    if not out.exists():
        teacher = home / f"{family}-teacher"
        if not teacher.exists():
            save_tiny(teacher, family)
        fuse(teacher, out, {"data": str(text), **QUICKLY, **settings})
    return out


def unsettle(student: Path) -> None:
    """Give a student's scales and biases random values: fused in no time, most are 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    for path in student.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("experts.scale", "experts.bias")):
                noise = torch.randn(tensor.shape, generator=generator) * 0.2
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
