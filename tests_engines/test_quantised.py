"""Students of ``moefuse quantize`` in vLLM: the tokens of Transformers, which unpacks bases."""

import pytest
from engines import Engine, check
from served import Expected, Student, prompts_for


@pytest.mark.parametrize("scheme", ["w4a16", "gptq", "w8a16", "w8a8", "fp8"])
def test_quantised_bases_give_the_tokens_of_transformers(
    scheme: str, plugin: Engine, student: Student, expected: Expected
) -> None:
    name = f"bundled-4-{scheme}"
    path = student(name)

    check(plugin.generate(path, prompts_for(path), enforce_eager=True), expected(name))
