import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

from moefuse.checkpoint.headers import read_headers
from moefuse.errors import UserError
from moefuse.evaluation.loading import count_active_parameters, expert_bytes, load_model
from moefuse.modeling import FusedExperts, fused_classes

LAYER = {"groups": 3, "rank": 4, "delta": "low_rank", "scale": True, "bias": False}
D, F, E, K = 32, 16, 8, 2


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    path = tmp_path / "fused"
    config_class, _, causal = fused_classes("deepseek_v2")
    options = tiny_config().to_dict()
    options.pop("model_type")
    block = {"stage": "one-shot", "seed": 3, "layers": {"1": LAYER, "2": {**LAYER, "rank": 2}}}
    causal(config_class(**options, moefuse=block)).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_a_plain_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    model, tokenizer = load_model(tiny_checkpoint())
    assert not model.training and model.dtype == torch.float32
    ids_BS = torch.tensor([tokenizer("def add").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids_BS).logits, tiny_model()(ids_BS).logits)


def test_dtype_is_as_stored_unless_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path, dtype=torch.bfloat16)
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float32")[0].dtype == torch.float32


def test_a_fused_checkpoint_needs_no_consent(fused: Path) -> None:
    model, tokenizer = load_model(fused)
    assert sum(isinstance(module, FusedExperts) for module in model.modules()) == 2
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_sizes_of_a_fused_checkpoint(fused: Path) -> None:
    model, _ = load_model(fused)
    headers = read_headers(fused)
    bases = 3 * 3 * D * F
    deltas = [E * (rank * (D + 2 * F + F + D) + 2 * F) for rank in (4, 2)]
    maps = 8 * E
    assert expert_bytes(headers) == 4 * (2 * bases + sum(deltas)) + 2 * maps
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 2 * bases // 3 + sum(deltas) * (E - K) // E
    assert count_active_parameters(model, headers) == total - idle


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_sizes_of_other_families(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint(family)
    model, _ = load_model(path)
    headers = read_headers(path)
    stored = expert_bytes(headers)
    assert stored is not None and stored % (4 * E * 3 * D * F) == 0 and stored > 0
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_active_parameters(model, headers) == total - stored // 4 * (E - K) // E


def test_sizes_of_an_unknown_family_are_unknown(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, _ = load_model(tmp_path)
    edit_config(tmp_path, model_type="strange")
    headers = read_headers(tmp_path)
    assert expert_bytes(headers) is None
    assert count_active_parameters(model, headers) is None


def test_what_is_no_model_is_told(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="some/model"):
        load_model("some/model")
    path = tiny_checkpoint()
    edit_config(path, model_type="strange")
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 40}, "weights of other shapes"),
        ({"hidden_act": "odd"}, "KeyError: 'odd'"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"num_hidden_layers": 4}, "lacks 13 of the weights"),
        ({"moefuse": {"layers": {}}}, "model_type is 'deepseek_v2'"),
        ({"moefuse": {}, "model_type": "moefuse_deepseek_v2"}, "moefuse block names no layers"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(
    tiny_checkpoint: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    path = tiny_checkpoint()
    edit_config(path, **changes)
    with pytest.raises(UserError, match=reason):
        load_model(path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_tiny(tmp_path, max_shard_size="1GB")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the weights.*model\.norm\.weight"):
        load_model(tmp_path)


def test_a_missing_tokenizer_is_told(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint()
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        load_model(path)


def test_foreign_code_runs_only_with_consent(tiny_checkpoint: Callable[..., Path]) -> None:
    path = tiny_checkpoint()
    marker = path / "it_ran"
    (path / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import DeepseekV2Config\n"
        "class Theirs(DeepseekV2Config):\n    model_type = 'theirs'\n"
    )
    edit_config(path, model_type="theirs", auto_map={"AutoConfig": "theirs.Theirs"})
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_model(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "float13"}, "'float13' is no dtype"),
        ({"device": "toaster"}, "'toaster' is no device"),
        ({"device": "meta"}, "holds no numbers"),
    ],
)
def test_bad_options_are_told(
    tiny_checkpoint: Callable[..., Path], options: dict[str, str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        load_model(tiny_checkpoint(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_accelerator_is_told(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="'cuda' cannot be used here"):
        load_model(tiny_checkpoint(), device="cuda")
