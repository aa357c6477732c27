"""Teach: a teacher's logits on a text, kept once, for students to be healed without the teacher.

The teacher is streamed (see ``checkpoint.streaming``), so that it need not fit in memory, and the
text goes through it in waves of some million tokens, so that the hidden states between two layers
fit on the disk. A wave ends in one file of the cache; an interrupted run goes on from the last
finished layer of the wave it was in. More tokens in a wave mean fewer readings of the weights: each
wave reads all of them once.

Shape suffixes: N rows, B rows of a batch, S tokens of a row, T tokens that count, D hidden width,
V vocabulary, M words drawn from each token's rest.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefuse import artifacts
from moefuse.checkpoint.passing import PassedOn, first_unfinished
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.config import ComputeConfig, TeachConfig, build
from moefuse.console import track
from moefuse.corpus import CHARACTERS_PER_TOKEN, check_known, load_documents, load_tokenizer
from moefuse.devices import choose_device, choose_dtype, stored_dtype, suited_threads
from moefuse.errors import UserError
from moefuse.healing.cache import (
    MANIFEST,
    TEXT,
    VERSION,
    Manifest,
    pack_row,
    wave_file,
    write_manifest,
    write_wave,
)
from moefuse.healing.text import PackedText, pack
from moefuse.mathematics.truncated import TopLogits, truncate
from moefuse.places import check_new, check_output, check_outside, check_own, existing_parent

OWN_ENTRIES = ("teach-",)
CHUNK_NUMBERS = 1 << 24
"""How many logits are turned into probabilities at once; in fp32 and fp64 besides, 0.3 GB."""
SPARE_DISK_SHARE = 1.05


@dataclass(frozen=True)
class TeachResult:
    """What ``teach`` made: where, of what, how large, in what time."""

    out: Path
    manifest: Manifest
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "out": str(self.out),
            **asdict(self.manifest),
            "bytes_per_token": self.manifest.bytes_per_token,
            "seconds": self.seconds,
        }


def teach(
    checkpoint: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    *,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TeachResult:
    """Stream the teacher in ``checkpoint`` over a text and leave a cache of its logits in ``out``.

    ``values`` are settings of ``ComputeConfig`` and ``TeachConfig`` by name. Work lies beside
    ``out`` and is removed in the end. The same call after an interruption goes on from the last
    finished layer and gives the same bytes. Raises ``UserError`` for bad input before any expensive
    work starts.
    """
    start, out = time.monotonic(), Path(out)
    check_new(out)
    work = out.with_name(out.name + ".work")
    check_own(work, OWN_ENTRIES)
    # An interrupted run of the same job may have written its output and not yet cleaned up.
    if not work.exists():
        _check_output(out, overwrite=overwrite)
    job = Teaching(checkpoint, work, values, revision=revision, trust_remote_code=trust_remote_code)
    check_outside(out, job.reader.directory, "output")
    if not (work.exists() and _job_of(out) == job.fingerprint):
        _check_output(out, overwrite=overwrite)
        job.preflight()
        artifacts.finish_directory(job.run(), out)
    artifacts.remove_replaced(out)
    shutil.rmtree(work)
    manifest = Manifest(**artifacts.read_json(out / MANIFEST))
    return TeachResult(out, manifest, time.monotonic() - start)


def _check_output(out: Path, *, overwrite: bool) -> None:
    check_output(out, overwrite=overwrite, mark=MANIFEST, what="teacher cache")


def _job_of(out: Path) -> str | None:
    """Return what tells the command that made ``out`` from others, or None."""
    try:
        return artifacts.read_json(out / MANIFEST)["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Teaching:
    """One cache of one teacher: its settings, its text and the waves that make it."""

    def __init__(
        self,
        checkpoint: str | Path,
        work: Path,
        values: Mapping[str, Any],
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.compute = build(ComputeConfig, values)
        self.settings = build(TeachConfig, values)
        self.tokens, self.wave_rows = self.settings.token_count, self.settings.wave_rows
        if self.settings.data is None:
            raise UserError(
                "Say with --data what text to keep the teacher's logits of: a file, a folder, "
                "JSONL with text or messages, or a hub data set."
            )
        self.data = self.settings.data
        self.work = work
        self.trust_remote_code = trust_remote_code
        self.reader = CheckpointReader.open(
            checkpoint, revision=revision, trust_remote_code=trust_remote_code
        )
        self.device = choose_device(self.compute.device)
        stored = stored_dtype(self.reader.tensors, self.reader.family, self.reader.config)
        self.dtype = choose_dtype(self.compute.dtype, stored, self.device)
        if self.settings.top > self.vocabulary:
            raise UserError(
                f"--top is {self.settings.top}, but the teacher's vocabulary has only "
                f"{self.vocabulary} words; give at most {self.vocabulary}."
            )

    @cached_property
    def teacher(self) -> StreamedTeacher:
        """The streamed teacher."""
        return StreamedTeacher(self.reader, device=self.device, dtype=self.dtype)

    @cached_property
    def vocabulary(self) -> int:
        """How many words the teacher gives logits for."""
        return self.teacher.config.vocab_size

    @cached_property
    def text(self) -> PackedText:
        """The packed text; raises ``UserError``."""
        tokenizer = load_tokenizer(
            self.reader.directory, self.reader.source, trust_remote_code=self.trust_remote_code
        )
        # A data set on the hub may be far larger than what is asked of it.
        documents = load_documents(self.data, limit_bytes=CHARACTERS_PER_TOKEN * self.tokens)
        text = pack(
            documents,
            tokenizer,
            self.settings.sequence_length,
            tokens=self.tokens,
            seed=self.compute.seed,
            apart=self.reader.family.one_piece_a_row,
        )
        check_known([text.ids_NS], self.vocabulary, self.reader.source)
        return text

    @cached_property
    def fingerprint(self) -> str:
        """What tells this job from others: all that its bytes depend on."""
        kept = {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in ("data", "tokens")
        }
        place = [self.device.split(":")[0], str(self.dtype), self.compute.seed]
        return artifacts.fingerprint(
            [VERSION, self.reader.fingerprint(), self.text.fingerprint(), kept, place]
        )

    @property
    def directory(self) -> Path:
        """Where the work of this very job lies."""
        return self.work / f"teach-{self.fingerprint}"

    def preflight(self) -> None:
        """Refuse too small a disk before any work; raises ``UserError``."""
        needed = self._disk_bytes() * SPARE_DISK_SHARE
        free = shutil.disk_usage(existing_parent(self.work)).free
        if needed > free:
            raise UserError(
                f"Too little disk: the job needs about {needed / 1e9:.2f} GB at {self.work}, where "
                f"{free / 1e9:.2f} GB are free; make room, or give fewer --tokens, a smaller --top "
                "or smaller --wave-tokens."
            )

    def _disk_bytes(self) -> int:
        """Return what the finished cache and one wave's hidden states take at most."""
        words = self.settings.top + self.settings.tail
        cache = self.text.tokens * (words * (4 if self.vocabulary <= 1 << 16 else 6) + 4)
        text = sum(part.nbytes for part in self.text.tensors().values())
        tokens = min(self.wave_rows, self.text.rows) * self.settings.sequence_length
        itemsize = torch.empty(0, dtype=self.dtype).element_size()
        # What enters a layer and what leaves it are there together.
        return cache + text + 2 * tokens * self.reader.shape.hidden * itemsize

    def run(self) -> Path:
        """Do all waves that are not done, and return the finished cache's directory."""
        cache = self.directory / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / TEXT).exists():
            artifacts.write_tensors(cache / TEXT, self.text.tensors())
        waves = torch.arange(self.text.rows).split(self.wave_rows)
        shape = self.reader.shape
        with suited_threads(shape.hidden, shape.intermediate):
            for number, row_N in enumerate(waves):
                if not (cache / wave_file(number)).exists():
                    name = f"Teach {number + 1}/{len(waves)}"
                    rows = _Wave(self, self.directory / f"wave-{number:05d}", row_N, name).rows()
                    write_wave(cache / wave_file(number), rows)
                shutil.rmtree(self.directory / f"wave-{number:05d}", ignore_errors=True)
        write_manifest(cache, self._manifest(cache, len(waves)))
        return cache

    def _manifest(self, cache: Path, waves: int) -> Manifest:
        return Manifest(
            version=VERSION,
            teacher=self.reader.source,
            teacher_fingerprint=self.reader.fingerprint(),
            text=self.data,
            text_fingerprint=self.text.fingerprint(),
            job=self.fingerprint,
            top=self.settings.top,
            tail=self.settings.tail,
            vocabulary=self.vocabulary,
            sequence_length=self.settings.sequence_length,
            rows=self.text.rows,
            tokens=self.text.tokens,
            wave_rows=self.wave_rows,
            wave_bytes=[(cache / wave_file(number)).stat().st_size for number in range(waves)],
        )


