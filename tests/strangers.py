"""Students as seen by users who have no moefuse: in processes that cannot import it."""

import os
import subprocess
import sys
from pathlib import Path

import torch

TO_ONE = Path(__file__).parent / "modeling" / "stranger.py"
TO_MANY = Path(__file__).parent / "modeling" / "stranger_to_many.py"
IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))
"""What both are asked about."""


def see(script: Path, out: Path, *students: Path) -> Path:
    """Let a script, ``TO_ONE`` or ``TO_MANY``, leave in ``out`` what it sees; return ``out``."""
    run = subprocess.run(
        [sys.executable, "-I", script, out, *students],
        cwd=out,
        env={**os.environ, "HF_HOME": str(out / "home"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return out
