"""A student of every family whose experts share bases, saved, loaded and used by a stranger."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from strangers import IDS_BS, TO_MANY, see
from tiny import TEXT, save_tiny
from torch import Tensor

from moefuse.evaluation.loading import load_tokenizer
from moefuse.families import all_families
from moefuse.modeling import FusedExperts, load_fused
from moefuse.pipeline import fuse

FAMILIES = sorted(all_families())


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a student of every family lies, under the family's name."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "text.txt").write_text(TEXT * 8)
    values = {"data": str(folder / "text.txt"), "tokens": 128, "sequence_length": 32, "steps": 0}
    for family in FAMILIES:
        save_tiny(folder / f"{family}-teacher", family)
        fuse(folder / f"{family}-teacher", folder / family, {**values, "groups": 3, "rank": 3})
    return folder


@pytest.fixture(scope="module")
def seen(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a process that cannot import moefuse made of all the students."""
    return see(TO_MANY, tmp_path_factory.mktemp("seen"), *(home / family for family in FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_moefuse_it_computes_and_generates_the_same(
    family: str, home: Path, seen: Path
) -> None:
    told, own = load_file(seen / f"{family}.safetensors"), load_fused(home / family).eval()

    layers = [module for module in own.modules() if isinstance(module, FusedExperts)]
    assert layers and all(len(layer.bases) == 3 < layer.num_experts for layer in layers)
    assert torch.equal(told["logits"], own(IDS_BS).logits)
    assert torch.equal(told["again"], told["logits"])
    greedy = own.generate(IDS_BS, max_new_tokens=7, do_sample=False)  # type: ignore[operator]
    assert torch.equal(told["greedy"], greedy)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_again_it_is_the_same(family: str, home: Path, seen: Path, tmp_path: Path) -> None:
    """By the class that travels, and by moefuse's own."""
    first = load_fused(home / family)
    first.save_pretrained(tmp_path / "again")

    for directory in (tmp_path / "again", seen / f"{family}-saved"):
        again, found = load_fused(directory, output_loading_info=True)  # type: ignore[misc]
        assert not any(found.values())
        stored, wanted = tensors_of(directory), tensors_of(home / family)
        assert stored.keys() == wanted.keys()
        assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
        assert torch.equal(again(IDS_BS).logits, first(IDS_BS).logits)


@pytest.mark.parametrize(
    ("family", "named", "true"),
    [
        ("deepseek_v2", "LlamaTokenizerFast", "TokenizersBackend"),
        ("phimoe", "LlamaTokenizerFast", "TokenizersBackend"),
        ("qwen3_5_moe_text", "Qwen2Tokenizer", "Qwen3_5Tokenizer"),
        ("olmoe", None, "GPTNeoXTokenizer"),
    ],
)
def test_the_tokenizer_is_the_one_that_the_teachers_is_loaded_as(
    family: str, named: str | None, true: str, tmp_path: Path
) -> None:
    """Published settings name another class, which Transformers mends by the model type alone."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_tiny(teacher, family)
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = named
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    if named is None:
        (teacher / "tokenizer_config.json").unlink()
    (tmp_path / "text.txt").write_text(TEXT * 8)
    values = {"data": str(tmp_path / "text.txt"), "tokens": 64, "sequence_length": 32}

    fuse(teacher, student, {**values, "steps": 0, "groups": 3, "rank": 0})

    theirs, ours = (load_tokenizer(directory) for directory in (teacher, student))
    assert type(theirs).__name__ == type(ours).__name__ == true
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (TEXT, "  def  add(a,\n\t b)", ""):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
