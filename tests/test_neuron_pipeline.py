"""Students of own neurons at unequal bits, from the command line to another user's process."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import BF16, assert_close
from running import (
    CALIBRATION,
    SMALL,
    Ran,
    changes,
    contents,
    run_elsewhere,
    run_here,
    write_text,
)
from safetensors.torch import load_file
from strangers import IDS_BS, TO_MANY, see
from tiny import save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefuse.checkpoint.headers import read_headers
from moefuse.evaluation.loading import (
    count_active_parameters,
    count_parameters,
    expert_bytes,
    load_model,
)
from moefuse.evaluation.run import evaluate_command
from moefuse.families import all_families
from moefuse.fusion.allocate import LOSS, LOW_BITS
from moefuse.modeling import load_fused
from moefuse.modeling.modeling_moefuse import CodedRows, NeuronExperts
from moefuse.pipeline import FuseResult, Job, fuse

FAMILIES = sorted(all_families())
NUMBERS = 2 * 8 * 3 * 32 * 16
Tiny = Callable[..., Path]
Run = Callable[..., Ran]


def settings(text: Path, **values: Any) -> dict[str, Any]:
    usual = {"tokens": 512, "sequence_length": 64, "batch_size": 4, "batch_tokens": 64}
    return {"data": str(text), **usual, "steps": 10, **values}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a student of every family lies, with its teacher: a bf16 one at 4 bits."""
    folder = tmp_path_factory.mktemp("neurons")
    write_text(folder / "text.txt")
    for family in FAMILIES:
        save_tiny(folder / f"{family}-teacher", family, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="session")
def made(home: Path) -> dict[str, FuseResult]:
    given = settings(home / "text.txt", expert_bits=4.0)
    return {family: fuse(home / f"{family}-teacher", home / family, given) for family in FAMILIES}


