"""GGUF files read back by the gguf package: numbers, metadata, vocabulary; what is refused.

Whether the engine computes the same from them is shown by ``make test-llama-cpp``.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numeric import assert_close
from running import run_here
from tiny import BOS, EOS, save_tiny, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moefuse.artifacts import read_json, write_json
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.errors import UserError
from moefuse.export.gguf.tensors import neighbours
from moefuse.export.gguf.vocabulary import CONTROL, NORMAL, UNUSED, read_vocabulary
from moefuse.export.gguf.write import export_gguf, settings_of

Tiny = Callable[..., Path]
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"q_lora_rank": 8},
    "deepseek_v3": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "mixtral": {"sliding_window": None},
    "olmoe": {},
    "glm4_moe": {},
    "hunyuan_v1_moe": {},
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's metadata and its tensors in fp32, shapes as torch has them."""
    found = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in found.fields.items()}
    tensors = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in found.tensors
    }
    return facts, tensors


@pytest.mark.parametrize("family", CASES)
def test_tensors_are_the_checkpoints(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", family, **CASES[family])
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf")

    facts, tensors = read(tmp_path / "out.gguf")
    reader = CheckpointReader.open(tmp_path / "plain")
    architecture = facts["general.architecture"]
    assert facts[f"{architecture}.expert_count"] == 8
    assert facts[f"{architecture}.expert_used_count"] == 2
    assert facts[f"{architecture}.block_count"] == 3
    assert_close(tensors["token_embd.weight"], reader.read("model.embed_tokens.weight"))
    for layer in reader.shape.layers:
        gate_up, down, _ = reader.read_experts(layer)
        assert_close(tensors[f"blk.{layer}.ffn_gate_exps.weight"], gate_up[:, :16])
        assert_close(tensors[f"blk.{layer}.ffn_up_exps.weight"], gate_up[:, 16:])
        assert_close(tensors[f"blk.{layer}.ffn_down_exps.weight"], down)
    # Nothing is lost: every number that the model loads is in the file.
    stored = sum(info.numel for info in reader.tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == stored


def test_the_latents_projection_is_split(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "deepseek_v3")
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf")

    facts, tensors = read(tmp_path / "out.gguf")
    both = CheckpointReader.open(tmp_path / "plain").read(
        "model.layers.1.self_attn.kv_b_proj.weight"
    )
    keys, values = both.view(4, 16, 16).split(8, 1)
    assert_close(tensors["blk.1.attn_k_b.weight"], keys.transpose(1, 2))
    assert_close(tensors["blk.1.attn_v_b.weight"], values)
    assert facts["deepseek2.attention.head_count_kv"] == 1
    assert facts["deepseek2.attention.key_length_mla"] == 16
    assert facts["deepseek2.expert_gating_func"] == 2
    assert (facts["deepseek2.expert_group_count"], facts["deepseek2.expert_group_used_count"]) == (
        2,
        1,
    )
    assert "blk.1.exp_probs_b.bias" in tensors


def test_whole_queries_are_told_by_a_rank_of_zero(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "deepseek_v2")
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf")

    facts, tensors = read(tmp_path / "out.gguf")
    assert facts["deepseek2.attention.q_lora_rank"] == 0
    assert "blk.0.attn_q.weight" in tensors
    assert "moefuse.version" not in facts


def test_rotated_rows_become_neighbours() -> None:
    weight = torch.arange(16.0).view(8, 2)
    found = neighbours(weight, heads=2)[:, 0] // 2
    assert found.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("quant", "kind", "tolerance"),
    [("F16", "F16", 1e-3), ("BF16", "BF16", 8e-3), ("Q8_0", "Q8_0", 1e-2)],
)
def test_numbers_are_stored_as_asked(
    quant: str, kind: str, tolerance: float, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "plain", "qwen3_moe", norm_topk_prob=True)
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf", quant=quant)

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == quant
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    # Rows of 16 are half a block.
    assert kinds["blk.0.ffn_down_exps.weight"] == ("F16" if quant == "Q8_0" else quant)
    _, tensors = read(tmp_path / "out.gguf")
    expected, *_ = CheckpointReader.open(tmp_path / "plain").read_experts(0)
    assert_close(tensors["blk.0.ffn_up_exps.weight"], expected[:, 16:], tolerance)


def test_stretched_rotary_embeddings_are_told(tmp_path: Path) -> None:
    rope = {
        "rope_theta": 5e4,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
    save_tiny(tmp_path / "plain", "deepseek_v2", q_lora_rank=8, rope_parameters=rope)
    export_gguf(tmp_path / "plain", tmp_path / "out.gguf")

    facts, _ = read(tmp_path / "out.gguf")
    assert facts["deepseek2.rope.scaling.type"] == "yarn"
    assert facts["deepseek2.rope.scaling.factor"] == 4.0
    assert facts["deepseek2.rope.scaling.original_context_length"] == 128
    assert facts["deepseek2.rope.freq_base"] == 5e4
    assert facts["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)


# The vocabulary.


def test_the_vocabulary_is_whole(tmp_path: Path) -> None:
    markers = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    save_tiny(tmp_path / "plain", "qwen3_moe", norm_topk_prob=True, vocab_size=70)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        bos_token=BOS,
        eos_token=EOS,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "plain")

    export_gguf(tmp_path / "plain", tmp_path / "out.gguf")

    facts, _ = read(tmp_path / "out.gguf")
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 70
    assert tokens[:2] == [BOS, EOS]
    assert tokens[64:67] == markers
    assert {kinds[0], kinds[64]} == {CONTROL}
    assert kinds[10] == NORMAL
    assert set(kinds[67:]) == {UNUSED}
    assert facts["tokenizer.ggml.model"] == "gpt2"
    assert facts["tokenizer.ggml.pre"] == "gpt-2"
    assert facts["tokenizer.chat_template"] == "{{ messages }}"
    assert (facts["tokenizer.ggml.bos_token_id"], facts["tokenizer.ggml.eos_token_id"]) == (0, 1)
    fim = [facts[f"tokenizer.ggml.fim_{part}_token_id"] for part in ("pre", "suf", "mid")]
    assert fim == [64, 65, 66]
    assert facts["tokenizer.ggml.add_bos_token"] is False
    merges = read_json(tmp_path / "plain/tokenizer.json")["model"]["merges"]
    assert facts["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_pieces_with_bytes_are_told_by_scores(tmp_path: Path) -> None:
    pieces = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(tmp_path)

    found = read_vocabulary(tmp_path, fast, 7, None)

    assert (found.model, found.pre) == ("llama", "default")
    assert found.kinds == [2, 6, 1, 1, 1, 1, 1]
    assert np.all(np.diff(found.scores) < 0)
    assert found.special["ggml.add_space_prefix"] is True
    assert not found.merges


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "qwen2",
        ),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "llama-bpe",
        ),
        (r"\d+", None),
    ],
)
def test_how_text_is_cut_is_told_or_asked_for(
    cut: str, name: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "plain", "qwen3_moe", norm_topk_prob=True)
    stored = read_json(tmp_path / "plain/tokenizer.json")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    stored["pre_tokenizer"] = json.loads(backend.to_str())["pre_tokenizer"]
    write_json(tmp_path / "plain/tokenizer.json", stored)

    ran = run_here(capfd, "export", "gguf", tmp_path / "plain", tmp_path / "out.gguf")

    if name is None:
        assert ran.status == 2
        assert "--pre-tokenizer" in ran.err
        declared = ("--pre-tokenizer", "qwen2")
        ran = run_here(
            capfd, "export", "gguf", tmp_path / "plain", tmp_path / "out.gguf", *declared
        )
    assert ran.status == 0, ran.err
    assert read(tmp_path / "out.gguf")[0]["tokenizer.ggml.pre"] == (name or "qwen2")


