"""Without moefuse, vLLM runs the code that lies in the checkpoint, with the same tokens."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, check, engine
from served import Expected, Student, prompts_for


@pytest.fixture(scope="module")
def without_moefuse() -> Iterator[Engine]:
    path = str(Path(__file__).with_name("without_moefuse"))
    with engine(PYTHONPATH=path, VLLM_PLUGINS="", VLLM_MLA_DISABLE="1") as started:
        yield started


@pytest.mark.parametrize("name", ["bundled-4", "bundled-neurons"])
def test_without_moefuse_the_tokens_are_the_same(
    name: str, without_moefuse: Engine, student: Student, expected: Expected
) -> None:
    """Among them 16-bit neurons alone, which vLLM might take for experts of its own kind."""
    path = student(name)

    made = without_moefuse.generate(
        path, prompts_for(path), enforce_eager=True, trust_remote_code=True
    )

    check(made, expected(name))
    assert made["moefuse"] == []
