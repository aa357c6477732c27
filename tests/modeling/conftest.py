"""One fused checkpoint for all tests that use a student as people do."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT, save_tiny

from moefuse.modeling import load_fused
from moefuse.pipeline import fuse

STRANGER = Path(__file__).with_name("stranger.py")
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
IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Students:
    """Directories: the teacher, its student, and the student saved again by moefuse's class."""

    teacher: Path
    student: Path
    saved_again: Path


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Students:
    """Return checkpoints that tests read and never change."""
    home = tmp_path_factory.mktemp("students")
    made = Students(home / "teacher", home / "student", home / "saved-again")
    save_tiny(made.teacher, max_position_embeddings=128)
    config = json.loads((made.teacher / "config.json").read_text())
    del config["rope_parameters"]
    published = {**config, "rope_scaling": YARN, "rope_theta": 10000.0}
    (made.teacher / "config.json").write_text(json.dumps(published))
    (home / "text.txt").write_text(TEXT * 12)
    settings = {
        "data": str(home / "text.txt"),
        "tokens": 512,
        "sequence_length": 32,
        "groups": 3,
        "rank": 3,
        "scale": True,
        "bias": True,
        "base": "mean",  # every delta then starts as something, never as B = 0
        "steps": 5,
        "batch_tokens": 64,
        "max_shard": "40KB",
    }
    fuse(made.teacher, made.student, settings)
    load_fused(made.student).save_pretrained(made.saved_again)
    return made


@dataclass(frozen=True)
class Stranger:
    """What a user without moefuse saw: facts, tensors, and what that user saved."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    saved: Path


@pytest.fixture(scope="session")
def stranger(students: Students, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    """Use the students in a process of its own in which moefuse cannot be imported."""
    out = tmp_path_factory.mktemp("stranger")
    (out / "ids.json").write_text(json.dumps(IDS_BS.tolist()))
    told = [str(STRANGER), str(out), str(students.student), str(students.saved_again)]
    run = subprocess.run(
        [sys.executable, "-I", *told],
        cwd=out,
        env={**os.environ, "HF_HOME": str(out / "home"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    facts = json.loads((out / "facts.json").read_text())
    return Stranger(facts, load_file(out / "tensors.safetensors"), out / "saved")
