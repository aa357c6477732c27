"""The student that all tests share which use one as people do; ``conftest`` makes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# As DeepSeek publishes it: the old spelling, with the length before stretching.
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


@dataclass(frozen=True)
class Students:
    """Directories: the teacher, its student, and the student saved again by moefuse's class."""

    teacher: Path
    student: Path
    saved_again: Path


@dataclass(frozen=True)
class Stranger:
    """What a user without moefuse saw: facts, tensors, and what that user saved."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    saved: Path