class _Wave:
    """Some rows on their way through the teacher; their hidden states lie in ``directory``."""

    def __init__(self, job: Teaching, directory: Path, row_N: Tensor, name: str) -> None:
        self.job = job
        self.teacher = job.teacher
        self.directory = directory
        self.batches = row_N.split(job.settings.batch_size)
        self.name = name

    def hidden(self, layer: int) -> Path:
        """Return the directory of what enters a decoder layer, or the head after the last."""
        return self.directory / f"hidden-{layer:03d}"

    def rows(self) -> list[bytes]:
        """Return every row's logits, packed."""
        layers = len(self.teacher.layers)
        first = first_unfinished(self.hidden, layers)
        # An interruption may have come before the input of a finished layer was removed.
        for layer in range(1, first):
            shutil.rmtree(self.hidden(layer), ignore_errors=True)
        passed = PassedOn(self.hidden, first)
        while passed.layer < layers:
            with self.teacher.loaded(passed.layer) as module:
                self._pass(module, passed)
            passed.advance(needed=True)
        with self.teacher.head() as head:
            return list(self._packed(head, passed))

    def _pass(self, module: nn.Module, passed: PassedOn) -> None:
        """Pass every batch through one loaded layer."""
        text, layer = self.job.text, passed.layer
        description = f"{self.name}, layer {layer + 1}/{len(self.teacher.layers)}"
        for number, row_B in enumerate(track(self.batches, description)):
            embedded_BSD, received = self.teacher.embed(
                text.ids_NS[row_B].long(), position_ids_BS=text.position_NS[row_B].long()
            )
            entering = passed.read(number)
            hidden_BSD = embedded_BSD if entering is None else entering
            leaving_BSD = self.teacher.forward_layer(module, hidden_BSD, received[layer])
            self._check_finite(leaving_BSD, layer)
            passed.write(number, leaving_BSD)

    def _check_finite(self, hidden_BSD: Tensor, layer: int) -> None:
        if not bool(torch.isfinite(hidden_BSD).all()):
            name = str(self.job.dtype).removeprefix("torch.")
            raise UserError(
                f"Layer {layer} of the teacher computes NaN or infinity in {name}; choose another "
                "--dtype, such as float32, or download the checkpoint again."
            )

    @torch.no_grad()
    def _packed(self, head: nn.Module, passed: PassedOn) -> Iterator[bytes]:
        """Turn what left the last layer into logits and yield what is kept, row by row."""
        for number, row_B in enumerate(track(self.batches, f"{self.name}, logits")):
            hidden_BSD = passed.read(number)
            assert hidden_BSD is not None
            for row, hidden_SD in zip(row_B.tolist(), hidden_BSD, strict=True):
                kept_TD = hidden_SD[self.job.text.counted_NS[row]].to(self.teacher.device)
                yield pack_row(self._top(head, kept_TD, row), self.job.vocabulary)

    def _top(self, head: nn.Module, hidden_TD: Tensor, row: int) -> TopLogits:
        settings = self.job.settings
        # By the row's number, so that what is drawn depends neither on batches nor on resuming.
        seed = int(artifacts.fingerprint([self.job.compute.seed, row])[:15], 16)
        generator = torch.Generator().manual_seed(seed)
        draw_TM = torch.rand(len(hidden_TD), settings.tail, generator=generator)
        chunk = max(1, CHUNK_NUMBERS // self.job.vocabulary)
        return TopLogits.joined(
            [
                truncate(head(part_TD), settings.top, part_TM.to(part_TD.device))
                for part_TD, part_TM in zip(
                    hidden_TD.split(chunk), draw_TM.split(chunk), strict=True
                )
            ]
        )
