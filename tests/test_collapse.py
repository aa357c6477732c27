"""Students as plain models with one expert for each group: every family's own architecture."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import changes, contents, run_elsewhere, run_here, write_jsonl, write_text
from safetensors.torch import load_file, save_file
from students import student_of
from tiny import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefuse.collapse import CollapseJob, collapse
from moefuse.distillation.collapsed import folded
from moefuse.evaluation.run import evaluate_command
from moefuse.families import all_families
from moefuse.modeling import load_fused

FAMILIES = sorted(all_families())
IDS_BS = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(0))
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collapse")
    write_text(folder / "text.txt")
    write_jsonl(folder / "held.jsonl", documents=4)
    return folder


@pytest.fixture(scope="module")
def student(home: Path) -> Make:
    def make(family: str = "deepseek_v2", **settings: Any) -> Path:
        return student_of(home, family, **settings)

    return make


@pytest.fixture
def values(home: Path) -> dict[str, Any]:
    return {
        "data": str(home / "text.txt"),
        "tokens": 512,
        "sequence_length": 64,
        "batch_size": 4,
        "batch_tokens": 64,
        "router_steps": 10,
        "steps": 10,
    }


def plain(path: Path) -> PreTrainedModel:
    model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def kl(model: Path, teacher: Path, text: Path) -> float | None:
    """Return KL(teacher || model) of two checkpoints loaded whole."""
    options: dict[str, Any] = {"tokens": 12_288, "sequence_length": 64, "dtype": "float32"}
    return evaluate_command(str(model), str(teacher), str(text), **options).rows[-1].kl


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_its_own_architecture(
    student: Make, home: Path, values: dict[str, Any], tmp_path: Path, family: str
) -> None:
    fused = student(family, groups=3, rank=2)

    result = collapse(fused, tmp_path / "plain", {**values, "held_out": str(home / "held.jsonl")})

    model = plain(tmp_path / "plain")
    assert type(model).__name__ == all_families()[family].causal_lm
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert all_families()[family].shape(config).experts == 3
    assert config[all_families()[family].experts_count_key] == 3
    assert result.top_k == all_families()[family].shape(config).top_k == 2
    # Random experts have nothing in common, so a mean of them may err by more than the whole.
    assert all(error["after"] < error["before"] for error in result.errors.values())
    # What was measured layer by layer is what the written model does.
    (loss,) = result.losses
    held = home / "held.jsonl"
    assert kl(tmp_path / "plain", fused, held) == pytest.approx(loss.kl, rel=1e-3)
    assert kl(fused, tmp_path / "plain", held) == pytest.approx(loss.reverse_kl, rel=1e-3)
    assert not (tmp_path / "plain.work").exists()


def test_more_steps_lose_less(
    student: Make, values: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    fused = student(groups=3, rank=2)
    given = {**values, "held_out": str(home / "held.jsonl")}

    def errors(**more: Any) -> tuple[list[float], float]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        made = collapse(fused, tmp_path / "out", {**given, **more})
        return [error["after"] for error in made.errors.values()], made.losses[0].kl

    begun, begun_kl = errors(router_steps=0, steps=0)
    learnt, learnt_kl = errors(router_steps=100, steps=100)
    assert sum(learnt) < sum(begun)
    assert learnt_kl < begun_kl


def test_alike_experts_with_one_router_row_lose_nothing(
    student: Make, values: dict[str, Any], tmp_path: Path
) -> None:
    """Where every token weighs a group the same, what is told in closed form is already exact."""
    fused = tmp_path / "alike"
    shutil.copytree(student("mixtral", groups=2, rank=0, scale=False), fused)
    for shard in fused.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("group_of_expert"):
                tensor.copy_(torch.arange(8) % 2)
            if name.endswith("mlp.gate.weight"):
                # The first expert of either group is always chosen, at even weights.
                tensor.zero_()
        save_file(tensors, shard, metadata={"format": "pt"})

    collapse(fused, tmp_path / "plain", {**values, "steps": 0})

    with torch.no_grad():
        expected = load_fused(fused).eval()(IDS_BS).logits
        assert_close(plain(tmp_path / "plain")(IDS_BS).logits, expected)


def test_groups_of_experts_are_lifted(
    student: Make, values: dict[str, Any], tmp_path: Path
) -> None:
    collapse(student("deepseek_v3", groups=3, rank=2), tmp_path / "plain", values)

    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 3)


def test_a_token_chooses_no_more_than_there_are(
    student: Make, values: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    save_tiny(home / "olmoe-teacher", "olmoe", num_experts_per_tok=5)
    result = collapse(student("olmoe", groups=2, rank=2, seed=1), tmp_path / "plain", values)
    assert (result.groups, result.top_k) == (2, 2)
    plain(tmp_path / "plain")(IDS_BS)
    shutil.rmtree(home / "olmoe-teacher")


def test_healed_on_request(
    student: Make, values: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    given = {**values, "held_out": str(home / "held.jsonl")}
    healing = {"tokens": "4K", "batch_size": 4, "expert_rate": 2e-3, "rate": 1e-3}

    result = collapse(student(groups=3, rank=2), tmp_path / "plain", given, healing=healing)

    assert [loss.stage for loss in result.losses] == ["distilled", "healed"]
    assert result.losses[1].kl < result.losses[0].kl
    report = json.loads((tmp_path / "plain/collapse.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["distilled", "healed"]
    found = kl(tmp_path / "plain", student(groups=3, rank=2), home / "held.jsonl")
    assert found == pytest.approx(result.losses[1].kl, rel=1e-3)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    student: Make, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = student(groups=3, rank=2)
    collapse(fused, tmp_path / "whole", values)
    make = CollapseJob._make

    def dies(job: CollapseJob, layer: int, call: Any) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        make(job, layer, call)

    monkeypatch.setattr(CollapseJob, "_make", dies)
    with pytest.raises(KeyboardInterrupt):
        collapse(fused, tmp_path / "resumed", values)
    monkeypatch.undo()
    collapse(fused, tmp_path / "resumed", values)

    tensors = [
        {name: data for name, data in contents(tmp_path / d).items() if "safetensors" in name}
        for d in ("whole", "resumed")
    ]
    assert tensors[0] == tensors[1]


def test_killed_while_healing_goes_on_to_the_same_bytes(
    student: Make, values: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    """From the last whole checkpoint of the training, not from its beginning."""
    settings = {"batch_size": 4, "save_steps": 3, "sequence_length": 32}
    (tmp_path / "healing.json").write_text(json.dumps(settings))
    flags = [part for k, v in values.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    healing = ("--heal-tokens", "1K", "--healing", tmp_path / "healing.json")
    given = [student(groups=3, rank=2), *flags, *healing]

    def run(name: str, **how: Any) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        first, *rest = given
        where = tmp_path / name
        return run_elsewhere(where / "log", "collapse", first, where / "plain", *rest, **how)

    assert run("whole") == 0, (tmp_path / "whole/log").read_text()
    inside = [
        at
        for at, (_, path) in enumerate(changes(tmp_path / "whole/log"), start=1)
        if "checkpoint-6/" in path
    ]
    assert run("killed", die_at=inside[len(inside) // 2]) == -signal.SIGKILL
    whole = tmp_path.glob("killed/plain.work/*/healing-*/checkpoint-*/complete.json")
    assert [path.parent.name for path in whole] == ["checkpoint-3"]

    assert run("killed") == 0, (tmp_path / "killed/log").read_text()
    again = [path for _, path in changes(tmp_path / "killed/log")]
    assert not any("checkpoint-3/model" in path for path in again)
    told = [contents(tmp_path / name / "plain") for name in ("whole", "killed")]
    for files in told:
        files.pop("collapse.json")  # its date
    assert told[0] == told[1]
    assert not (tmp_path / "killed/plain.work").exists()


def test_folding_weighs_by_routed_mass() -> None:
    stacked = torch.arange(8.0).view(4, 2)
    group = torch.tensor([0, 1, 0, 1])
    mass = torch.tensor([1.0, 0.0, 3.0, 0.0], dtype=torch.float64)

    expected = torch.stack([stacked[0] / 4 + stacked[2] * 3 / 4, (stacked[1] + stacked[3]) / 2])
    assert_close(folded(stacked, group, mass), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expert_bits": 4.0}, "has no groups"),
        ({"groups": 1, "rank": 2}, "one group a layer"),
    ],
)
def test_what_cannot_be_collapsed_is_refused(
    student: Make,
    values: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    words: str,
) -> None:
    fused = student(**settings)
    ran = run_here(capfd, "collapse", fused, tmp_path / "out", "--data", values["data"])
    assert ran.status == 2
    assert words in ran.err
    assert not (tmp_path / "out").exists()


def test_bad_input(
    student: Make, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fused = student(groups=3, rank=2)
    for arguments, words in (
        (["collapse", fused, tmp_path / "out"], "--data"),
        (["collapse", home / "deepseek_v2-teacher", tmp_path / "out"], "no moefuse block"),
        (["collapse", fused, fused / "in", "--data", home / "text.txt"], "lies in the checkpoint"),
    ):
        ran = run_here(capfd, *arguments)
        assert ran.status == 2
        assert words in ran.err
