"""Greedy tokens of vLLM equal those of Transformers: alone, together, cached, chunked, compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from served import NEW, Student, greedy, prompts_for

from moefuse.collapse import collapse
from moefuse.export.expand import expand

HERE = Path(__file__).parent
SMALL = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    # Less than a prompt's tokens, so that prompts are read in chunks.
    "max_num_batched_tokens": 96,
    "block_size": 32,
    "kv_cache_memory_bytes": 2**28,
}


def generate(path: Path, tmp_path: Path, environment: dict[str, str], **options: Any) -> Any:
    """Return the prompts and what vLLM makes of them, in a process of its own."""
    settings, out = tmp_path / "settings.json", tmp_path / "out.json"
    asked = {"model": str(path), "options": {**SMALL, **options}, "prompts": prompts_for(path)}
    settings.write_text(json.dumps({**asked, "new_tokens": NEW}))
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache"), **environment}
    ran = subprocess.run(
        [sys.executable, str(HERE / "generate_with_vllm.py"), str(settings), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return asked["prompts"], json.loads(out.read_text())


@pytest.mark.parametrize(
    ("name", "eager"),
    [
        pytest.param(name, eager, marks=pytest.mark.xdist_group(group))
        for name, eager, group in (
            ("bundled-16", True, "bundled"),
            ("bundled-8", True, "bundled"),
            ("bundled-4", True, "bundled"),
            ("bundled-4", False, "bundled"),
            ("bundled-2", True, "bundled"),
            ("bundled-2-bit", True, "others"),
            ("qwen3_moe", False, "others"),
            ("mixtral", True, "others"),
            ("gpt_oss", True, "others"),
        )
    ],
)
def test_the_plugin_gives_the_tokens_of_transformers(
    name: str, eager: bool, student: Student, tmp_path: Path
) -> None:
    prompts, made = generate(student(name), tmp_path, {}, enforce_eager=eager)

    assert made["prefix_caching"] and made["chunked_prefill"]
    assert made["cached"] > 0, "prompts given a second time were found in the prefix cache"
    expected = greedy(student(name), prompts)
    assert made["together"] == expected
    assert made["alone"] == expected


@pytest.mark.xdist_group("others")
@pytest.mark.parametrize("name", ["bundled-4", "bundled-neurons"])
def test_without_moefuse_the_tokens_are_the_same(
    name: str, student: Student, tmp_path: Path
) -> None:
    """Among them 16-bit neurons alone, which vLLM might take for experts of its own kind."""
    without = {
        "PYTHONPATH": str(HERE / "without_moefuse"),
        "VLLM_PLUGINS": "",
        "VLLM_MLA_DISABLE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    prompts, made = generate(
        student(name), tmp_path, without, enforce_eager=True, trust_remote_code=True
    )

    assert made["moefuse"] == []
    expected = greedy(student(name), prompts)
    assert made["together"] == expected
    assert made["alone"] == expected


@pytest.mark.xdist_group("others")
@pytest.mark.parametrize(("name", "form"), [("qwen3_moe", "written out"), ("mixtral", "collapsed")])
def test_plain_checkpoints_are_run_by_vllms_own_classes(
    name: str, form: str, student: Student, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    if form == "written out":
        expand(student(name), plain)
    else:
        text = student(name).parent / "text.txt"
        few = {"tokens": 512, "sequence_length": 64, "router_steps": 20, "steps": 5}
        collapse(student(name), plain, {**few, "data": str(text)})

    prompts, made = generate(plain, tmp_path, {"VLLM_PLUGINS": ""}, enforce_eager=True)

    assert made["moefuse"] == []
    expected = greedy(plain, prompts)
    assert made["together"] == expected
    assert made["alone"] == expected


@pytest.mark.xdist_group("others")
def test_what_cannot_be_served_is_refused_in_one_sentence(student: Student, tmp_path: Path) -> None:
    later = shutil.copytree(student("bundled-4"), tmp_path / "later")
    config = json.loads((later / "config.json").read_text())
    config["moefuse"]["format"] = 99
    (later / "config.json").write_text(json.dumps(config))

    with pytest.raises(AssertionError, match="has format 99, and this moefuse serves format 1; "):
        generate(later, tmp_path, {}, enforce_eager=True)
