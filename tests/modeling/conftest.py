"""One fused checkpoint for all tests that use a student as people do."""

import json

import pytest
from one_student import YARN, Stranger, Students
from safetensors.torch import load_file
from strangers import IDS_BS, TO_ONE, see
from tiny import TEXT, save_tiny

from moefuse.modeling import load_fused
from moefuse.pipeline import fuse


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


@pytest.fixture(scope="session")
def stranger(students: Students, tmp_path_factory: pytest.TempPathFactory) -> Stranger:
    """Use the students in a process of its own in which moefuse cannot be imported."""
    out = tmp_path_factory.mktemp("stranger")
    (out / "ids.json").write_text(json.dumps(IDS_BS.tolist()))
    see(TO_ONE, out, students.student, students.saved_again)
    facts = json.loads((out / "facts.json").read_text())
    return Stranger(facts, load_file(out / "tensors.safetensors"), out / "saved")
