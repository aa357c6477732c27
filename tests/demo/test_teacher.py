"""The bundled teacher and its texts, and the script that makes them."""

import json
import math
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

from moefuse.demo import (
    calibration_path,
    heldout_path,
    teacher_card,
    teacher_data,
    teacher_model,
    teacher_path,
    train_teacher,
)

TINY = {
    "vocab_size": teacher_data.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The teacher's tokenizer."""
    return AutoTokenizer.from_pretrained(teacher_path())


@pytest.fixture(scope="module")
def teacher() -> Any:
    """The teacher in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        teacher_path(), dtype=torch.float32, experts_implementation="grouped_mm"
    )
    return model.eval()


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """What `evaluate` recorded."""
    return json.loads((teacher_path() / "metrics.json").read_text())


# --- what ships -------------------------------------------------------------------------------


def test_weights_are_bf16_and_at_most_25_megabytes() -> None:
    shards = sorted(teacher_path().glob("*.safetensors"))
    assert len(shards) > 1
    assert sum(shard.stat().st_size for shard in shards) <= 25_000_000
    tensors = {k: v for shard in shards for k, v in load_file(shard).items()}
    assert {v.dtype for v in tensors.values()} == {torch.bfloat16}
    assert tensors["model.layers.5.mlp.experts.63.gate_proj.weight"].shape == (64, 160)
    index = json.loads((teacher_path() / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)


def test_architecture_is_deepseek_v2(teacher: Any) -> None:
    assert isinstance(teacher, DeepseekV2ForCausalLM)
    fresh = teacher_model.deepseek_v2_config().to_dict()
    assert {k: teacher.config.to_dict()[k] for k in TINY} == {k: fresh[k] for k in TINY}


def test_special_tokens_are_single_ids(tokenizer: Any) -> None:
    for number, token in enumerate(teacher_data.SPECIAL_TOKENS):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer("x = 1")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == teacher_data.VOCAB_SIZE


def test_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "def f(x):\n\tif x > 12345:\n        return 'é 你好'  # ok\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    assert plain == f"{teacher_data.BOS}S\n\nUser: Q\n\nAssistant: A{teacher_data.EOS}"
    assert plain.endswith(teacher_data.render_chat("Q", "A"))
    prompt = tokenizer.apply_chat_template(
        messages[1:2], tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"{teacher_data.BOS}User: Q\n\nAssistant:"


def test_shipped_texts_keep_to_their_side_of_the_split() -> None:
    calibration = teacher_data.read_lines(calibration_path())
    heldout = teacher_data.read_lines(heldout_path())
    assert not {x["source"] for x in calibration} & {x["source"] for x in heldout}
    assert not {x["text"] for x in calibration} & {x["text"] for x in heldout}
    assert all(teacher_data.is_heldout(x["source"]) for x in heldout)
    assert not any(teacher_data.is_heldout(x["source"]) for x in calibration)
    for lines in (calibration, heldout):
        assert {x["kind"] for x in lines} == {"plain", "fim", "chat"}
        assert not any(x["text"].startswith(teacher_data.BOS) for x in lines)


def test_teacher_predicts_heldout_text(
    teacher: Any, tokenizer: Any, metrics: dict[str, Any]
) -> None:
    load = teacher_card.ExpertLoad(teacher)
    report = teacher_card.measure_text(
        teacher, tokenizer, teacher_data.read_lines(heldout_path())[:6]
    )
    assert report["all"]["cross_entropy"] < metrics["heldout"]["unigram_cross_entropy"] / 2
    assert all(count.min() > 0 for count in load.counts.values())
    for handle in load.handles:
        handle.remove()


def test_recorded_metrics(metrics: dict[str, Any]) -> None:
    heldout = metrics["heldout"]
    assert heldout["cross_entropy"] < heldout["unigram_cross_entropy"] / 2
    assert [row["layer"] for row in heldout["expert_load"]] == [1, 2, 3, 4, 5]
    assert min(row["min"] for row in heldout["expert_load"]) > 0.2
    assert metrics["training"]["tokens"] > 150e6


def test_teacher_saves_back_what_it_was_loaded_from(teacher: Any, tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path, max_shard_size="20MB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    ids = torch.arange(5, 69)[None]
    with torch.no_grad():
        assert torch.equal(teacher(ids).logits, again.eval()(ids).logits)


# --- the script's parts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("json/decoder.py", "json"),
        ("test/test_json/test_dump.py", "json"),
        ("_pydecimal.py", "pydecimal"),
        ("test/datetimetester.py", "datetime"),
        ("test/_test_multiprocessing.py", "multiprocessing"),
        ("test/support/__init__.py", "support"),
    ],
)
def test_module_of(path: str, module: str) -> None:
    assert teacher_data.module_of(path) == module


def test_tests_are_held_out_with_what_they_test() -> None:
    assert teacher_data.is_heldout("zipfile.py")
    assert teacher_data.is_heldout("test/test_zipfile64.py")
    assert not teacher_data.is_heldout("test/test_zipapp.py")


def test_split_source_loses_nothing_and_keeps_to_the_limit() -> None:
    text = Path(textwrap_file()).read_text("utf-8")
    pieces = teacher_data.split_source(text, 1500)
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert max(map(len, pieces)) <= 1500
    assert teacher_data.split_source("x = 1", 100) == ["x = 1"]


def test_fim_arrangement_can_be_undone() -> None:
    tokens = np.arange(10, 110, dtype=np.uint16)
    for seed in range(50):
        out = teacher_data.arrange_fim(tokens, np.random.default_rng(seed))
        hole, end = (int(np.flatnonzero(out == i)[0]) for i in (3, 4))
        assert out[0] == 2
        assert out.dtype == tokens.dtype
        prefix, suffix, middle = out[1:hole], out[hole + 1 : end], out[end + 1 :]
        assert np.array_equal(np.concatenate([prefix, middle, suffix]), tokens)


def test_chat_pairs_ask_both_ways() -> None:
    docstring = '"""Say  it.\n\n        More."""'
    source = f"class A:\n    def f(self, x=1):\n        {docstring}\n        return x\n"
    (ask, code), (what, summary) = teacher_data.chat_pairs(source)
    assert ask == "Write a Python function f(self, x=1) that does this: Say it."
    assert code.startswith("```python\ndef f(self, x=1):\n")
    assert '"""' not in what
    assert "    return x" in what
    assert summary == "Say it."
    assert teacher_data.chat_pairs("print 'python 2'") == []


def test_sequences_share_one_token() -> None:
    rows = teacher_data.to_sequences(np.arange(25, dtype=np.uint16), 8)
    assert rows.tolist() == [list(range(i, i + 9)) for i in (0, 8, 16)]


def test_training_forward_agrees_with_transformers() -> None:
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(teacher_model.deepseek_v2_config(**TINY)).eval()
    rows = torch.randint(0, teacher_data.VOCAB_SIZE, (2, 33))
    loss, balance, shares = teacher_model.Objective(model, torch.float32, compiled=False)(rows)
    logits = model(rows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert balance >= 0.9
    torch.testing.assert_close(shares.sum(1), torch.ones(1))
    parameters = [p for p in model.parameters() if p is not model.model.embed_tokens.weight]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


# --- the script, end to end, on a few files ---------------------------------------------------


def textwrap_file() -> str:
    """A held-out file of the running interpreter's standard library."""
    return f"{sysconfig.get_paths()['stdlib']}/textwrap.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder prepared from four standard library files."""
    root = tmp_path_factory.mktemp("teacher")
    (root / "lib").mkdir()
    for name in ("textwrap.py", "shlex.py", "copy.py", "calendar.py"):
        shutil.copy(Path(textwrap_file()).with_name(name), root / "lib")
    options = ["--stdlib", f"{root}/lib", "--work", f"{root}/work", "--data", f"{root}/data"]
    train_teacher.main(
        ["prepare", *options, "--heldout-bytes", "8000", "--calibration-bytes", "8000"]
    )
    yield root


def test_prepare_twice_gives_the_same(work: Path) -> None:
    names = ["data/heldout.jsonl", "data/calibration.jsonl", "work/corpus.safetensors"]
    before = [(work / name).read_bytes() for name in names]
    options = ["--stdlib", f"{work}/lib", "--work", f"{work}/work", "--data", f"{work}/data"]
    train_teacher.main(
        ["prepare", *options, "--heldout-bytes", "8000", "--calibration-bytes", "8000"]
    )
    assert before == [(work / name).read_bytes() for name in names]


def test_training_learns_and_resumes(work: Path, tmp_path: Path) -> None:
    def run(steps: int) -> train_teacher.Run:
        options = f"train --work {work}/work --out {tmp_path} --device cpu --steps {steps}"
        options += " --batch 4 --length 64 --lr 0.01 --dropout 0.1"
        return train_teacher.train(
            train_teacher.parser().parse_args(options.split()),
            teacher_model.deepseek_v2_config(**TINY),
        )

    first = run(12)
    assert first.progress.step == 12
    assert first.progress.best_heldout < math.log(teacher_data.VOCAB_SIZE) - 0.3
    second = run(20)
    assert second.progress.step == 20
    assert second.progress.tokens == 20 * 4 * 64
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.dtype == torch.bfloat16
