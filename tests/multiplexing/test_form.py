"""``--form multiplexed``: the recipe of the release of 2025 as a checkpoint, by its own words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from running import CALIBRATION, Ran, run_here, write_text
from safetensors import safe_open
from safetensors.torch import load_file
from strangers import IDS_BS, TO_MANY, see
from tiny import save_tiny
from torch import Tensor

from moefuse.baselines import method
from moefuse.baselines._multiplexing_recipe import Size, student_numbers
from moefuse.checkpoint.headers import read_headers
from moefuse.comparison import describe
from moefuse.evaluation.loading import count_active_parameters
from moefuse.heal import heal
from moefuse.mathematics.experts import ExpertsCall
from moefuse.modeling import load_fused
from moefuse.modeling.modeling_moefuse import MultiplexedExperts
from moefuse.pipeline import FuseResult, Job, fuse

FAMILY = "qwen3_moe"
G, R = 2, 3
SHORT: dict[str, Any] = {"tokens": 512, "sequence_length": 64, "batch_size": 4, "steps": 0}
FORM: dict[str, Any] = {**SHORT, "form": "multiplexed", "groups": G, "rank": R}
RIVALS: dict[str, dict[str, Any]] = {
    "multiplex-mixture-of-lora": {},
    "multiplex-fused-lora": {"mixture": "lora", "rank": 9},
    "multiplex-sce": {"merge": "sce"},
    "multiplex-mean": {"merge": "mean"},
    "multiplex-output-clusters": {"grouping": "state"},
    "multiplex-halving": {"progressive": True, "rank": 0},
    "multiplex-bases-only": {"rank": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "greedy": {"merge": "greedy"},
    "topk": {"grouping": "topk", "merge": "mean", "mixture": "lora"},
    "halved": {"progressive": True, "merge": "slerp", "groups": 3},
    "few-tokens": {"fit_tokens": 64},
}
ALL = {**RIVALS, **OTHERS}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("multiplexed")
    save_tiny(home / "teacher", FAMILY)
    write_text(home / "text.txt")
    return home


@pytest.fixture(scope="module")
def made(home: Path) -> Callable[[str], FuseResult]:
    """Return what makes a student by the name of its wishes in ``ALL``, once."""
    found: dict[str, FuseResult] = {}

    def student(name: str) -> FuseResult:
        if name not in found:
            wishes = {**FORM, **ALL[name], "data": str(home / "text.txt")}
            found[name] = fuse(home / "teacher", home / name, wishes, work=home / "work")
        return found[name]

    return student


def job_of(home: Path, name: str) -> Job:
    wishes = {**FORM, **ALL[name], "data": str(home / "text.txt")}
    return Job(home / "teacher", home / "work", wishes)


def experts_of(out: Path) -> dict[int, MultiplexedExperts]:
    model = load_fused(out, dtype=torch.float32)
    found = [module for module in model.modules() if isinstance(module, MultiplexedExperts)]
    return dict(enumerate(found))


def outputs(module: torch.nn.Module, call: ExpertsCall) -> Tensor:
    with torch.no_grad():
        return module(call.x_TD, call.index_TK.long(), call.weight_TK)


# It is the recipe.


@pytest.mark.parametrize("name", RIVALS)
def test_the_checkpoint_computes_what_the_rival_does(
    name: str, made: Callable[[str], FuseResult], home: Path
) -> None:
    stored = experts_of(made(name).out)
    job = job_of(home, name)
    kind: Any = None if job.size.rank == 0 else job.size.mixture or "mixture"

    for layer in job.reader.shape.layers:
        given = replace(describe(job, layer), seed=job.compute.seed + layer)
        size = Size(G, job.size.rank or 0, routed=True)
        rival = method(name).compress(given, student_numbers(given, size, kind))
        assert_close(outputs(stored[layer], given.call), outputs(rival, given.call))


@pytest.mark.parametrize("name", ALL)
def test_sizes_are_those_of_the_file(name: str, made: Callable[[str], FuseResult]) -> None:
    result = made(name)
    numbers, experts, total = 0, 0, 0
    for path in result.out.glob("*.safetensors"):
        for tensor_name, tensor in load_file(path).items():
            total += tensor.nbytes
            experts += tensor.nbytes * (".experts." in tensor_name)
            numbers += tensor.numel() * tensor.is_floating_point()

    assert (total, experts) == (result.plan.bytes, result.plan.expert_bytes)
    assert numbers == result.plan.parameters
    model = load_fused(result.out)
    counted = count_active_parameters(model, read_headers(result.out))
    assert counted == result.plan.active_parameters


def test_greedy_takes_less_of_a_group_where_that_errs_less(
    made: Callable[[str], FuseResult],
) -> None:
    greedy, mean = (made(name) for name in ("greedy", "multiplex-mean"))

    bases = [experts_of(student.out)[0].bases[0].down_proj.weight for student in (greedy, mean)]  # type: ignore[union-attr]
    assert not torch.allclose(*bases)
    groups = [experts_of(student.out)[0].group_of_expert for student in (greedy, mean)]
    assert torch.equal(*groups)


def test_topk_groups_are_as_they_fall(made: Callable[[str], FuseResult], home: Path) -> None:
    experts = experts_of(made("topk").out)[0]
    count_EE = job_of(home, "topk").store.statistics(0).coactivation_EE

    centres = count_EE.diagonal().sort(descending=True, stable=True).indices[:G]
    for expert, group in enumerate(experts.group_of_expert.tolist()):
        nearest = centres[count_EE[expert, centres].argmax()]
        wanted = expert if expert in centres else nearest
        assert experts.group_of_expert[wanted] == group


def test_halved_bases_have_adapters_of_their_members(
    made: Callable[[str], FuseResult], home: Path
) -> None:
    experts = experts_of(made("halved").out)[0]
    base_DF = experts.bases[0].down_proj.weight.detach()  # type: ignore[union-attr]
    member = int((experts.group_of_expert == 0).nonzero()[0])
    teacher = job_of(home, "halved").experts(0)

    _, _, v_FF = torch.linalg.svd(teacher.down_EDF[member] - base_DF, full_matrices=False)
    a_RF = experts.delta.down.a[member].detach()
    directions_RF = a_RF / a_RF.norm(dim=1, keepdim=True)
    assert_close((directions_RF @ v_FF[:R].T).abs(), torch.eye(R), 1e-3)


# It is a checkpoint like any other.


def test_it_loads_where_moefuse_is_not_installed(
    made: Callable[[str], FuseResult], tmp_path: Path
) -> None:
    names = ["multiplex-mixture-of-lora", "topk"]

    seen = see(TO_MANY, tmp_path, *(made(name).out for name in names))

    for name in names:
        told = load_file(seen / f"{name}.safetensors")
        with torch.no_grad():
            expected = load_fused(made(name).out, dtype=torch.float32)(IDS_BS).logits
        assert_close(told["logits"], expected)
        assert torch.equal(told["again"], told["logits"])
        assert told["greedy"].shape == (2, 18)


def test_layers_are_distilled(home: Path, tmp_path: Path) -> None:
    wishes = {**FORM, "mixture": "lora", "data": str(home / "text.txt"), "batch_tokens": 64}

    result = fuse(home / "teacher", tmp_path / "student", {**wishes, "steps": 60})

    assert all(e["after"] < 0.95 * e["before"] for e in result.errors.values())


def test_it_heals_and_the_card_tells_the_form(
    made: Callable[[str], FuseResult], home: Path, tmp_path: Path
) -> None:
    student = made("topk").out
    values = {"data": str(home / "text.txt"), "tokens": "2K", "sequence_length": 32}

    heal(
        student,
        tmp_path / "healed",
        {**values, "batch_size": 8, "train": "deltas"},
        teacher=home / "teacher",
    )

    before, after = (
        dict(load_fused(path).named_parameters()) for path in (student, tmp_path / "healed")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".delta." in name}
    for card in ((path / "README.md").read_text() for path in (student, tmp_path / "healed")):
        told = " ".join(card.split())
        assert "8 routed experts of each layer multiplexed by moefuse into 2 fused experts" in told
        assert "grouping topk, merge mean, adapters lora" in told
        assert "moefuse expand" not in told


def test_it_has_no_plain_form(
    made: Callable[[str], FuseResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = run_here(capfd, "expand", made("topk").out, tmp_path / "plain")

    assert ran.status == 2
    assert "no plain form" in ran.err


def test_evaluated_and_generated_from(
    made: Callable[[str], FuseResult], home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student, text = made("multiplex-mixture-of-lora").out, home / "text.txt"
    data = ("--data", text, "--tokens", "256", "--sequence-length", "64", "--json")

    told = run_here(capfd, "eval", student, "--teacher", home / "teacher", *data)
    written = run_here(capfd, "generate", student, "--prompt", "def", "--max-new-tokens", "4")

    assert (told.status, written.status) == (0, 0)
    rows = json.loads(told.out)
    assert "kl" in json.dumps(rows)


# Wishes.


def planned(capfd: pytest.CaptureFixture[str], home: Path, *flags: str) -> Ran:
    return run_here(capfd, "plan", home / "teacher", "--form", "multiplexed", *flags, "--json")


@pytest.mark.parametrize("mixture", ["mixture", "lora"])
def test_a_budget_is_filled_and_held(
    mixture: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    budget = 175_000

    plan = json.loads(planned(capfd, home, "--bytes", str(budget), "--mixture", mixture).out)

    assert plan["bytes"] <= budget
    layer = plan["layers"]["0"]
    assert layer["delta"] == f"multiplexed_{mixture}"
    fixed = ("--groups", str(layer["groups"]), "--mixture", mixture)
    higher = planned(capfd, home, *fixed, "--rank", str(layer["rank"] + 1))
    assert json.loads(higher.out)["bytes"] > budget


def test_grouping_by_its_words_serves_low_rank_deltas_too(home: Path, tmp_path: Path) -> None:
    wishes = {**SHORT, "groups": 3, "rank": 2, "data": str(home / "text.txt")}
    groups = {}
    for grouping in ("state", "topk", "dominant"):
        out = tmp_path / grouping
        fuse(home / "teacher", out, {**wishes, "grouping": grouping}, work=home / "work")
        with safe_open(out / "model.safetensors", framework="pt") as stored:
            name = "model.layers.1.mlp.experts.group_of_expert"
            groups[grouping] = tuple(stored.get_tensor(name).tolist())
    assert len(set(groups.values())) == 3


MISTAKES = [
    (("--merge", "mean", "--groups", "2"), "--merge is for --form multiplexed"),
    (("--merge", "mean", "--form", "low-rank", "--groups", "2"), "--merge is for --form mult"),
    (("--progressive", "--bytes", "90KB"), "--progressive is for --form multiplexed"),
    (("--mixture", "lora", "--groups", "2"), "--mixture is for adapters of --form multiplexed"),
    (("--form", "multiplexed", "--groups", "2", "--no-align"), "--align is for shared bases"),
    (("--form", "multiplexed", "--groups", "2", "--bias"), "--bias is for shared bases"),
    (("--form", "multiplexed", "--groups", "2", "--base", "mean"), "--base is for shared bases"),
    (("--form", "multiplexed", "--groups", "2", "--shared", "4"), "--shared is for own neurons"),
    (("--form", "multiplexed", "--expert-bits", "2"), "leave out either it or --form multiplexed"),
    (("--form", "multiplexed", "--groups", "2", "--grouping", "weight"), "--grouping weight is"),
    (
        ("--form", "multiplexed", "--groups", "2", "--progressive", "--grouping", "topk"),
        "--progressive pairs bases by their outputs",
    ),
    (
        ("--form", "multiplexed", "--groups", "2", "--progressive", "--merge", "greedy"),
        "--merge greedy would drop members",
    ),
    (("--form", "multiplexed", "--groups", "2", "--merge", "best"), "--merge is 'best'; choose"),
    (("--form", "multiplexed", "--groups", "9"), "--groups is 9"),
    (("--form", "multiplexed", "--groups", "2", "--rank", "17"), "rank above 16"),
    (("--form", "multiplexed", "--rank", "2"), "Say how small the model should be"),
]


@pytest.mark.parametrize(("flags", "told"), MISTAKES)
@pytest.mark.parametrize("command", ["fuse", "plan"])
def test_mistakes_are_told_before_any_work(
    command: str,
    flags: tuple[str, ...],
    told: str,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = (tmp_path / "student",) if command == "fuse" else ()

    ran = run_here(capfd, command, home / "teacher", *out, *flags, "--data", home / "text.txt")

    assert (ran.status, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert told in line and line.endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_experts_with_biases_are_refused(
    tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    teacher = tiny_checkpoint("gpt_oss")

    ran = run_here(capfd, "plan", teacher, "--form", "multiplexed", "--groups", "2")

    assert ran.status == 2
    assert "experts have biases" in ran.err
    shutil.rmtree(teacher)


@pytest.mark.parametrize(
    ("name", "grouped", "factored"),
    [
        ("greedy", (), ("--merge", "greedy")),
        ("halved", ("--progressive", "--groups", "3"), ("--merge", "slerp")),
    ],
)
def test_the_stages_one_by_one_make_the_same_student(
    name: str,
    grouped: tuple[str, ...],
    factored: tuple[str, ...],
    made: Callable[[str], FuseResult],
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work, out = tmp_path / "work", tmp_path / "student"
    size = ("--form", "multiplexed", "--groups", str(G), "--rank", str(R), *grouped)
    wishes: dict[str, tuple[str, ...]] = {"calibrate": (), "group": size}
    wishes["factor"] = (*size, *factored)
    wishes["distill"] = wishes["assemble"] = (*wishes["factor"], "--steps", "0")

    for command, flags in wishes.items():
        places = (work, out) if command == "assemble" else (work,)
        text = ("--data", home / "text.txt", *CALIBRATION)
        ran = run_here(capfd, command, home / "teacher", *places, *text, *flags)
        assert ran.status == 0, ran.err

    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (made(name).out / weights).read_bytes()
