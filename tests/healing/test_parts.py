"""What trains, what stays as it was to the last bit, and what the optimiser remembers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from running import write_text
from tiny import save_tiny
from torch import Tensor
from transformers import PreTrainedModel

from moefuse.config import HealConfig
from moefuse.errors import UserError
from moefuse.families import all_families
from moefuse.heal import heal_in_place
from moefuse.healing.parts import check_trains, is_trained, parameter_groups, part_of
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.text import PackedText, pack
from moefuse.healing.trainer import train
from moefuse.modeling import load_fused
from moefuse.modeling.training import stored_to_trained

FAMILY = all_families()["deepseek_v2"]
RATES: dict[str, Any] = {"expert_rate": 1e-3, "rate": 2e-3, "router_rate": 3e-3, "code_rate": 4e-3}
SHORT: dict[str, Any] = {"tokens": "256", "sequence_length": 32, "batch_size": 4, "save_steps": 1}
MADE: dict[str, Any] = {
    "tokens": 256,
    "sequence_length": 64,
    "steps": 2,
    "batch_tokens": 64,
    "sensitivity_tokens": 256,
}
FORMS: dict[str, dict[str, Any]] = {
    "deltas": {"groups": 3, "rank": 2},
    "neurons": {"expert_bits": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moefuse.pipeline import fuse

    folder = tmp_path_factory.mktemp("parts")
    save_tiny(folder / "teacher")
    write_text(folder / "text.txt")
    for form, sizes in FORMS.items():
        fuse(folder / "teacher", folder / form, {**MADE, **sizes, "data": str(folder / "text.txt")})
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> PackedText:
    from moefuse.corpus import load_documents, load_tokenizer

    documents = load_documents(folder / "text.txt")
    tokenizer = load_tokenizer(folder / "teacher", "teacher")
    return pack(documents, tokenizer, 32, tokens=256, seed=0)


def student(folder: Path, form: str) -> PreTrainedModel:
    return load_fused(folder / form, dtype=torch.float32)


def teacher(folder: Path) -> PreTrainedModel:
    from moefuse.evaluation.loading import load_model

    return load_model(folder / "teacher", dtype="float32")[0]


def expected_part(name: str, form: str) -> str:
    if ".mlp.gate." in name:
        return "router"
    if ".experts." not in name:
        return "other"
    coded = form == "neurons" and name.endswith(("latent", "codebook", ".scale"))
    return "codes" if coded else "experts"


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_belongs_to_one_part(form: str, folder: Path) -> None:
    model = student(folder, form)
    stored_to_trained(model)
    found = {name: part_of(name, FAMILY) for name, _ in model.named_parameters()}
    assert found == {name: expected_part(name, form) for name in found}
    wanted = {"router", "other", "codes" if form == "neurons" else "experts"}
    assert wanted <= set(found.values())
    groups = list(parameter_groups(model, FAMILY, HealConfig(**RATES)))
    rates = {"experts": 1e-3, "other": 2e-3, "router": 3e-3, "codes": 4e-3}
    of_rate = {id(p): group["lr"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert {n: of_rate[id(p)] for n, p in model.named_parameters()} == {
        n: rates[part] for n, part in found.items()
    }


CHOICES = [
    ("deltas", "all", None, {"experts", "router", "other"}),
    ("deltas", "all", False, {"experts", "other"}),
    ("deltas", "experts", None, {"experts"}),
    ("deltas", "experts", True, {"experts", "router"}),
    ("deltas", "deltas", None, {"experts"}),
    ("neurons", "all", None, {"codes", "router", "other"}),
    ("neurons", "experts", False, {"codes"}),
]


def whole(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("form", "trained", "router", "parts"), CHOICES)
def test_what_is_frozen_stays_to_the_last_bit(
    form: str, trained: str, router: bool | None, parts: set[str], folder: Path, text: PackedText
) -> None:
    options = HealConfig(**{**SHORT, **RATES}, train=trained, router=router)
    model = student(folder, form)
    before = whole(model)

    heal_in_place(
        model, teacher(folder), text, FAMILY, options, seed=0, device="cpu", description=None
    )

    changed = {name for name, t in whole(model).items() if not torch.equal(before[name], t)}
    names = {name for name in before if is_trained(name, FAMILY, options)}
    assert changed
    assert changed <= names
    found = {expected_part(name, form) for name in changed}
    # Once they are stored, codes are numbers of entries.
    found = {"codes" if form == "neurons" and part == "experts" else part for part in found}
    assert found == parts
    if trained == "deltas":
        assert all(".delta." in name or name.endswith("experts.scale") for name in changed)


@pytest.mark.parametrize(("form", "trained", "router", "parts"), CHOICES)
def test_the_optimiser_remembers_only_what_trains(
    form: str,
    trained: str,
    router: bool | None,
    parts: set[str],
    folder: Path,
    text: PackedText,
    tmp_path: Path,
) -> None:
    options = HealConfig(**SHORT, train=trained, router=router)
    model = student(folder, form)
    stored_to_trained(model)
    source = LiveTeacher(teacher(folder), FAMILY)

    train(
        model,
        source,
        text,
        FAMILY,
        options,
        directory=tmp_path,
        seed=0,
        device="cpu",
        mixed=False,
        description=None,
    )

    kept = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    sizes = sorted(state["exp_avg"].numel() for state in kept.values())
    wanted = sorted(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if is_trained(name, FAMILY, options)
    )
    assert sizes == wanted
    assert len(wanted) < len(list(model.parameters())) or trained == "all"


def test_a_student_without_deltas_has_none_to_train(folder: Path) -> None:
    names = [name for name in whole(student(folder, "neurons"))]
    with pytest.raises(UserError, match="leaves nothing to train in this student, which has no"):
        check_trains(names, FAMILY, HealConfig(train="deltas"))
    check_trains(names, FAMILY, HealConfig(train="deltas", router=True))
