"""Greedy tokens of vLLM equal those of Transformers: alone, together, cached, chunked, compiled."""

import pytest
from engines import Engine, check
from served import Expected, Student, prompts_for


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", ["bundled-16", "bundled-8", "bundled-4", "bundled-2"])
def test_the_plugin_gives_the_tokens_of_transformers(
    name: str, eager: bool, plugin: Engine, student: Student, expected: Expected
) -> None:
    path = student(name)

    made = plugin.generate(path, prompts_for(path), enforce_eager=eager)

    check(made, expected(name))
    assert made["eager"] is eager