@pytest.fixture(scope="session")
def strangers(made: dict[str, FuseResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a process that cannot import moefuse left what all students compute."""
    out = tmp_path_factory.mktemp("strangers")
    return see(TO_MANY, out, *(result.out for result in made.values()))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


def layers_of(model: torch.nn.Module) -> list[NeuronExperts]:
    return [module for module in model.modules() if isinstance(module, NeuronExperts)]


# What is made, for every family.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_says_what_is_on_disk(family: str, made: dict[str, FuseResult]) -> None:
    plan, out = made[family].plan, made[family].out
    tensors = tensors_of(out)
    headers = read_headers(out)
    model, _ = load_model(out)

    routed = re.compile(r"\.experts\.(own|widths|shared|gain|down_bias)")
    experts = [tensor for name, tensor in tensors.items() if routed.search(name)]
    assert sum(t.nbytes for t in experts) == plan.expert_bytes == expert_bytes(headers)
    assert sum(t.nbytes for t in tensors.values()) == plan.bytes
    moe_layers = len(plan.layers)
    biases = 8 * (2 * 16 + 32) if all_families()[family].layout.biased else 0
    assert plan.expert_bytes <= 4 * moe_layers * (NUMBERS / 2 + biases) / 8
    # Some families store buffers: what DeepSeek-V3's router was balanced by, MiniMax's decays.
    stored = re.compile(r"e_score_correction_bias|slope_rate|_decay$")
    balance = [b for n, b in model.named_buffers() if stored.search(n)]
    assert plan.parameters == count_parameters(model) + sum(b.numel() for b in balance)
    active = count_active_parameters(model, headers)
    assert active is not None and active <= plan.active_parameters <= plan.parameters
    assert {t.dtype for t in experts} == {torch.bfloat16, torch.uint8, torch.int32}
    assert any(isinstance(module, CodedRows) for module in model.modules())
    block = json.loads((out / "config.json").read_text())["moefuse"]["layers"]
    for layer, module in zip(block.values(), layers_of(model), strict=True):
        assert list(layer["neurons"].values()) == module.widths.sum(1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_do_something_and_distillation_helps(
    family: str, made: dict[str, FuseResult]
) -> None:
    for error in made[family].errors.values():
        assert 0 < error["after"] <= error["before"] < 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_moefuse_it_computes_the_same_bits(
    family: str, made: dict[str, FuseResult], strangers: Path
) -> None:
    told = load_file(strangers / f"{family}.safetensors")
    own = load_fused(made[family].out).eval()

    assert torch.equal(told["logits"], own(IDS_BS).logits)
    assert torch.equal(told["again"], told["logits"])
    greedy = own.generate(IDS_BS, max_new_tokens=7, do_sample=False)  # type: ignore[operator]
    assert torch.equal(told["greedy"], greedy)
    saved, first = tensors_of(strangers / f"{family}-saved"), tensors_of(made[family].out)
    assert saved.keys() == first.keys()
    assert all(torch.equal(saved[name], first[name]) for name in first)
    assert all(saved[n].dtype == first[n].dtype for n in first if ".experts." in n)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_by_moefuse_it_computes_the_same_bits(
    family: str, made: dict[str, FuseResult], tmp_path: Path
) -> None:
    model = load_fused(made[family].out).eval()

    model.save_pretrained(tmp_path / "again")

    again = load_fused(tmp_path / "again").eval()
    assert torch.equal(again(IDS_BS).logits, model(IDS_BS).logits)


@torch.no_grad()
def test_in_fp32_it_is_close_to_bf16(made: dict[str, FuseResult]) -> None:
    out = made["qwen3_moe"].out

    low, high = (load_fused(out, dtype=dtype)(IDS_BS).logits for dtype in ("auto", "float32"))

    assert_close(low.float(), high, 2 * BF16)


# Exactness.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "size", [{"expert_bits": 40.0}, {"expert_bits": 40.0, "bits": "16"}, {"params": "1B"}]
)
@torch.no_grad()
def test_with_every_neuron_whole_the_student_is_the_teacher(
    family: str, size: dict[str, Any], tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    directory = tiny_checkpoint(family)
    text = write_text(tmp_path / "text.txt")
    few = {"tokens": 64, "sequence_length": 32, "steps": 0}

    result = fuse(directory, tmp_path / "student", settings(text, **{**few, **size}))

    teacher = AutoModelForCausalLM.from_pretrained(directory)
    student = load_fused(result.out)
    assert len(layers_of(student)) == len(result.plan.layers) >= 2
    assert {layer.shared for layer in result.plan.layers.values()} == {0}
    assert_close(student(IDS_BS).logits, teacher(IDS_BS).logits)


# Sizes.


@pytest.mark.parametrize("bits", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
def test_files_keep_their_budget_and_use_it(bits: float, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    wider = {"moe_intermediate_size": 96, "n_routed_experts": 16, "num_hidden_layers": 2}
    save_tiny(tmp_path / "teacher", dtype=torch.bfloat16, **wider)
    budget = 16 * 3 * 32 * 96 * bits / 8

    result = fuse(
        tmp_path / "teacher", tmp_path / "student", settings(text, expert_bits=bits, steps=0)
    )

    stored = expert_bytes(read_headers(result.out))
    assert stored == result.plan.expert_bytes
    assert (0.98 if bits >= 1 else 0.9) * budget <= stored <= budget


@pytest.mark.parametrize(
    ("wish", "measure", "limit"),
    [
        ({"bytes": "90KB"}, "bytes", 90_000),
        ({"params": "40K"}, "parameters", 40_000),
        ({"bytes": "90KB", "bits": "16", "shared": 3}, "bytes", 90_000),
        ({"bytes": "90KB", "spread": "layer"}, "bytes", 90_000),
    ],
)
def test_bytes_and_parameters_of_the_whole_model(
    wish: dict[str, Any], measure: str, limit: int, home: Path, tmp_path: Path
) -> None:
    given = settings(home / "text.txt", steps=0, **wish)

    result = fuse(home / "olmoe-teacher", tmp_path / "student", given)

    model, _ = load_model(result.out)
    found = {"bytes": read_headers(result.out).total_bytes, "parameters": count_parameters(model)}
    assert 0.95 * limit <= found[measure] <= limit
    assert found[measure] == getattr(result.plan, measure)
    assert not wish.get("shared") or {layer.shared for layer in result.plan.layers.values()} == {3}


# One job however it is done.


def test_the_same_command_writes_the_same_bytes(
    home: Path, made: dict[str, FuseResult], tmp_path: Path
) -> None:
    given = settings(home / "text.txt", expert_bits=4.0)

    fuse(home / "mixtral-teacher", tmp_path / "mixtral", given)

    assert contents(tmp_path / "mixtral") == contents(made["mixtral"].out)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    def command(folder: Path) -> list[str | Path]:
        wish = ("--expert-bits", "4", "--data", home / "text.txt")
        return ["fuse", home / "deepseek_v2-teacher", folder / "student", *wish, *SMALL]

    whole = tmp_path / "whole"
    whole.mkdir()
    assert run_elsewhere(whole / "log", *command(whole)) == 0, (whole / "log").read_text()
    done = [path for _, path in changes(whole / "log")]
    for stage in ("energies-", "distilled-"):
        instants = [at for at, path in enumerate(done, start=1) if stage in path]
        assert instants, stage
        at = instants[len(instants) // 2]
        folder = tmp_path / str(at)
        folder.mkdir()
        assert run_elsewhere(folder / "log", *command(folder), die_at=at) < 0
        assert run_elsewhere(folder / "log", *command(folder)) == 0, (folder / "log").read_text()
        assert contents(folder / "student") == contents(whole / "student"), stage


@pytest.fixture
def run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(capfd, *arguments)


def test_stages_one_by_one_write_what_fuse_writes(run: Run, home: Path, tmp_path: Path) -> None:
    teacher, data = home / "deepseek_v2-teacher", ("--data", home / "text.txt")
    wish = ("--expert-bits", "4")
    assert run("fuse", teacher, "whole/student", *SMALL, *wish, *data).status == 0

    for stage, flags in (
        ("calibrate", CALIBRATION),
        ("group", (*CALIBRATION, *wish)),
        ("factor", (*CALIBRATION, *wish)),
        ("distill", (*SMALL, *wish)),
    ):
        ran = run(stage, teacher, "work", *flags, *data)
        assert (ran.status, ran.out) == (0, ""), ran.err
    ran = run("assemble", teacher, "work", "single/student", *SMALL, *wish, *data)

    assert ran.status == 0, ran.err
    assert contents(tmp_path / "single") == contents(tmp_path / "whole")


def test_a_stage_without_the_one_before_is_told(run: Run, home: Path) -> None:
    wish = ("--expert-bits", "4", *CALIBRATION, "--data", home / "text.txt")

    ran = run("factor", home / "olmoe-teacher", "work", *wish)

    assert ran.status == 2
    assert "no artifacts of 'group' for these settings" in ran.err


def test_sizes_share_calibration_and_energies(home: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name, bits in (("large", 6.0), ("small", 3.0)):
        given = settings(home / "text.txt", expert_bits=bits)
        fuse(home / "olmoe-teacher", tmp_path / name, given, work=work)

    counts = {kind: len(list(work.glob(f"{kind}-*"))) for kind in ("energies", "distilled")}
    assert counts == {"energies": 1, "distilled": 2}


def test_the_energy_lost_is_reckoned_from_what_was_measured(home: Path, tmp_path: Path) -> None:
    given = settings(home / "text.txt", expert_bits=3.0, steps=0)
    teacher, work = home / "olmoe-teacher", tmp_path / "work"

    plan = fuse(teacher, tmp_path / "student", given, work=work).plan

    job = Job(teacher, work, given)
    chosen, settled = job.settled
    assert plan == settled
    (measured,) = work.glob("energies-*")
    lost = power = 0.0
    for layer, choice_EF in chosen.items():
        energy_EF = load_file(measured / f"layer-{layer:03d}.safetensors")["energy_EF"].double()
        share_EF = choice_EF.double().apply_(lambda number: LOSS[LOW_BITS[int(number)]])
        lost, power = lost + float((energy_EF * share_EF).sum()), power + float(energy_EF.sum())
    assert plan.energy_lost == pytest.approx(lost / power)
    assert plan.energy_lost != job.plan.energy_lost, "a forecast knows nothing of this teacher"


# Words for people.


def test_json_and_tables(run: Run, home: Path) -> None:
    teacher = home / "deepseek_v2-teacher"
    wish = ("--expert-bits", "4")

    fused = run("fuse", teacher, "a", *wish, *SMALL, "--data", home / "text.txt", "--json")
    shown = run("fuse", teacher, "b", *wish, *SMALL, "--data", home / "text.txt")
    planned = run("plan", teacher, *wish, "--json")
    table = run("plan", teacher, *wish)

    result = json.loads(fused.out)
    for layers in (result["plan"]["layers"], json.loads(planned.out)["layers"]):
        assert layers.keys() == {"1", "2"}
        for layer in layers.values():
            assert sum(layer["neurons"].values()) > 0
    assert result["errors"].keys() == {"1", "2"}
    for plan in (result["plan"], json.loads(planned.out)):
        assert 0 < plan["energy_lost"] < 1 and 0 < plan["neurons_kept"] <= 1
        assert "of the neurons are kept" in plan["advice"]
    assert re.search(r"energy of the experts lost, forecast +│ [0-9.]+%", table.out), table.out
    assert re.search(r"energy lost, from measured energies +│ [0-9.]+%", shown.out), shown.out
    for out in (table.out, shown.out):
        assert re.search(r"in plain words +│ (prune and )?quantise", out), out
    told = r"layers? \S+ +│ own neurons: [0-9,]+ at [0-9]+ bits?"
    assert re.search(told, table.out), table.out
    assert re.search(told, shown.out), shown.out
    for out in (table.out, shown.out):
        assert "fused experts, deltas" not in out


def test_common_sizes_tell_of_neurons(run: Run, home: Path) -> None:
    table = run("plan", home / "deepseek_v2-teacher", "--context", "64")

    assert table.status == 0, table.err
    assert "the teacher as it is" in table.out


def test_the_card_tells_of_neurons(made: dict[str, FuseResult]) -> None:
    card = " ".join((made["olmoe"].out / "README.md").read_text().split())

    assert re.search(
        r"olmoe-teacher with the 8 routed experts of each layer reduced by moefuse to [0-9,]+ "
        r"neurons of their own \(by bits of a number: [0-9,]+ at [0-9]+.*\)",
        card,
    )
    assert "rank" not in card and "base experts" not in card


def test_eval_counts_what_codes_stand_for(made: dict[str, FuseResult], home: Path) -> None:
    out = made["qwen2_moe"].out
    (row,) = evaluate_command(str(out), None, str(home / "text.txt"), tokens=128, device="cpu").rows

    assert row.parameters == made["qwen2_moe"].plan.parameters
    assert row.expert_bytes == made["qwen2_moe"].plan.expert_bytes
    assert row.total_bytes == made["qwen2_moe"].plan.bytes
    assert row.active_parameters is not None
    experts = layers_of(load_fused(out))
    idle = [3 * 32 * int(e.widths.sum() - e.widths.sum(0).topk(2).values.sum()) for e in experts]
    assert row.parameters - row.active_parameters == sum(idle)


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--expert-bits", "2", "--bytes", "90KB"), "--bytes and --expert-bits both set the"),
        (("--expert-bits", "2", "--params", "1B"), "--params and --expert-bits both set the"),
        (("--expert-bits", "0.01"), "--expert-bits 0.01 is too small"),
        (("--expert-bits", "0"), "--expert-bits 0.0 is too small"),
        (("--expert-bits", "-1"), "--expert-bits is -1.0; it must be at least 0"),
        (("--form", "neurons"), "--form neurons needs a budget"),
        (("--form", "neurons", "--groups", "2"), "--groups is for shared bases and deltas"),
        (("--form", "low-rank", "--expert-bits", "2"), "--expert-bits is for own neurons"),
        (("--groups", "2", "--expert-bits", "2"), "leave out either it or --groups"),
        (("--groups", "2", "--bits", "16"), "--bits is for own neurons"),
        (("--rank", "2", "--shared", "4", "--params", "1B"), "--shared is for own neurons"),
        (("--bits", "5", "--expert-bits", "2"), "--bits is '5'; choose from auto, 1, 2, 4, 16"),
        (("--expert-bits", "1", "--shared", "9999"), "--shared is 9999, and that many neurons"),
    ],
)
@pytest.mark.parametrize("command", ["fuse", "plan"])
def test_mistakes_are_told_before_any_work(
    command: str, flags: tuple[str, ...], told: str, run: Run, home: Path, tmp_path: Path
) -> None:
    out = ("student",) if command == "fuse" else ()

    ran = run(command, home / "deepseek_v2-teacher", *out, *flags, "--data", home / "text.txt")

    assert (ran.status, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert told in line and line.endswith(".")
    assert list(tmp_path.iterdir()) == []
