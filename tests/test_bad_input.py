"""Whatever a user gets wrong ends in one sentence and status 2, with nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CALIBRATION, SIZE, SMALL, Ran, contents, run_here, write_text
from safetensors.torch import load_file, save_file

from moefuse.checkpoint.headers import INDEX

Tiny = Callable[..., Path]
TEACHER, TEXT, OUT = "teacher-deepseek_v2", "text.txt", "student"
USUAL = (*SIZE, *SMALL, "--data", TEXT)


@dataclass(frozen=True)
class Desk:
    """A directory with a teacher and a text, in which commands run."""

    folder: Path
    capfd: pytest.CaptureFixture[str]

    @property
    def teacher(self) -> Path:
        return self.folder / TEACHER

    @property
    def shards(self) -> list[Path]:
        return sorted(self.teacher.glob("*.safetensors"))

    def run(self, *arguments: str | Path) -> Ran:
        return run_here(self.capfd, *arguments)

    def fuse(self, *more: str | Path, teacher: str | Path = TEACHER, out: str | Path = OUT) -> Ran:
        return self.run("fuse", teacher, out, *USUAL, *more)

    def refused(self, *arguments: str | Path, match: str = "") -> str:
        """Run a command that must be refused before anything happens; return its sentence."""
        before = contents(self.folder)
        names = sorted(self.folder.rglob("*"))
        ran = self.run(*arguments)
        sentence = assert_refusal(ran)
        assert len(ran.err.splitlines()) == 1, ran.err
        assert match in sentence
        assert sorted(self.folder.rglob("*")) == names
        assert contents(self.folder) == before
        return sentence

    def refused_fuse(self, *more: str | Path, match: str = "", **given: Any) -> str:
        teacher, out = given.get("teacher", TEACHER), given.get("out", OUT)
        return self.refused("fuse", teacher, out, *USUAL, *more, match=match)

    def edit_config(self, **changes: Any) -> None:
        path = self.teacher / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        gone = {key for key, value in changes.items() if value is None}
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))

    def edit_tensor(self, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        index = json.loads((self.teacher / INDEX).read_text())
        path = self.teacher / index["weight_map"][name]
        tensors = load_file(path)
        edited = edit(tensors.pop(name))
        if edited is None:
            del index["weight_map"][name]
            (self.teacher / INDEX).write_text(json.dumps(index))
        else:
            tensors[name] = edited
        save_file(tensors, path, metadata={"format": "pt"})


def assert_refusal(ran: Ran) -> str:
    """Return the last line of a refusal: one sentence that says who speaks."""
    sentence = ran.err.splitlines()[-1]
    assert (ran.status, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert sentence.startswith("moefuse: ")
    assert sentence.endswith(".")
    assert ran.err.count("moefuse: ") == 1
    return sentence


@pytest.fixture
def desk(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Desk:
    tiny_checkpoint()
    write_text(tmp_path / TEXT)
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, capfd)


# Checkpoints.


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        ("nowhere/at/all", "nowhere/at/all does not exist"),
        ("./nowhere", "does not exist"),
        (TEXT, "text.txt is a file; give the checkpoint's directory"),
        (".", "has no config.json"),
        ("some-organisation/some-model", "could not be read from the hub"),
    ],
)
def test_no_checkpoint(desk: Desk, teacher: str, match: str) -> None:
    desk.refused_fuse(teacher=teacher, match=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama", "n_routed_experts": None}, "'llama' is a dense model"),
        ({"model_type": "llama4"}, "'llama4' is not supported: "),
        ({"model_type": "made_up_moe"}, "'made_up_moe' is not supported yet; moefuse knows"),
        (
            {"model_type": "made_up_moe", "auto_map": {"AutoModel": "x.Y"}},
            "pass --trust-remote-code if you trust it",
        ),
        ({"n_routed_experts": 0}, "no layer with routed experts"),
        ({"moefuse": {}}, "already fused"),
        ({"hidden_size": "wide"}, "'wide' under 'hidden_size'"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"kv_lora_rank": 8}, "configuration and weights are of different models"),
        ({"vocab_size": 63}, "configuration and weights are of different models"),
        (
            {"rope_parameters": {"rope_type": "made up"}},
            "cannot build the model of the config.json",
        ),
    ],
)
def test_wrong_config(desk: Desk, changes: dict[str, Any], match: str) -> None:
    desk.edit_config(**changes)

    desk.refused_fuse(match=match)


def test_consent_does_not_make_a_family_known(desk: Desk) -> None:
    (desk.teacher / "evil.py").write_text("raise SystemExit('ran')")
    desk.edit_config(model_type="made_up_moe", auto_map={"AutoConfig": "evil.Config"})

    desk.refused_fuse("--trust-remote-code", match="not supported yet")


def test_code_of_a_tokenizer_needs_consent(desk: Desk) -> None:
    """Transformers would ask on the terminal in the middle of the job."""
    (desk.teacher / "evil.py").write_text("raise RuntimeError('the code ran')")
    path = desk.teacher / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "EvilTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    path.write_text(json.dumps(settings))
    (desk.teacher / "tokenizer.json").unlink()

    assert "the code ran" not in desk.refused_fuse(match="tokenizer")


def _missing(desk: Desk) -> str:
    desk.shards[1].unlink()
    return f"lacks the shard {desk.shards[1].name.replace('00003', '00002')}"


def _truncated(desk: Desk) -> str:
    path = desk.shards[0]
    path.write_bytes(path.read_bytes()[:-100])
    return f"{path.name} is truncated"


def _renamed(desk: Desk) -> str:
    desk.shards[0].rename(desk.teacher / "first.safetensors")
    return "first.safetensors is there under a name the index does not know"


def _escaping(desk: Desk) -> str:
    moved = desk.shards[0].rename(desk.folder / "outside.safetensors")
    index = json.loads((desk.teacher / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = f"../{moved.name}"
    (desk.teacher / INDEX).write_text(json.dumps(index))
    return "this checkpoint is not trusted"


def _unknown_tensor(desk: Desk) -> str:
    index = json.loads((desk.teacher / INDEX).read_text())
    index["weight_map"]["model.extra"] = desk.shards[0].name
    (desk.teacher / INDEX).write_text(json.dumps(index))
    return "'model.extra' is in"


def _pickled(desk: Desk) -> str:
    for path in (*desk.shards, desk.teacher / INDEX):
        path.unlink()
    (desk.teacher / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return "holds pickled weights only (pytorch_model.bin), which moefuse never loads"


def _no_norm(desk: Desk) -> str:
    desk.edit_tensor("model.layers.1.input_layernorm.weight", lambda _: None)
    return "lacks the tensor 'model.layers.1.input_layernorm.weight'"


def _no_head(desk: Desk) -> str:
    desk.edit_tensor("lm_head.weight", lambda _: None)
    return "lacks the tensor 'lm_head.weight'"


def _no_expert(desk: Desk) -> str:
    desk.edit_tensor("model.layers.2.mlp.experts.7.up_proj.weight", lambda _: None)
    return "lacks the tensor 'model.layers.2.mlp.experts.7.up_proj.weight'"


def _misshapen(desk: Desk) -> str:
    desk.edit_tensor("model.layers.2.mlp.gate.weight", lambda tensor: tensor[:-1].contiguous())
    return "'model.layers.2.mlp.gate.weight'"


def _no_tokenizer(desk: Desk) -> str:
    for path in desk.teacher.glob("*token*"):
        path.unlink()
    return "tokenizer"


def _broken_tokenizer(desk: Desk) -> str:
    (desk.teacher / "tokenizer.json").write_text("{")
    return "tokenizer"


DAMAGES = (
    _missing,
    _truncated,
    _renamed,
    _escaping,
    _unknown_tensor,
    _pickled,
    _no_norm,
    _no_head,
    _no_expert,
    _misshapen,
    _no_tokenizer,
    _broken_tokenizer,
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_checkpoint(desk: Desk, damage: Callable[[Desk], str]) -> None:
    match = damage(desk)

    desk.refused_fuse(match=match)


def test_a_link_out_of_the_checkpoint(desk: Desk) -> None:
    shard = desk.shards[0]
    shutil.move(shard, desk.folder / "outside.safetensors")
    shard.symlink_to(desk.folder / "outside.safetensors")

    desk.refused_fuse(match="outside the checkpoint")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(desk: Desk, value: float) -> None:
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    desk.edit_tensor(name, lambda tensor: tensor.index_fill(0, torch.tensor([1]), value))

    ran = desk.fuse()

    assert repr(name) in assert_refusal(ran)
    assert not list(desk.folder.glob(f"{OUT}*"))


def test_numbers_too_large_for_the_dtype(desk: Desk) -> None:
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    desk.edit_tensor(name, lambda tensor: tensor * 1e7)

    ran = desk.fuse("--dtype", "float16")

    assert "float16; choose another --dtype" in assert_refusal(ran)
    assert not (desk.folder / OUT).exists()


def test_a_tokenizer_of_another_model(desk: Desk) -> None:
    desk.edit_config(vocab_size=40)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        desk.edit_tensor(name, lambda tensor: tensor[:40].contiguous())

    desk.refused_fuse(match="the model knows only 40")


# Settings.


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--groups", "9"), "--groups is 9, but a layer has only 8 experts"),
        (("--groups", "0"), "--groups is 0; it must be at least 1"),
        (("--groups", "-1"), "--groups is -1; it must be at least 1"),
        (("--rank", "33"), "--rank is 33, but no delta of this model can have a rank above 32"),
        (("--rank", "-1"), "--rank is -1; it must be at least 0"),
        (("--params", "1K"), "--params 1K is too small"),
        (("--bytes", "1KB"), "--bytes 1KB is too small"),
        (("--params", "4B", "--bytes", "6GB"), "--params and --bytes both set the budget"),
        (("--params", "many"), "'many', which is not a number of parameters such as 4B"),
        (("--params", "nan"), "which is not a number of parameters"),
        (("--bytes", "-6GB"), "which is not a size such as 6GB"),
        (("--dtype", "int4"), "--dtype is 'int4'; choose from auto, float32"),
        (("--device", "cuda:9"), "--device cuda:9 cannot be used here"),
        (("--device", "abacus"), "--device is 'abacus'; choose auto or cpu, cuda"),
        (("--device", "meta"), "--device is 'meta'; choose auto or cpu, cuda"),
        (("--grouping", "nonsense"), "--grouping is 'nonsense'; choose from coactivation"),
        (("--base", "nonsense"), "--base is 'nonsense'; choose from"),
        (("--base", "neurons", "--no-scale"), "--base neurons needs scales"),
        (("--held-back", "1.5"), "--held-back is 1.5; it must be at most 0.5"),
        (("--damping", "2"), "--damping is 2.0; it must be at most 1"),
        (("--damping", "nan"), "--damping is nan; it must be a finite number"),
        (("--warmup", "3"), "--warmup is 3.0; it must be at most 1"),
        (("--learning-rate", "inf"), "--learning-rate is inf; it must be a finite number"),
        (("--steps", "-1"), "--steps is -1; it must be at least 0"),
        (("--seed", "-1"), "--seed is -1; it must be at least 0"),
        (("--seed", "99999999999999999999"), "--seed is 99999999999999999999; it must be at most"),
        (("--batch-size", "0"), "--batch-size is 0; it must be at least 1"),
        (("--sequence-length", "1"), "--sequence-length is 1; it must be at least 2"),
        (("--tokens", "63"), "--tokens is 63, fewer than one sequence of 64"),
        (("--max-shard", "big"), "--max-shard is 'big', which is not a size"),
        (("--data", "no-such-file.txt"), "no-such-file.txt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_values(desk: Desk, flags: tuple[str, ...], match: str) -> None:
    desk.refused_fuse(*flags, match=match)


@pytest.mark.parametrize(
    "flags",
    [
        ("--grouping", "nonsense"),
        ("--dtype", "int4"),
        ("--warmup", "3"),
        ("--rank", "33"),
        ("--device", "cuda:9"),
    ],
)
def test_plan_refuses_what_fuse_refuses(desk: Desk, flags: tuple[str, ...]) -> None:
    planned = desk.refused("plan", TEACHER, *SIZE, *flags)

    assert planned == desk.refused_fuse(*flags)


def test_no_size_at_all(desk: Desk) -> None:
    command = ("fuse", TEACHER, OUT, *SMALL, "--data", TEXT)

    desk.refused(*command, match="how small the model should be: --groups, --params, --bytes or")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "text.txt has no text"),
        ("def add", "fewer than one sequence of 64; give more text"),
        ("\0\1", "not UTF-8 text"),
    ],
)
def test_unusable_text(desk: Desk, text: str, match: str) -> None:
    (desk.folder / TEXT).write_text(text)

    desk.refused_fuse(match=match)


def test_foreign_teacher_without_text(desk: Desk) -> None:
    sentence = desk.refused("fuse", TEACHER, OUT, *SIZE, *SMALL, match="--data")

    assert "such as --data bigcode/the-stack-smol" in sentence


YAMLS = [
    ("groupz: 3", "has the key 'groupz', which is no setting of this command; it knows"),
    ("groups: three", "--groups is 'three'; it must be a whole number"),
    ("groups: 3.0", "--groups is 3.0; it must be a whole number"),
    ("groups: true", "--groups is True; it must be a whole number"),
    ("align: 1", "--align is 1; it must be true or false"),
    ("damping: .nan", "--damping is nan; it must be a finite number"),
    ("damping: low", "--damping is 'low'; it must be a number"),
    ("params: 4000", "--params is 4000; it must be text"),
    ("grouping: nonsense", "--grouping is 'nonsense'; choose from"),
    ("groups: [3", "cannot be read"),
    ("- groups", "must be a mapping of settings to values"),
    ("", "must be a mapping of settings to values"),
    ("!!python/object/apply:os.system ['touch ran']", "cannot be read"),
]


@pytest.mark.parametrize(("text", "match"), YAMLS)
def test_wrong_yaml(desk: Desk, text: str, match: str) -> None:
    (desk.folder / "job.yaml").write_text(text)

    command = ("fuse", TEACHER, OUT, *SMALL, "--data", TEXT, "--config", "job.yaml")
    desk.refused(*command, match=match)


def test_no_yaml(desk: Desk) -> None:
    desk.refused_fuse("--config", "none.yaml", match="none.yaml cannot be read")
    desk.refused_fuse("--config", ".", match="cannot be read")


# Places.


def test_an_output_that_exists(desk: Desk) -> None:
    (desk.folder / OUT).mkdir()

    desk.refused_fuse(match="student exists already; choose another name or pass --overwrite")


def test_overwrite_spares_what_is_no_checkpoint(desk: Desk) -> None:
    (desk.folder / OUT).mkdir()
    (desk.folder / OUT / "thesis.txt").write_text("years of work")

    desk.refused_fuse("--overwrite", match="--overwrite does not replace it")


def test_an_output_that_is_a_file(desk: Desk) -> None:
    (desk.folder / OUT).write_text("mine")

    desk.refused_fuse("--overwrite", match="student is a file")
    desk.refused_fuse(out=f"{OUT}/below", match="student is a file")


def test_an_output_without_a_name(desk: Desk) -> None:
    for out in (".", "..", "/"):
        desk.refused_fuse("--overwrite", out=out, match="is no name for a new directory")


@pytest.mark.parametrize("out", [TEACHER, f"{TEACHER}/student", f"x/../{TEACHER}/student"])
def test_an_output_in_the_checkpoint(desk: Desk, out: str) -> None:
    (desk.folder / "x").mkdir()

    desk.refused_fuse("--overwrite", out=out, match="lies in the checkpoint")


def test_an_output_around_the_checkpoint(desk: Desk) -> None:
    (desk.folder / "all").mkdir()
    inner = shutil.move(desk.teacher, desk.folder / "all" / "teacher")
    shutil.copy(inner / "config.json", desk.folder / "all")

    desk.refused_fuse("--overwrite", teacher="all/teacher", out="all", match="lies in the output")


def test_a_work_directory_in_the_output(desk: Desk) -> None:
    for work in (OUT, f"{OUT}/work"):
        desk.refused_fuse("--work", work, match="lies in the output")


def test_a_work_directory_in_the_checkpoint(desk: Desk) -> None:
    desk.refused_fuse("--work", f"{TEACHER}/work", match="lies in the checkpoint")


def test_a_work_directory_that_is_a_file(desk: Desk) -> None:
    (desk.folder / "work").write_text("mine")

    desk.refused_fuse("--work", "work", match="work is a file")
    flags = (*CALIBRATION, "--data", TEXT)
    desk.refused("calibrate", TEACHER, "work", *flags, match="work is a file")


def test_somebody_elses_directory_where_our_own_would_be(desk: Desk) -> None:
    (desk.folder / f"{OUT}.work").mkdir()
    (desk.folder / f"{OUT}.work" / "thesis.txt").write_text("years of work")

    desk.refused_fuse(match="thesis.txt is none of moefuse's files")


def test_too_little_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(desk.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))

    sentence = desk.refused_fuse(match="Too little disk: the job needs about")

    assert "make room, choose another --work, or calibrate on fewer --tokens" in sentence


def test_a_place_where_one_may_not_write(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    locked = desk.folder / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and allowed(path, mode))

    desk.refused_fuse(out=locked / OUT, match="locked is read-only")


# Stages alone.

STAGES = {
    "group": "calibrate",
    "factor": "group",
    "distill": "factor",
    "assemble": "distill",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_before_the_stage_it_needs(desk: Desk, stage: str) -> None:
    flags = SMALL if stage in ("distill", "assemble") else CALIBRATION
    out = (OUT,) if stage == "assemble" else ()
    needed = STAGES[stage]

    match = f"has no artifacts of '{needed}' for these settings; run 'moefuse {needed}'"
    desk.refused(stage, TEACHER, "work", *out, *SIZE, *flags, "--data", TEXT, match=match)


def test_other_settings_have_other_artifacts(desk: Desk) -> None:
    flags = (*CALIBRATION, "--data", TEXT)
    assert desk.run("calibrate", TEACHER, "work", *flags).status == 0
    assert desk.run("group", TEACHER, "work", "--groups", "3", *flags).status == 0

    command = ("factor", TEACHER, "work", "--groups", "4", "--rank", "2", *flags)
    desk.refused(*command, match="run 'moefuse group'")


# The command line itself.


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse",),
        ("fuse", TEACHER),
        ("fuse", TEACHER, OUT, "--no-such-flag"),
        ("fuse", TEACHER, OUT, "--groups", "three"),
        ("no-such-command",),
    ],
)
def test_usage_errors(desk: Desk, arguments: tuple[str, ...]) -> None:
    ran = desk.run(*arguments)

    assert (ran.status, ran.out) == (2, "")
    assert "Error: " in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("fuse", "nowhere/at/all", OUT, *USUAL), "nowhere/at/all does not exist"),
        (("plan", TEACHER, "--groups", "9"), "--groups is 9"),
    ],
)
def test_through_a_real_process(desk: Desk, arguments: tuple[str, ...], match: str) -> None:
    command = [Path(sys.executable).with_name("moefuse"), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)

    assert match in assert_refusal(Ran(ran.returncode, ran.stdout, ran.stderr))
    assert not list(desk.folder.glob(f"{OUT}*"))
