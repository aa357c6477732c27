"""What a job is given: its settings, the checkpoint, the texts, and what these say of the student.

All of it is made when first needed, and nothing of it is written anywhere.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moefuse import corpus, demo
from moefuse.calibration.collect import Batch
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.config import (
    MULTIPLEXED,
    AssembleConfig,
    CalibrateConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    GroupConfig,
    MeasureConfig,
    SizeConfig,
    build,
    check_form,
    parse_bytes,
    settled_grouping,
)
from moefuse.devices import choose_device, choose_dtype, stored_dtype
from moefuse.errors import UserError
from moefuse.evaluation.streamed import HeldOut
from moefuse.fusion.plan import (
    Estimate,
    Teacher,
    describe_teacher,
    estimate,
    make_plan,
    matrix_rate,
)
from moefuse.fusion.plan_neurons import uses_neurons
from moefuse.measuring import read_calibration, read_held_out
from moefuse.places import check_outside, check_place
from moefuse.sizes import Plan


def is_bundled(fingerprint: str) -> bool:
    """Say whether a checkpoint's fingerprint is that of the bundled teacher."""
    return CheckpointReader.open(demo.teacher_path()).fingerprint() == fingerprint


class JobInputs:
    """What one student of one teacher is made from.

    ``values`` holds settings by name (see ``config``); what is missing or None takes its default.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        work: str | Path,
        values: Mapping[str, Any],
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.compute = build(ComputeConfig, values)
        self.calibration = build(CalibrateConfig, values)
        self.size = build(SizeConfig, values)
        self.factoring = build(FactorConfig, values)
        grouping = build(GroupConfig, values)
        check_form(self.size, grouping, self.factoring)
        self.grouping = settled_grouping(self.size, grouping)
        self.distillation = build(DistillConfig, values)
        self.assembling = build(AssembleConfig, values)
        self.measuring = build(MeasureConfig, values)
        _check_loss(self.calibration, self.distillation)
        self.max_shard_bytes = parse_bytes(self.assembling.max_shard, "--max-shard")
        self.work = Path(work)
        check_place(self.work)
        self.trust_remote_code = trust_remote_code
        self.reader = CheckpointReader.open(
            checkpoint, revision=revision, trust_remote_code=trust_remote_code
        )
        check_outside(self.work, self.reader.directory, "work directory")
        self.device = choose_device(self.compute.device)
        self.stored = stored_dtype(self.reader.tensors, self.reader.family, self.reader.config)
        self.dtype = choose_dtype(self.compute.dtype, self.stored, self.device)

    # What the stages share, made when first needed.

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        return corpus.load_tokenizer(
            self.reader.directory,
            self.reader.source,
            trust_remote_code=self.trust_remote_code,
        )

    @cached_property
    def plan(self) -> Plan:
        """What every layer becomes, and the student's sizes; with own neurons a forecast."""
        return make_plan(self.sizes, self.size, self.factoring)

    @property
    def uses_neurons(self) -> bool:
        """Whether experts become own neurons at unequal bits, or bases and low-rank deltas."""
        return uses_neurons(self.size)

    @property
    def is_multiplexed(self) -> bool:
        """Whether experts become those of the release of 2025."""
        return self.size.form == MULTIPLEXED

    @cached_property
    def sizes(self) -> Teacher:
        """The teacher's sizes."""
        return describe_teacher(self.reader.config, self.reader.tensors, self.reader.family)

    @cached_property
    def batches(self) -> list[Batch]:
        """Calibration text as padded batches of token ids; raises ``UserError``."""
        tokens, length = self.calibration.tokens, self.calibration.sequence_length
        if tokens < length:
            raise UserError(
                f"--tokens is {tokens}, fewer than one sequence of {length}; give more --tokens or "
                "a smaller --sequence-length."
            )
        sequences, _ = self._texts
        self._check_known(sequences)
        # Any token does: what stands in padding is never looked at.
        return list(corpus.batches(sequences, self.calibration.batch_size, 0))

    @cached_property
    def _texts(self) -> tuple[list[Tensor], HeldOut | None]:
        """What to calibrate on and, where nothing else is held out, what that leaves over."""
        left_over = 0 if self._held_out_source else self.measuring.held_out_tokens
        return read_calibration(self.data, self.tokenizer, self.calibration, left_over)

    @cached_property
    def held_out(self) -> HeldOut | None:
        """Text to measure the student on for its card, None where there is none."""
        tokens, source = self.measuring.held_out_tokens, self._held_out_source
        if tokens and source is not None:
            length = self.calibration.sequence_length
            found = read_held_out(source, self.tokenizer, length, tokens)
        else:
            _, found = self._texts
        if found is not None:
            self._check_known(found.sequences)
        return found

    @cached_property
    def _held_out_source(self) -> str | Path | None:
        return self.measuring.held_out or (demo.heldout_path() if self.is_bundled else None)

    def _check_known(self, sequences: Sequence[Tensor]) -> None:
        corpus.check_known(sequences, self.teacher.config.vocab_size, self.reader.source)

    @cached_property
    def is_bundled(self) -> bool:
        """Whether the teacher is the bundled one, whose texts are at hand."""
        return is_bundled(self.reader.fingerprint())

    @cached_property
    def data(self) -> str | Path:
        """The calibration text that is asked for, or the bundled one of the bundled teacher."""
        if self.calibration.data is not None:
            return self.calibration.data
        if self.is_bundled:
            return demo.calibration_path()
        raise UserError(
            "Say with --data what text to calibrate on: a file, a folder, JSONL with text or "
            "messages, or a hub data set. Text like what the model will be used for serves best, "
            "such as --data bigcode/the-stack-smol:::content for code or --data "
            "HuggingFaceTB/smoltalk:all:train:messages for chat."
        )

    @cached_property
    def teacher(self) -> StreamedTeacher:
        """The streamed teacher."""
        return StreamedTeacher(self.reader, device=self.device, dtype=self.dtype)

    @cached_property
    def estimate(self) -> Estimate:
        """Time, disk and memory that the whole job will take."""
        itemsize = torch.empty(0, dtype=self.dtype).element_size()
        return estimate(
            self.sizes,
            self.plan,
            self.calibration,
            self.distillation,
            self.factoring,
            working_itemsize=itemsize,
            rate=matrix_rate(self.device, self.dtype),
            halves=self.grouping.progressive,
        )


def _check_loss(calibration: CalibrateConfig, distillation: DistillConfig) -> None:
    if distillation.loss == "logits" and not calibration.sensitivity_tokens:
        raise UserError(
            "--loss logits needs what --sensitivity-tokens 0 leaves out; give more tokens or "
            "choose --loss output."
        )
