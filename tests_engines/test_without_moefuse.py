"""Without moefuse, vLLM runs the code that lies in the checkpoint, with the same tokens, and plain
checkpoints by its own classes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, check, engine
from served import Expected, Student, greedy, prompts_for

from moefuse.collapse import collapse
from moefuse.export.expand import expand


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


@pytest.mark.parametrize(("name", "form"), [("qwen3_moe", "written out"), ("mixtral", "collapsed")])
def test_plain_checkpoints_are_run_by_vllms_own_classes(
    name: str, form: str, without_moefuse: Engine, student: Student, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    if form == "written out":
        expand(student(name), plain)
    else:
        text = student(name).parent / "text.txt"
        few = {"tokens": 512, "sequence_length": 64, "router_steps": 20, "steps": 5}
        collapse(student(name), plain, {**few, "data": str(text)})

    made = without_moefuse.generate(plain, prompts_for(plain), enforce_eager=True)

    check(made, greedy(plain, prompts_for(plain)))
    assert made["moefuse"] == []