# What is refused.


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v2", {"q_lora_rank": 8, "num_hidden_layers": 27}, "27 layers"),
        (
            "deepseek_v2",
            {
                "q_lora_rank": 8,
                "topk_method": "group_limited_greedy",
                "n_group": 2,
                "topk_group": 1,
            },
            "group_limited_greedy",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}, "experts in every layer"),
        ("qwen3_moe", {"norm_topk_prob": True, "hidden_act": "gelu"}, "silu"),
        ("mixtral", {"sliding_window": 16}, "sliding window"),
        ("olmoe", {"clip_qkv": 1.0}, "clip_qkv"),
        ("ernie4_5_moe", {}, "No GGUF files are written for the family"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_with_the_reason(
    family: str,
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_tiny(tmp_path / "plain", family, **changes)
    ran = run_here(capfd, "export", "gguf", tmp_path / "plain", tmp_path / "out.gguf")
    assert ran.status == 2
    assert words in ran.err
    assert {path.name for path in tmp_path.iterdir()} == {"plain"}


def test_bad_input(
    tiny_checkpoint: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_checkpoint("olmoe")
    (tmp_path / "there.gguf").touch()
    for arguments, words in (
        ([plain, tmp_path / "out.bin"], "ends in .gguf"),
        ([plain, tmp_path / "there.gguf"], "exists already"),
        ([tmp_path / "nowhere", tmp_path / "out.gguf"], "does not exist"),
    ):
        ran = run_here(capfd, "export", "gguf", *arguments)
        assert ran.status == 2
        assert words in ran.err


def test_kinds_of_the_engines_own_need_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    save_tiny(tmp_path / "plain", "olmoe")
    with pytest.raises(UserError, match=r"moefuse\[llama-cpp\].*F32, F16, BF16 or Q8_0\.$"):
        export_gguf(tmp_path / "plain", tmp_path / "out.gguf", quant="q4_k_m")


@pytest.mark.parametrize("quant", ["Q9", "ALL_F32", "GUESSED", "MOSTLY_Q4_K_M", ""])
def test_an_unknown_kind_is_told_as_unknown_without_the_engine(
    quant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    save_tiny(tmp_path / "plain", "olmoe")
    with pytest.raises(UserError, match=r"is unknown; choose auto, F32, .*Q4_K_M") as told:
        export_gguf(tmp_path / "plain", tmp_path / "out.gguf", quant=quant)
    assert "install" not in str(told.value)
    assert "GUESSED" not in str(told.value).partition(";")[2]
    assert not (tmp_path / "out.gguf").exists()


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    save_tiny(tmp_path / "plain", "olmoe")
    reader = CheckpointReader.open(tmp_path / "plain")
    few = {"model_type": "olmoe", "hidden_size": 32}
    assert settings_of(reader.family, few)["rms_norm_eps"] == 1e-5
