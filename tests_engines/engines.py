"""vLLM in a process of its own, which serves one model after another."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import NEW

WORKER = Path(__file__).with_name("vllm_worker.py")
SMALL = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    # Less than a prompt's tokens, so that prompts are read in chunks.
    "max_num_batched_tokens": 96,
    "block_size": 32,
    "kv_cache_memory_bytes": 2**28,
}


class Engine:
    """The process, and what it wrote besides answers."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def generate(self, path: Path, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
        """Return what ``vllm_worker`` answers for ``path``; ``options`` are ``vllm.LLM``'s."""
        asked = {"model": str(path), "options": {**SMALL, **options}, "prompts": prompts}
        self.process.stdin.write(json.dumps({**asked, "new_tokens": NEW}) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        assert line, self.log.read_text()[-6000:]
        made = json.loads(line)
        if "error" in made:
            made["log"] = self.log.read_text()[-6000:]
        return made


@contextmanager
def engine(*, in_one_process: bool = True, **environment: str) -> Iterator[Engine]:
    """Start vLLM with ``environment`` added to this process's own, and end it.

    ``in_one_process``: the engine runs where it is called from, not in a process of its own as
    servers have it, which would import all of vLLM once more for every model.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = {
            "VLLM_CACHE_ROOT": f"{folder}/cache",
            "HF_MODULES_CACHE": f"{folder}/modules",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_one_process else "1",
        }
        log = Path(folder) / "log"
        with log.open("w") as written:
            process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
                env={**os.environ, **own, **environment},
            )
        try:
            yield Engine(process, log)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()


def check(made: dict[str, Any], tokens: list[list[int]]) -> None:
    """Assert that an engine gave ``tokens``, all at once and alone, in the ways that were meant."""
    assert "error" not in made, made
    assert made["prefix_caching"] and made["chunked_prefill"]
    assert made["cached"] > 0, "prompts given a second time were found in the prefix cache"
    assert made["together"] == tokens
    assert made["alone"] == tokens


@pytest.fixture(scope="module")
def plugin() -> Iterator[Engine]:
    """vLLM with moefuse's plugin, for all tests of a file."""
    with engine() as started:
        yield started
