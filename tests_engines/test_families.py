"""The same for tiny random students of other families, and for neurons of few bits."""

import json
import shutil
from pathlib import Path

import pytest
from engines import Engine, check
from served import Expected, Student, prompts_for

TWO_WAYS = ("qwen3_moe", "mixtral")
EAGER = ("olmoe", "deepseek_v3", "gpt_oss", "bundled-2-bit")


@pytest.mark.parametrize(
    ("name", "eager"),
    [(name, eager) for name in TWO_WAYS for eager in (True, False)]
    + [(name, True) for name in EAGER],
)
def test_families_give_the_tokens_of_transformers(
    name: str, eager: bool, plugin: Engine, student: Student, expected: Expected
) -> None:
    path = student(name)

    made = plugin.generate(path, prompts_for(path), enforce_eager=eager)

    check(made, expected(name))
    assert made["eager"] is eager


def test_what_cannot_be_served_is_refused_in_one_sentence(
    plugin: Engine, student: Student, tmp_path: Path
) -> None:
    later = shutil.copytree(student("mixtral"), tmp_path / "later")
    config = json.loads((later / "config.json").read_text())
    config["moefuse"]["format"] = 99
    (later / "config.json").write_text(json.dumps(config))

    made = plugin.generate(later, [[5]], enforce_eager=True)

    assert "has format 99, and this moefuse serves format 1; " in made["error"]
