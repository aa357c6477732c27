"""The examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from served import Student

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, path: Path, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), str(path)],
        # vLLM's own switch for tests on CPUs: the graph is traced, and runs without inductor.
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


@pytest.mark.parametrize("use", ["completion", "insertion", "chat"])
def test_examples(use: str, student: Student, tmp_path: Path) -> None:
    path = student("bundled-4")
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}

    assert run(f"transformers_{use}", path, **modules).strip()
    assert run(f"vllm_{use}", path).strip()
