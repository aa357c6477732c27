"""Settings and fixtures that every test shares."""

import os
from pathlib import Path

# Before transformers is imported anywhere: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before triton is: on a machine without a GPU its kernels are interpreted.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"

import shutil
from collections.abc import Callable

import pytest
import torch
from tiny import save_tiny

# Tiny matrices are faster on one thread, and pytest-xdist gives each core its own process.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _tiny_originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One checkpoint a family for the whole session; tests only ever see copies."""
    made: dict[str, Path] = {}

    def original(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type) / "teacher"
            save_tiny(made[model_type], model_type)
        return made[model_type]

    return original


@pytest.fixture
def tiny_checkpoint(_tiny_originals: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``tiny_checkpoint(model_type="deepseek_v2")`` returns a directory that a test may damage."""

    def copy(model_type: str = "deepseek_v2") -> Path:
        return shutil.copytree(_tiny_originals(model_type), tmp_path / f"teacher-{model_type}")

    return copy
