"""The training itself: several processes, sharding, checkpointing, precision, a cache."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from numeric import assert_close
from running import write_jsonl, write_text
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model
from transformers import PreTrainedModel

from moefuse import demo
from moefuse.config import HealConfig, build
from moefuse.corpus import Document, load_documents
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model
from moefuse.evaluation.metrics import kl_per_token
from moefuse.families import all_families
from moefuse.heal import HEALING, heal
from moefuse.healing.sources import LiveTeacher
from moefuse.healing.teach import teach
from moefuse.healing.text import pack
from moefuse.healing.trainer import COMPLETE, check_attention, figures, last_complete, train
from moefuse.healing.trainer import remove_incomplete as sweep
from moefuse.pipeline import fuse

SEVERAL = Path(__file__).with_name("several.py")
HEAL: dict[str, Any] = {
    "tokens": "2400",
    "sequence_length": 32,
    "batch_size": 8,
    "save_steps": 4,
    "logging_steps": 1,
}
STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    save_tiny(folder / "teacher")
    data = str(write_text(folder / "text.txt"))
    write_jsonl(folder / "held.jsonl", documents=6)
    sizes = {"groups": 3, "rank": 2, "steps": 0, "sensitivity_tokens": 0}
    fuse(folder / "teacher", folder / "student", {**sizes, "data": data, "tokens": 512})
    return folder


def healed(folder: Path, out: Path, **values: Any) -> list[dict[str, Any]]:
    held_out = values.pop("held_out", None)
    given = {**HEAL, "data": str(folder / "text.txt"), **values}
    return heal(folder / "student", out, given, teacher=folder / "teacher", held_out=held_out).log


def losses_of(log: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in log if "loss" in line]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in directory.glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.fixture(scope="module")
def usual(folder: Path) -> list[dict[str, Any]]:
    return healed(folder, folder / "usual")


# Several processes.


def started(log: Path, *arguments: str | Path, **more: str) -> subprocess.Popen[bytes]:
    """Start ``several.py`` in two processes, each on one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, SEVERAL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    with log.open("w") as words:
        return subprocess.Popen(command, env=environment, stdout=words, stderr=words)


def launch(log: Path, *arguments: str | Path, **more: str) -> None:
    """Run ``several.py`` to its end."""
    assert started(log, *arguments, **more).wait(timeout=240) == 0, log.read_text()


def test_two_processes_have_the_loss_curve_of_one(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Of the same batches: half as many rows in each process."""
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in {**HEAL, "batch_size": 4}.items()]
    given = ("--teacher", folder / "teacher", "--data", folder / "text.txt", *flags)

    launch(tmp_path / "log", "heal", folder / "student", tmp_path / "out", *given)

    found = losses_of(json.loads((tmp_path / "out" / HEALING).read_text())["log"])
    assert len(found) == STEPS
    assert found == pytest.approx(losses_of(usual), rel=1e-4)
    assert (tmp_path / "log").read_text().count("Healed in 9 steps") == 1
    one, two = tensors_of(folder / "usual"), tensors_of(tmp_path / "out")
    for name, tensor in one.items():
        assert_close(two[name].float(), tensor.float(), tolerance=0.02)


def test_accumulated_batches_have_the_loss_curve_of_whole_ones(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = losses_of(healed(folder, tmp_path / "out", batch_size=2, accumulate=4))
    assert found == pytest.approx(losses_of(usual), rel=1e-4)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What ``accelerate launch --use_fsdp --fsdp_version 2`` sets."""


def test_sharded_by_accelerate_it_is_the_same_and_goes_on_after_a_kill(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in {**HEAL, "batch_size": 4}.items()]
    given = ("--teacher", folder / "teacher", "--data", folder / "text.txt", *flags)

    def command(out: str) -> tuple[str | Path, ...]:
        return ("sharded", "heal", folder / "student", tmp_path / out, *given)

    launch(tmp_path / "log", *command("out"), **FSDP)
    killed = started(tmp_path / "killed.log", *command("again"), **FSDP)
    while not list(tmp_path.glob(f"again.work/*/checkpoint-4/{COMPLETE}")):
        assert killed.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.01)
    for process in (*psutil.Process(killed.pid).children(recursive=True), killed):
        process.kill()
    killed.wait()
    assert not (tmp_path / "again").exists()
    launch(tmp_path / "again.log", *command("again"), **FSDP)

    log = json.loads((tmp_path / "out" / HEALING).read_text())["log"]
    assert losses_of(log) == pytest.approx(losses_of(usual), rel=1e-4)
    one, two, again = map(tensors_of, (folder / "usual", tmp_path / "out", tmp_path / "again"))
    for name, tensor in one.items():
        assert_close(two[name].float(), tensor.float(), tolerance=0.02)
        assert torch.equal(two[name], again[name])


