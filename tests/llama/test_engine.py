"""Plain files that moefuse writes, in the engine: the same tokens as Transformers in f32."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import (
    cutting_tokenizer,
    expected,
    greedy,
    loaded,
    logits,
    prompts,
    save,
    tokenizer_of_pieces,
)
from numeric import assert_close
from running import write_text
from transformers import AutoModelForCausalLM

from moefuse import demo
from moefuse.collapse import collapse
from moefuse.corpus import load_documents, tokenize
from moefuse.evaluation.loading import load_tokenizer
from moefuse.export.expand import expand
from moefuse.export.gguf.vocabulary import PRE_TOKENIZERS
from moefuse.export.gguf.write import export_gguf
from moefuse.pipeline import fuse

NEW = 24
YARN = {
    "rope_theta": 10_000.0,
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek_v2", {"q_lora_rank": 24}),
    "deepseek_v2, whole queries": ("deepseek_v2", {}),
    "deepseek_v2, yarn": (
        "deepseek_v2",
        {"q_lora_rank": 24, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "qwen3_moe, yarn": ("qwen3_moe", {"norm_topk_prob": True, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "deepseek_v3, groups": ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": False}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "olmoe": ("olmoe", {"norm_topk_prob": False}),
    "glm4_moe": ("glm4_moe", {}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_are_transformers(case: str, tokenizer: Any, tmp_path: Path) -> None:
    family, changes = FAMILIES[case]
    model = save(tmp_path / "plain", family, tokenizer, **changes)

    export_gguf(tmp_path / "plain", tmp_path / "f32.gguf")

    given = prompts(20, len(tokenizer))
    with loaded(tmp_path / "f32.gguf") as engine:
        assert_close(logits(engine, given[0]), model(torch.tensor([given[0]])).logits[0], 1e-3)
        for ids in given:
            assert greedy(engine, ids, NEW) == expected(model, ids, NEW)


@pytest.mark.parametrize("form", ["expand", "collapse"])
def test_students_run_too(form: str, tokenizer: Any, tmp_path: Path) -> None:
    save(tmp_path / "teacher", "qwen3_moe", tokenizer, norm_topk_prob=True)
    text = str(write_text(tmp_path / "text.txt"))
    usual = {"data": text, "tokens": 512, "sequence_length": 64, "batch_size": 4}
    fuse(tmp_path / "teacher", tmp_path / "student", {**usual, "groups": 3, "rank": 2, "steps": 0})
    if form == "expand":
        expand(tmp_path / "student", tmp_path / "plain")
    else:
        collapse(tmp_path / "student", tmp_path / "plain", {**usual, "steps": 5})

    export_gguf(tmp_path / "plain", tmp_path / "f32.gguf")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with loaded(tmp_path / "f32.gguf") as engine:
        for ids in prompts(5, len(tokenizer)):
            assert greedy(engine, ids, NEW) == expected(model, ids, NEW)


@pytest.mark.parametrize(
    ("quant", "most"),
    [
        ("F32", 1e-5),
        ("F16", 0.001),
        ("BF16", 0.001),
        ("Q8_0", 0.005),
        ("Q6_K", 0.005),
        ("Q4_K_M", 0.03),
    ],
)
def test_quantised_files_predict_held_out_text_alike(
    quant: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled, really trained teacher: perplexities of the file and of Transformers in f32."""
    export_gguf(
        demo.teacher_path(),
        tmp_path / "out.gguf",
        quant=quant,
        pre_tokenizer="qwen2",
    )
    model = AutoModelForCausalLM.from_pretrained(demo.teacher_path(), dtype=torch.float32)
    documents = load_documents(demo.heldout_path())
    windows = tokenize(documents, load_tokenizer(demo.teacher_path()), 256, limit_tokens=4096)
    told, exact = [], []
    with loaded(tmp_path / "out.gguf") as engine, torch.no_grad():
        for ids_T in windows:
            told.append(losses(logits(engine, ids_T.tolist()), ids_T))
            exact.append(losses(model(ids_T[None]).logits[0], ids_T))
    ratio = math.exp(float(torch.cat(told).mean() - torch.cat(exact).mean()))
    with capsys.disabled():
        print(f"{quant}: perplexity x {ratio:.4f}, {(tmp_path / 'out.gguf').stat().st_size} bytes")
    assert abs(ratio - 1) < most


def losses(logits_TV: torch.Tensor, ids_T: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")


TEXTS = [
    "def add(first, second):\n    return 12 + second  # it's",
    "naïve 數 😀\t\n\n x",
    "WE'LL see: 1234567 (x+=1)\r\n\r\n  don't   stop!! ",
]


@pytest.mark.parametrize("cut", [*PRE_TOKENIZERS, None])
def test_text_becomes_the_same_tokens(cut: tuple[str, ...] | None, tmp_path: Path) -> None:
    made = cutting_tokenizer(cut) if cut else tokenizer_of_pieces()
    save(tmp_path / "plain", "qwen3_moe", made, norm_topk_prob=True)
    found = export_gguf(tmp_path / "plain", tmp_path / "f32.gguf")

    assert found.pre_tokenizer == (PRE_TOKENIZERS[cut] if cut else "default")
    with loaded(tmp_path / "f32.gguf") as engine:
        for text in TEXTS:
            told = engine.tokenize(text.encode(), add_bos=False, special=True)
            assert told == made(text)["input_ids"], text
