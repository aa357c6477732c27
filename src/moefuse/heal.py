"""Heal a student: train the whole of it, end to end, until it predicts what its teacher does.

A fused checkpoint comes in and a fused checkpoint of the same form and the same bytes goes out. The
teacher runs beside it, or a cache of its predictions stands for it (``moefuse teach``). Checkpoints
of the training lie beside the output until it is written, so that an interrupted run goes on where
it was.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from moefuse import artifacts, corpus, demo
from moefuse.cards import CardRecord, Healed, Metrics, Text, read_record, write_card
from moefuse.checkpoint.formats.base import quantization_method
from moefuse.checkpoint.headers import CONFIG, PICKLE_SUFFIXES, CheckpointHeaders, read_headers
from moefuse.checkpoint.reader import fingerprint_of
from moefuse.config import ComputeConfig, HealConfig, build, parse_count
from moefuse.console import say
from moefuse.devices import STORED, choose_device, suited_threads
from moefuse.errors import UserError
from moefuse.evaluation.loading import checkpoint_directory, load_model, load_tokenizer
from moefuse.evaluation.streamed import HeldOut
from moefuse.export.record import PLOT, RECORD
from moefuse.families import Family, all_families
from moefuse.heal_card import (
    HEALED,
    Judge,
    healed_facts,
    healed_record,
    held_out_for,
    name_of,
    stage_before,
)
from moefuse.healing.cache import TeacherCache
from moefuse.healing.parts import check_trains
from moefuse.healing.sources import CachedTeacher, LiveTeacher, TeacherSource
from moefuse.healing.text import PackedText, pack
from moefuse.healing.trainer import (
    remove_incomplete,
    rows_per_step,
    tokens_per_row,
    train,
    whole_state,
)
from moefuse.job_inputs import is_bundled
from moefuse.modeling import is_fused, load_fused
from moefuse.modeling.modeling_moefuse import MODEL_TYPE_PREFIX
from moefuse.modeling.training import stored_to_trained, trained_to_stored
from moefuse.pipeline import peak_memory
from moefuse.places import check_new, check_output, check_outside, check_own

STAGES = (ComputeConfig, HealConfig)
HEALING = "healing.json"
"""The file in a healed checkpoint that says how it was healed, and the log of the training."""
OWN_ENTRIES = ("heal-",)
HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True)
class HealResult:
    """What healing made: where, after how many steps and tokens, and how the losses went.

    ``log`` has a line for every so many steps: ``step`` and ``loss``, or ``eval_loss`` on held-out
    text. ``seconds`` is the wall time of this run, ``peak_bytes`` its peak resident memory.
    """

    out: Path
    steps: int
    tokens: int
    log: list[dict[str, Any]]
    seconds: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def heal(
    student: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
    teacher_cache: str | Path | None = None,
    held_out: str | Path | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> HealResult:
    """Heal the fused checkpoint ``student`` against ``teacher`` or a cache of it, into ``out``.

    ``values`` are settings by name (see ``HealConfig``). Run by several processes (``accelerate
    launch``) every one of them calls this; the first writes. The same call after an interruption
    goes on from the last checkpoint and ends with the same bytes. Raises ``UserError`` for bad
    input before any training.
    """
    start, out = time.monotonic(), Path(out)
    check_new(out)
    work = out.with_name(out.name + ".work")
    check_own(work, OWN_ENTRIES)
    if not work.exists():
        check_output(out, overwrite=overwrite)
    job = HealJob(
        student,
        values,
        teacher=teacher,
        teacher_cache=teacher_cache,
        held_out=held_out,
        trust_remote_code=trust_remote_code,
    )
    check_outside(out, job.student, "output")
    check_outside(work, job.student, "work directory")
    mark = job.mark()
    log = _finished(out, mark)
    if log is None:
        check_output(out, overwrite=overwrite)
        log = job.run(work / f"heal-{mark}", out, mark)
    if job.process.is_main_process:
        artifacts.remove_replaced(out)
        shutil.rmtree(work, ignore_errors=True)
    steps = max(line["step"] for line in log)
    return HealResult(out, steps, job.tokens(steps), log, time.monotonic() - start, peak_memory())


def _finished(out: Path, mark: str) -> list[dict[str, Any]] | None:
    """Return the log of the very job that wrote ``out``, or None."""
    try:
        found = artifacts.read_json(out / HEALING)
        return found["log"] if found["job"] == mark else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class HealJob:
    """One healing: what goes in, checked, and the training."""

    def __init__(
        self,
        student: str | Path,
        values: Mapping[str, Any],
        *,
        teacher: str | Path | None,
        teacher_cache: str | Path | None,
        held_out: str | Path | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.compute = build(ComputeConfig, values)
        self.options = build(HealConfig, values)
        self.trust_remote_code = trust_remote_code
        self.student = checkpoint_directory(student)
        self.headers = read_headers(self.student)
        self.family = _family(self.headers.config)
        check_trains(self.headers.tensors, self.family, self.options)
        has_record = (self.student / RECORD).exists()
        self.record = read_record(self.student) if has_record else None
        self.device = choose_device(self.compute.device)
        self.mixed = self._computes_in_bf16()
        read_weights_in_every_process()
        self.process = PartialState(cpu=self.device == "cpu")
        if (teacher is None) == (teacher_cache is None):
            raise UserError("Give one of --teacher and --teacher-cache; healing needs a teacher.")
        self.cache = None if teacher_cache is None else TeacherCache.open(teacher_cache)
        self.teacher = None if teacher is None else checkpoint_directory(teacher)
        self._check_cache()
        self.teacher_fingerprint = self._check_teacher()
        self.tokenizer = load_tokenizer(self.student)
        self.text = self._text()
        # The bundled teacher's held-out text is at hand.
        bundled = demo.heldout_path() if is_bundled(self.teacher_fingerprint) else None
        self._held_out_source = held_out or bundled
        self.held_out = self._held_out()
        self.measured_on = self._measured_on()

    # What goes in.

    def _computes_in_bf16(self) -> bool:
        wish = self.compute.dtype
        if wish == "float16":
            raise UserError(
                "--dtype float16 does not heal: its gradients vanish; choose bfloat16 or float32."
            )
        if self.device.startswith("cuda:"):
            raise UserError(
                f"--device {self.device} is left to the launcher here; give --device cuda and "
                "choose the GPU by CUDA_VISIBLE_DEVICES."
            )
        return wish == "bfloat16" or (wish == "auto" and self.device == "cuda")

    def _check_cache(self) -> None:
        if self.cache is None:
            return
        options, path = self.options, self.cache.path
        for wish, flag in ((options.reverse_kl, "--reverse-kl"), (options.hidden, "--hidden")):
            if wish:
                raise UserError(
                    f"{flag} needs the teacher itself: the teacher cache {path} holds only its "
                    "likeliest words; give --teacher, or leave it out."
                )
        if options.temperature != 1:
            raise UserError(
                f"--temperature is {options.temperature:g}, but the teacher cache {path} holds "
                "probabilities at 1; give --teacher, or leave it out."
            )
        vocabulary = self.headers.config.get("vocab_size")
        if vocabulary != self.cache.manifest.vocabulary:
            raise UserError(
                f"The teacher cache {path} is of a vocabulary of "
                f"{self.cache.manifest.vocabulary} words, the student's has {vocabulary}; they "
                "are of different models."
            )

    def _check_teacher(self) -> str:
        """Return the teacher's fingerprint; refuses one that the student cannot be of."""
        if self.teacher is None:
            assert self.cache is not None
            return self.cache.manifest.teacher_fingerprint
        headers = read_headers(self.teacher)
        check_same_kind(self.teacher, headers.config, self.headers.config, self.options)
        return fingerprint_of(self.teacher, headers.config, headers.tensors)

    def _text(self) -> PackedText:
        if self.cache is not None:
            if self.options.data is None:
                return self.cache.text
            text = self._packed(self.options.data)
            self.cache.check(text_fingerprint=text.fingerprint())
            return text
        if self.options.data is None:
            raise UserError(
                "Say with --data what text to heal on: a file, a folder, JSONL with text or "
                "messages, or a hub data set."
            )
        return self._packed(self.options.data)

    def _packed(self, source: str) -> PackedText:
        return pack(
            corpus.load_documents(source),
            self.tokenizer,
            self.options.sequence_length,
            tokens=parse_count(self.options.tokens, "--tokens"),
            seed=self.compute.seed,
            apart=self.family.one_piece_a_row,
        )

    def _held_out(self) -> PackedText | None:
        """Return what the loss is measured on now and then during training."""
        if self._held_out_source is None:
            return None
        documents = corpus.load_documents(self._held_out_source)
        length = self.options.sequence_length
        return pack(
            documents,
            self.tokenizer,
            length,
            tokens=HELD_OUT_TOKENS,
            seed=0,
            apart=self.family.one_piece_a_row,
        )

    def _measured_on(self) -> HeldOut | None:
        """Return what the student is measured on for its card, if it has one."""
        if self._held_out_source is None or self.record is None:
            return None
        length = self.options.sequence_length
        return held_out_for(self.record, self._held_out_source, self.tokenizer, length)

    def mark(self) -> str:
        """Return what tells this job from others: all that the outcome depends on."""
        settings = {
            key: value
            for key, value in asdict(self.options).items()
            if key not in ("data", "report_to")
        }
        return artifacts.fingerprint(
            [
                fingerprint_of(self.student, self.headers.config, self.headers.tensors),
                self.record.to_json() if self.record else None,
                self.text.fingerprint(),
                self.held_out.fingerprint() if self.held_out else None,
                self.teacher_fingerprint,
                self.cache.manifest.job if self.cache else None,
                settings,
                [self.compute.seed, self.device, self.mixed, self.process.num_processes],
            ]
        )

    def tokens(self, steps: int) -> int:
        """Return how many tokens so many steps are trained on, repeated ones counted again."""
        rows = rows_per_step(self.options, self.process.num_processes)
        return round(steps * rows * tokens_per_row(self.text))

    # What comes out.

    def run(self, directory: Path, out: Path, mark: str) -> list[dict[str, Any]]:
        """Train and write ``out``; returns the log."""
        main = self.process.is_main_process
        if main:
            remove_incomplete(directory)
        self.process.wait_for_everyone()
        model = load_fused(self.student, dtype=torch.float32)
        source = self.source()
        judge = self._judge(source) if main else None
        shape = self.family.shape(self._teacher_config())
        with suited_threads(shape.hidden, shape.intermediate):
            before = self._measure_before(judge, model)
            stored_to_trained(model)
            log = train(
                model,
                source,
                self.text,
                self.family,
                self.options,
                directory=directory,
                seed=self.compute.seed,
                device=self.device,
                mixed=self.mixed,
                held_out=self.held_out,
            )
            trained_to_stored(model)
            state = whole_state(model)
            if main:
                stored = as_stored(state, self.headers)
                record = self._record(out.name, log, stored, judge, before)
                facts = {"job": mark, "settings": asdict(self.options), "log": log}
                write_healed(stored, self.student, self.headers, out, facts, record)
        self.process.wait_for_everyone()
        return log

    def source(self) -> TeacherSource:
        """Return what tells the teacher's predictions; a live teacher is loaded."""
        if self.teacher is None:
            assert self.cache is not None
            return CachedTeacher(self.cache)
        teacher, _ = load_model(
            self.teacher,
            dtype="bfloat16" if self.mixed else "float32",
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        return LiveTeacher(teacher, self.family)

    def _teacher_config(self) -> dict[str, Any]:
        return {**self.headers.config, "model_type": self.family.model_type}

    def _judge(self, source: TeacherSource) -> Judge | None:
        """Return what measures the student for its card, if there is a text to do it on."""
        if self.measured_on is None:
            return None
        teacher = source.model if isinstance(source, LiveTeacher) else None
        device = self.process.device
        assert device is not None
        return Judge(self.measured_on, teacher, device)

    def _measure_before(self, judge: Judge | None, model: PreTrainedModel) -> list[Metrics]:
        """Measure the student as it came in; figures of one that was healed before are kept."""
        stage = stage_before(self.record) if self.record else None
        if judge is None or stage is None:
            return []
        _, found = judge.measure(stage, model.to(judge.device))  # type: ignore[arg-type]
        return found

    def _record(
        self,
        name: str,
        log: list[dict[str, Any]],
        stored: Mapping[str, Tensor],
        judge: Judge | None,
        before: list[Metrics],
    ) -> CardRecord | None:
        """Return what the card of the healed checkpoint tells; None where there is no card."""
        if self.record is None:
            say(f"{name} has no model card, because {self.student} has no record to make it from.")
            return None
        data, after = None, []
        if judge is not None:
            # Loaded anew: what was trained may lie in parts on several machines.
            model = load_fused(self.student, dtype=torch.float32)
            model.load_state_dict(dict(stored), strict=False)
            data, after = judge.measure(HEALED, model.to(judge.device))  # type: ignore[arg-type]
        facts = self._facts(max(line["step"] for line in log), judge)
        return healed_record(self.record, name, facts, data, [*before, *after])

    def _facts(self, steps: int, judge: Judge | None) -> Healed:
        manifest = self.cache.manifest if self.cache else None
        source = self.options.data or (manifest.text if manifest else "")
        cached = (
            f"the original's {manifest.top} likeliest words and {manifest.tail} drawn ones"
            if manifest
            else None
        )
        return healed_facts(
            self.options,
            Text(name_of(source), self.tokens(steps), sequence_length=self.text.ids_NS.shape[1]),
            steps,
            rows_per_step(self.options, self.process.num_processes),
            cached=cached,
            compares=judge is None or judge.teacher is not None,
        )


def read_weights_in_every_process() -> None:
    """Undo what ``accelerate launch --use_fsdp`` asks for: that only the first process reads any.

    Of the others the teacher would then predict from empty memory, and accelerate 1.15 cannot send
    them a student's buffers.
    """
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _family(config: Mapping[str, Any]) -> Family:
    """Return the family of a student's teacher; raises ``UserError`` for what cannot be healed."""
    if not is_fused(dict(config)):
        raise UserError(
            "Only a checkpoint that moefuse wrote can be healed; this one's config.json has no "
            "moefuse block. Make one with 'moefuse fuse'."
        )
    method = quantization_method(dict(config))
    if method is not None:
        raise UserError(
            f"The student is quantised ({method}), and what is trained would not be what is "
            "stored; heal the student that it was made of, and quantise that."
        )
    return all_families()[config["moefuse"]["teacher_model_type"]]


def check_same_kind(
    teacher: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    options: HealConfig,
) -> None:
    """Refuse a teacher that the student of the configuration ``ours`` cannot have been made from.

    A student is compared with it word by word and, with ``--hidden``, layer by layer. It may itself
    be a fused checkpoint. Raises ``UserError``.
    """
    kinds = [str(config.get("model_type")) for config in (theirs, ours)]
    kinds = [kind.removeprefix(MODEL_TYPE_PREFIX) for kind in kinds]
    told = {"model_type": kinds, "vocab_size": [c.get("vocab_size") for c in (theirs, ours)]}
    if options.hidden:
        for name in ("hidden_size", "num_hidden_layers"):
            told[name] = [config.get(name) for config in (theirs, ours)]
    for name, (their, our) in told.items():
        if their != our:
            raise UserError(
                f"The {name} of the teacher {teacher} is {their}, the student's is {our}; a "
                "student is healed against the model that it was made from."
            )


def as_stored(state: Mapping[str, Tensor], headers: CheckpointHeaders) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in the dtypes that ``headers`` name, from a whole state.

    Codes and maps are whole numbers, which stay as they are.
    """
    return {
        name: state[name].detach().to("cpu", STORED.get(info.dtype, state[name].dtype))
        for name, info in headers.tensors.items()
    }


def write_healed(
    stored: Mapping[str, Tensor],
    student: Path,
    headers: CheckpointHeaders,
    out: Path,
    facts: Mapping[str, Any],
    record: CardRecord | None,
) -> None:
    """Write ``stored`` to ``out`` in the form of ``student``: the same files, names and dtypes.

    ``out`` appears whole or not at all; ``facts`` is what ``healing.json`` says, ``record`` what
    the card does, if there is one.
    """
    partial = artifacts.partial_directory(out)
    shards = {info.shard for info in headers.tensors.values()}
    # The student's card says that it is not healed.
    replaced = {*shards, "README.md", PLOT, RECORD}
    for path in sorted(student.iterdir()):
        if path.is_file() and path.name not in replaced and path.suffix not in PICKLE_SUFFIXES:
            shutil.copyfile(path, partial / path.name)
    for shard in sorted(shards):
        names = [name for name, info in headers.tensors.items() if info.shard == shard]
        artifacts.write_tensors(partial / shard, {name: stored[name] for name in names})
    config = dict(headers.config)
    config["moefuse"] = {**config["moefuse"], "job": facts["job"]}
    artifacts.write_json(partial / CONFIG, config)
    artifacts.write_json(partial / HEALING, facts)
    if record is not None:
        write_card(partial, record)
    artifacts.finish_directory(partial, out)


def render_healed(result: HealResult) -> str:
    """Say in a few lines what healing did."""
    losses = [line["loss"] for line in result.log if "loss" in line]
    measured = [line["eval_loss"] for line in result.log if "eval_loss" in line]
    told = [f"Healed in {result.steps:,} steps, {result.seconds:.0f} s, to {result.out}"]
    if len(losses) > 1:
        told.append(f"  loss {losses[0]:.4f}, now {losses[-1]:.4f}")
    if measured:
        told.append(f"  on held-out text {measured[0]:.4f}, now {measured[-1]:.4f}")
    return "\n".join(told)


def heal_in_place(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    text: PackedText,
    family: Family,
    options: HealConfig,
    *,
    seed: int,
    device: str,
    mixed: bool = False,
    held_out: PackedText | None = None,
    directory: Path | None = None,
    description: str | None = None,
) -> list[dict[str, Any]]:
    """Heal a model that is in memory, whatever its experts are.

    ``model`` and ``teacher`` share no weights, both in fp32 on ``device``. Coded rows are trained
    and stored again. Returns the log of the training. Of several methods each is healed alike.
    Checkpoints of the training lie in ``directory``, from the last of which the same call goes on;
    without one nothing is kept on disk.
    """
    stored_to_trained(model)
    if directory is not None:
        remove_incomplete(directory)
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as place:
        log = train(
            model,
            LiveTeacher(teacher, family),
            text,
            family,
            options,
            directory=Path(place),
            seed=seed,
            device=device,
            mixed=mixed,
            held_out=held_out,
            resumable=directory is not None,
            description=description,
        )
    trained_to_stored(model)
    return log