# What must not change the result, and what may a little.


def test_recomputing_layers_changes_nothing(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = healed(folder, tmp_path / "out", gradient_checkpointing=True)
    assert losses_of(found) == pytest.approx(losses_of(usual), rel=1e-6)


def test_measuring_on_the_way_changes_nothing(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = healed(folder, tmp_path / "out", held_out=folder / "held.jsonl", eval_steps=2)
    assert [line["step"] for line in found if "eval_loss" in line] == [0, 2, 4, 6, 8, 9]
    assert losses_of(found) == losses_of(usual)
    whole = tensors_of(folder / "usual")
    assert all(torch.equal(whole[n], t) for n, t in tensors_of(tmp_path / "out").items())


def test_the_size_of_batches_does_not_change_what_is_measured(folder: Path, tmp_path: Path) -> None:
    """The Trainer takes a mean over batches, the last of which is smaller."""
    sizes = {"held_out": folder / "held.jsonl", "eval_steps": 9, "save_steps": 100}
    measured = [
        next(
            line["eval_loss"]
            for line in healed(folder, tmp_path / str(rows), batch_size=rows, **more, **sizes)
            if "eval_loss" in line
        )
        for rows, more in ((8, {}), (3, {}), (2, {"accumulate": 4}))
    ]
    assert measured == pytest.approx([measured[0]] * 3, rel=1e-5)


def test_mixed_precision_runs_on_a_cpu(
    folder: Path, usual: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = losses_of(healed(folder, tmp_path / "out", dtype="bfloat16", tokens="800"))
    assert found[0] == pytest.approx(losses_of(usual)[0], rel=0.5)
    assert all(0 < loss < 1 for loss in found)


def test_a_hidden_term_and_a_mix_of_losses(folder: Path, tmp_path: Path) -> None:
    mix = {"forward_kl": 0.5, "reverse_kl": 0.5, "hidden": 0.1, "temperature": 2.0}
    found = losses_of(healed(folder, tmp_path / "out", **mix))
    assert found[-1] < 2 * found[0]


def test_a_loss_that_is_no_number_ends_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "student", tmp_path / "student")
    shard_path = tmp_path / "student" / "model.safetensors"
    tensors = load_file(shard_path)
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, shard_path, metadata={"format": "pt"})
    given = {**HEAL, "data": str(folder / "text.txt")}
    with pytest.raises(UserError, match="The loss is nan at step 1; lower --rate"):
        heal(tmp_path / "student", tmp_path / "out", given, teacher=folder / "teacher")
    assert not (tmp_path / "out").exists()


# A cache in the teacher's place.


@torch.no_grad()
def distance(teacher: Path, student: Path) -> float:
    """Return the mean KL on text that nothing learns from."""
    models = [load_model(path, dtype="float32") for path in (teacher, student)]
    documents = load_documents(demo.heldout_path())[:12]
    text = pack(documents, models[0][1], 256, tokens=4096, seed=0)
    logits_TV = [
        model(
            input_ids=text.ids_NS.long(), position_ids=text.position_NS.long(), use_cache=False
        ).logits[text.counted_NS]
        for model, _ in models
    ]
    return float(kl_per_token(*logits_TV).mean())


def test_a_cache_heals_as_the_live_teacher_does(tmp_path: Path) -> None:
    """On the bundled teacher fused to 8 groups: held-out KL within 2 %."""
    teacher, student = demo.teacher_path(), tmp_path / "student"
    sizes = {"groups": 8, "rank": 0, "steps": 0, "tokens": 4096, "sensitivity_tokens": 0}
    fuse(teacher, student, {**sizes, "held_out_tokens": 0, "device": "cpu"})
    text = {"tokens": "12K", "sequence_length": 256, "batch_size": 4, "device": "cpu"}
    text |= {"rate": 1e-4, "expert_rate": 4e-4}
    data = {"data": str(demo.calibration_path())}
    taught = {name: value for name, value in text.items() if not name.endswith("rate")}
    teach(teacher, tmp_path / "cache", {**taught, **data})
    # Something short that is held out, in the place of the bundled text.
    few = {"held_out": write_jsonl(tmp_path / "few.jsonl", documents=2)}

    heal(student, tmp_path / "live", {**text, **data}, teacher=teacher, **few)
    told = heal(student, tmp_path / "cached", text, teacher_cache=tmp_path / "cache", **few)

    before, live, cached = (
        distance(teacher, path) for path in (student, tmp_path / "live", tmp_path / "cached")
    )
    assert live < 0.98 * before
    assert cached == pytest.approx(live, rel=0.02)
    # A cache knows nothing of held-out text: its cross-entropy is measured.
    assert told.log[0]["eval_loss"] > 2 * losses_of(told.log)[0]


# Small things.


def test_attention_that_would_see_other_documents_is_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    model = tiny_model()
    check_attention(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="Packed rows cannot be read with flash_attention_2"):
        check_attention(model)


def test_only_whole_checkpoints_are_gone_on_from(tmp_path: Path) -> None:
    for step, whole in ((9, True), (10, True), (20, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert last_complete(tmp_path / "nowhere") is None


def test_the_log_has_no_times_and_one_order() -> None:
    log = [
        {"step": 1, "loss": 0.5},
        {"eval_loss": 1.0, "step": 1, "eval_runtime": 3.1, "eval_samples_per_second": 2.0},
        {"train_runtime": 3.0, "train_loss": 2.0, "step": 1},
    ]
    assert [list(line.items()) for line in figures(log)] == [
        [("loss", 0.5), ("step", 1)],
        [("eval_loss", 1.0), ("step", 1)],
    ]


# Going on from a checkpoint.


@pytest.mark.parametrize("model_type", sorted(all_families()))
def test_goes_on_from_a_checkpoint_whatever_a_family_calls_its_weights(
    model_type: str, tmp_path: Path
) -> None:
    """On the hub some families' weights have other names than in memory, and experts lie apart."""
    values = {"tokens": "192", "sequence_length": 16, "batch_size": 4, "save_steps": 2}
    options = build(HealConfig, values)
    documents = [
        Document("".join(chr(97 + (7 * n + k) % 26) for k in range(80)), None, str(n))
        for n in range(9)
    ]
    save_tiny(tmp_path / "teacher", model_type)
    teacher, tokenizer = load_model(tmp_path / "teacher", dtype="float32", device="cpu")
    text = pack(documents, tokenizer, 16, tokens=192, seed=0)

    def trained() -> PreTrainedModel:
        student = tiny_model(model_type, seed=1)
        family = all_families()[model_type]
        given = (student, LiveTeacher(teacher, family), text, family, options)
        train(*given, directory=tmp_path / "training", seed=0, device="cpu", mixed=False)
        return student

    whole = trained().state_dict()
    assert last_complete(tmp_path / "training") is not None
    again = trained().state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
