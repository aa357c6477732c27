"""Heal a student: train the whole of it, end to end, until it predicts what its teacher does.

A fused checkpoint comes in and a fused checkpoint of the same form and the same bytes goes out. The
teacher runs beside it, or a cache of its predictions stands for it (``moefuse teach``). Checkpoints
of the training lie beside the output until it is written, so that an interrupted run goes on where
it was.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefuse import artifacts, corpus
from moefuse.checkpoint.headers import CheckpointHeaders, local_directory, read_headers
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.config import ComputeConfig, HealConfig, build, parse_bytes, parse_count
from moefuse.console import say
from moefuse.devices import choose_device, suited_threads
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model
from moefuse.families import Family, all_families
from moefuse.healing.cache import TeacherCache
from moefuse.healing.sources import CachedTeacher, LiveTeacher, TeacherSource
from moefuse.healing.text import PackedText, pack
from moefuse.healing.trainer import remove_incomplete, train
from moefuse.modeling import is_fused, load_fused
from moefuse.modeling.training import stored_to_trained, trained_to_stored
from moefuse.pipeline import peak_memory
from moefuse.places import check_new, check_output, check_own, check_outside

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
    check_outside(out, job.headers.directory, "output")
    check_outside(work, job.headers.directory, "work directory")
    mark = job.mark()
    log = _finished(out, mark)
    if log is None:
        check_output(out, overwrite=overwrite)
        log = job.run(work / f"heal-{mark}", out, mark)
    if PartialState().is_main_process:
        artifacts.remove_replaced(out)
        shutil.rmtree(work, ignore_errors=True)
    steps = max(line["step"] for line in log)
    tokens = parse_count(job.options.tokens, "--tokens")
    return HealResult(out, steps, tokens, log, time.monotonic() - start, peak_memory())


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
        self.headers = _student_headers(student)
        self.student = student
        self.family = _family(self.headers.config)
        self.device = choose_device(self.compute.device)
        self.mixed = self._computes_in_bf16()
        if (teacher is None) == (teacher_cache is None):
            raise UserError("Give one of --teacher and --teacher-cache; healing needs a teacher.")
        self.teacher = teacher
        self.cache = None if teacher_cache is None else TeacherCache.open(teacher_cache)
        self._check_cache()
        self.tokenizer = corpus.load_tokenizer(self.headers.directory)
        self.text = self._text()
        self.held_out = None if held_out is None else self._held_out(held_out)

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
        )

    def _held_out(self, source: str | Path) -> PackedText:
        documents = corpus.load_documents(source)
        length = self.options.sequence_length
        return pack(documents, self.tokenizer, length, tokens=HELD_OUT_TOKENS, seed=0)

    def mark(self) -> str:
        """Return what tells this job from others: all that the outcome depends on."""
        settings = {
            key: value
            for key, value in asdict(self.options).items()
            if key not in ("data", "report_to")
        }
        return artifacts.fingerprint(
            [
                self.headers.fingerprint(),
                self.text.fingerprint(),
                self.held_out.fingerprint() if self.held_out else None,
                self._teacher_mark(),
                settings,
                [self.compute.seed, self.device, self.mixed, PartialState().num_processes],
            ]
        )

    def _teacher_mark(self) -> str:
        if self.cache is not None:
            return f"cache {self.cache.manifest.teacher_fingerprint} {self.cache.manifest.job}"
        directory = local_directory(str(self.teacher))
        return str(self.teacher) if directory is None else read_headers(directory).fingerprint()

    def source(self) -> TeacherSource:
        """Return what tells the teacher's predictions; a live teacher is loaded."""
        if self.cache is not None:
            return CachedTeacher(self.cache)
        assert self.teacher is not None
        teacher, _ = load_model(
            self.teacher,
            dtype="bfloat16" if self.mixed else "float32",
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        ours, theirs = self.headers.config.get("vocab_size"), teacher.config.vocab_size
        if ours != theirs:
            raise UserError(
                f"The teacher {self.teacher} has a vocabulary of {theirs} words, the student "
                f"{ours}; a student is healed against the model that it was made from."
            )
        return LiveTeacher(teacher)

    def run(self, directory: Path, out: Path, mark: str) -> list[dict[str, Any]]:
        """Train and write ``out``; returns the log."""
        process = PartialState()
        if process.is_main_process:
            remove_incomplete(directory)
        process.wait_for_everyone()
        model = load_fused(self.headers.directory, dtype=torch.float32)
        stored_to_trained(model)
        shape = self.family.shape(self._teacher_config())
        with suited_threads(shape.hidden, shape.intermediate):
            log = train(
                model,
                self.source(),
                self.text,
                self.family,
                self.options,
                directory=directory,
                seed=self.compute.seed,
                device=self.device,
                mixed=self.mixed,
                held_out=self.held_out,
            )
        if process.is_main_process:
            trained_to_stored(model)
            facts = {"job": mark, "settings": asdict(self.options), "log": log}
            write_healed(model, self.headers, out, facts)
        process.wait_for_everyone()
        return log

    def _teacher_config(self) -> dict[str, Any]:
        return {**self.headers.config, "model_type": self.family.model_type}
