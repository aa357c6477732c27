"""A student of every family whose experts share bases, saved, loaded and used by a stranger."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from strangers import IDS_BS, TO_MANY, see
from tiny import TEXT, save_tiny
from torch import Tensor

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
