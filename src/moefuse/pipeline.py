"""The whole job: calibrate, group, factor, distil, assemble, each resumable and callable alone.

Every stage keeps its artifacts in a directory of the work directory whose name ends in a
fingerprint of everything that went into it: the checkpoint, the text, the settings of this stage
and of those before it. The same command therefore finds its own artifacts again and goes on from
the last finished layer, other settings never collide, and one calibration serves every size.
"""

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moefuse import artifacts, corpus
from moefuse.calibration.collect import CalibrationStore, collect
from moefuse.calibration.sensitivity import measure_sensitivity, metric_path
from moefuse.cards import CardRecord, Distilled, Measured, Text, student_record, write_card
from moefuse.checkpoint.passed import OnDisk
from moefuse.config import (
    AssembleConfig,
    CalibrateConfig,
    ComputeConfig,
    DistillConfig,
    FactorConfig,
    GroupConfig,
    MeasureConfig,
    SizeConfig,
    merge_of,
)
from moefuse.console import say, track
from moefuse.devices import suited_threads
from moefuse.distillation.loop import distill_layer, metric_root
from moefuse.distillation.own_inputs import OwnInputs, Passed
from moefuse.errors import UserError
from moefuse.evaluation.streamed import HeldOut
from moefuse.export.assemble import assemble
from moefuse.fusion.choose import factor
from moefuse.fusion.keep import Kept, keep
from moefuse.fusion.multiplex import multiplex
from moefuse.fusion.neurons import importance
from moefuse.fusion.plan import expert_budget, settled_plan
from moefuse.fusion.plan_neurons import choices_of
from moefuse.grouping.assign import BY_WEIGHTS, group_layer
from moefuse.job_inputs import JobInputs
from moefuse.mathematics.experts import Experts, ExpertsCall, Gating
from moefuse.mathematics.losses import measure, power_of
from moefuse.mathematics.similarity import STATE_TOKENS
from moefuse.measuring import UNMEASURED, measure_student
from moefuse.modeling.modeling_moefuse import gating_of
from moefuse.modeling.training import TrainedNeuronExperts
from moefuse.places import (
    check_new,
    check_output,
    check_outside,
    check_own,
    existing_parent,
    size_of,
)
from moefuse.sizes import Plan, make_experts

STAGES = (
    ComputeConfig,
    CalibrateConfig,
    SizeConfig,
    GroupConfig,
    FactorConfig,
    DistillConfig,
    AssembleConfig,
    MeasureConfig,
)
CHECKED = "checked"
SPARE_DISK_SHARE = 1.05
METRIC_DAMPING = 0.05
"""Share of the mean sensitivity that every direction of a layer's output has at least."""
JUDGE_TOKENS = 4096
"""Calibration tokens beyond those fitted to, on which ways of factoring are compared."""
STAGE_OF = {
    "calibration": "calibrate",
    "sensitivity": "calibrate",
    "energies": "group",
    "factors": "factor",
    "distilled": "distill",
}
"""The command that leaves each directory of artifacts."""
OWN_ENTRIES = (
    "calibration-",
    "groups-",
    "sensitivity-",
    "energies-",
    "factors-",
    "distilled-",
    "held-out-",
    "measured-",
    f"{CHECKED}-",
)


class Elsewhere(Protocol):
    """What makes layers somewhere else than in this process (see ``launch``)."""

    def check(self, job: "Job") -> None:
        """Raise ``UserError`` where it cannot do this job, before any work."""

    def make(self, job: "Job", name: str, layers: list[int]) -> None:
        """Have ``Job.make_apart(name, layer)`` done for each of the layers."""


@dataclass(frozen=True)
class LayerStage:
    """A stage whose layers need nothing of each other: where they lie, and what makes one."""

    directory: Path
    suffix: str
    description: str | None
    make: Callable[[int, Path], None]

    def path(self, layer: int) -> Path:
        """Return where a layer's artifact is, or will be."""
        return self.directory / layer_file(layer, self.suffix)


def layer_file(layer: int, suffix: str) -> str:
    """Return the name of a layer's artifact."""
    return f"layer-{layer:03d}.{suffix}"


class Job(JobInputs):
    """One student of one teacher: its settings, its artifacts and the stages that make it.

    Nothing expensive happens before a stage is called. With ``elsewhere`` layers that need nothing
    of each other are made there.
    """

    elsewhere: Elsewhere | None = None

    @cached_property
    def settled(self) -> tuple[dict[int, Tensor], Plan]:
        """Every neuron's choice of bits by the energies that were measured, and the true plan."""
        energies = {layer: self._energy(layer) for layer in self.reader.shape.layers}
        return settled_plan(self.sizes, energies, self.size)

    @property
    def true_plan(self) -> Plan:
        """What every layer is; with own neurons known once energies are measured."""
        return self.settled[1] if self.uses_neurons else self.plan

    # Where artifacts lie.

    def _directory(self, stage: str, *settings: Any) -> Path:
        return self.work / f"{stage}-{artifacts.fingerprint(list(settings))}"

    @cached_property
    def store(self) -> CalibrationStore:
        """Where calibration leaves its artifacts."""
        tokens = [[ids.tolist(), mask.sum(1).tolist()] for ids, mask in self.batches]
        place = [self.device.split(":")[0], str(self.dtype)]
        return CalibrationStore(
            self._directory("calibration", self.reader.fingerprint(), tokens, place)
        )

    @cached_property
    def groups_directory(self) -> Path:
        """Where grouping leaves its artifacts."""
        groups = [layer.groups for layer in self.plan.layers.values()]
        settings = [groups, asdict(self.grouping)]
        if self.is_multiplexed:
            settings.append(self.size.form)
        return self._directory("groups", self.store.directory.name, *settings)

    @property
    def _sensitivity_batches(self) -> int:
        tokens = self.calibration.batch_size * self.calibration.sequence_length
        return -(-self.calibration.sensitivity_tokens // tokens)

    @cached_property
    def sensitivity_directory(self) -> Path | None:
        """Where it is kept what the logits feel of each layer; None where nothing asks."""
        # A calibration for no size in particular serves all sizes and forms.
        felt = self.uses_neurons or self.distillation.loss == "logits" or self.size == SizeConfig()
        if not felt or not self.calibration.sensitivity_tokens:
            return None
        settings = [self.store.directory.name, self._sensitivity_batches, self.compute.seed]
        return self._directory("sensitivity", *settings)

    def metric(self, layer: int) -> Tensor | None:
        """Return what the logits feel of a layer's errors, (D, D), or None for all alike."""
        if self.sensitivity_directory is None:
            return None
        path = metric_path(self.sensitivity_directory, layer)
        if not path.exists():
            raise _missing("calibrate", self.work)
        return artifacts.read_tensors(path)["fisher_DD"].to(self.device)

    def metric_root(self, layer: int) -> Tensor | None:
        """Return the root of the metric that distillation compares outputs in, or None."""
        loss = self.distillation.loss
        if loss == "output" or (loss == "auto" and not self.uses_neurons):
            return None
        metric_DD = self.metric(layer)
        return None if metric_DD is None else metric_root(metric_DD, METRIC_DAMPING)

    @cached_property
    def energies_directory(self) -> Path:
        """Where the energies of neurons are."""
        felt = self.sensitivity_directory.name if self.sensitivity_directory else None
        settings = [self.store.directory.name, self.factoring.fit_tokens, felt]
        return self._directory("energies", *settings)

    @cached_property
    def factors_directory(self) -> Path:
        """Where factoring leaves its artifacts."""
        if self.uses_neurons:
            budget = expert_budget(self.sizes, self.size)
            shared = [choices_of(self.size), self.size.shared, self.size.spread]
            settings = [budget, shared, asdict(self.factoring)]
            return self._directory("factors", self.energies_directory.name, *settings)
        layers = [asdict(layer) for layer in self.plan.layers.values()]
        settings = [layers, asdict(self.factoring)]
        if self.is_multiplexed:
            settings.append(self.compute.seed)
        return self._directory("factors", self.groups_directory.name, *settings)

    @cached_property
    def distilled_directory(self) -> Path:
        """Where distillation leaves its artifacts; the factors' own when there are no steps."""
        if not self.distillation.steps:
            return self.factors_directory
        settings = [asdict(self.distillation), self.compute.seed]
        if self.sensitivity_directory is not None:
            settings.append(self.sensitivity_directory.name)
        return self._directory("distilled", self.factors_directory.name, settings)

    @property
    def output_mark(self) -> str:
        """What tells this job's output from every other's."""
        return self._mark(self.distilled_directory)

    def _mark(self, directory: Path) -> str:
        mark = f"{directory.name}-{self.max_shard_bytes}"
        if self.held_out is None:
            return mark
        return f"{mark}-{self.measured_directory(directory, self.held_out).name}"

    def held_out_directory(self, held_out: HeldOut) -> Path:
        """Where the teacher's last hidden states over a held-out text are."""
        tokens = [sequence.tolist() for sequence in held_out.sequences]
        settings = [held_out.sequence_length, self.device.split(":")[0], str(self.dtype)]
        return self._directory("held-out", self.reader.fingerprint(), tokens, *settings)

    def measured_directory(self, directory: Path, held_out: HeldOut) -> Path:
        """Where it is kept how good the student in a stage's ``directory`` is on a text."""
        settings = [held_out.name, list(held_out.documents), held_out.note]
        place = self.held_out_directory(held_out).name
        return self._directory("measured", directory.name, place, *settings)

    # The stages.

    def check_apart(self, out: Path) -> None:
        """Refuse an output that would mix with or replace what is read; raises ``UserError``."""
        check_outside(out, self.reader.directory, "output")
        for inner, name in ((self.reader.directory, "checkpoint"), (self.work, "work directory")):
            if inner.resolve().is_relative_to(out.resolve()):
                raise UserError(f"The {name} {inner} lies in the output {out}; keep them apart.")

    def preflight(self, out: Path) -> None:
        """Check whatever can be checked before any work; raises ``UserError``.

        The student will be written to ``out``. What an interrupted run left counts as there.
        """
        _ = self.plan, self.teacher, self.batches, self.held_out
        needed = self.estimate.disk_bytes * SPARE_DISK_SHARE + self._measuring_bytes
        needed -= sum(size_of(directory) for directory in self._directories())
        student = self.plan.bytes * SPARE_DISK_SHARE
        if existing_parent(out).stat().st_dev != existing_parent(self.work).stat().st_dev:
            needed -= student
            _check_room(out, student, "the student", "make room, or choose another output.")
        advice = "make room, choose another --work, or calibrate on fewer --tokens."
        _check_room(self.work, needed, "the job", advice)

    @property
    def _measuring_bytes(self) -> int:
        """Hidden states over the held-out text: the teacher's, and twice a student's in a layer."""
        if self.held_out is None:
            return 0
        tokens = sum(map(len, self.held_out.sequences))
        return 3 * tokens * self.sizes.shape.hidden * self.dtype.itemsize

    def check_weights(self) -> None:
        """Read every weight once and refuse NaN and infinity; done once per checkpoint."""
        mark = self.work / f"{CHECKED}-{self.reader.fingerprint()}.json"
        if not mark.exists():
            self.reader.check_finite()
            artifacts.write_json(mark, {"finite": True})

    def calibrate(self) -> None:
        """Stream the teacher over the text and keep what its MoE layers received and returned."""
        _ = self.teacher, self.batches
        self.check_weights()
        with self.suited_threads():
            collect(self.teacher, self.batches, self.store)
            if self.sensitivity_directory is not None:
                measure_sensitivity(
                    self.teacher,
                    self.batches[: self._sensitivity_batches],
                    self.sensitivity_directory,
                    seed=self.compute.seed,
                )

    def group(self) -> None:
        """Choose which experts of each layer share a base, or measure what neurons are worth."""
        self._make_layers("group")

    def factor(self) -> None:
        """Split each layer's experts into bases and deltas in closed form."""
        self._make_layers("factor")

    def layer_stage(self, name: str) -> LayerStage:
        """Return the stage that makes layers one by one: ``group``, ``factor`` or ``distill``."""
        if name == "group" and self.uses_neurons:
            return LayerStage(
                self.energies_directory, "safetensors", "Weigh neurons", self._weigh_neurons
            )
        if name == "group":
            return LayerStage(self.groups_directory, "json", "Group", self._group)
        if name == "factor":
            return LayerStage(self.factors_directory, "safetensors", "Factor", self._factor)
        return LayerStage(self.distilled_directory, "safetensors", None, self._distill_alone)

    def _make_layers(self, name: str) -> None:
        """Make whatever layers of a stage are not there yet, here or elsewhere."""
        stage = self.layer_stage(name)
        if self.elsewhere is None:
            for layer, path in self._todo(stage.directory, stage.suffix, stage.description):
                # In a call of its own, so that no layer is in memory when the next is read.
                with self.suited_threads():
                    stage.make(layer, path)
            return
        todo = [layer for layer, _ in self._todo(stage.directory, stage.suffix, None)]
        if todo:
            self.elsewhere.make(self, name, todo)

    def make_apart(self, name: str, layer: int) -> None:
        """Make one layer of a stage beside other processes that make layers of the same job.

        Its files are written to a directory of their own and then moved to their places: a process
        that was given up and still lives never writes into what another one makes in its stead.
        """
        stage = self.layer_stage(name)
        path = stage.path(layer)
        with artifacts.filled_apart(path) as apart, self.suited_threads():
            stage.make(layer, apart / path.name)

    def _group(self, layer: int, path: Path) -> None:
        statistics = self._calibrated(layer)
        if self.grouping.progressive:
            # Halving starts here and pairs by what is left of the experts then.
            artifacts.write_json(path, list(range(self.reader.shape.experts)))
            return
        by_weights = self.grouping.grouping in BY_WEIGHTS
        groups = group_layer(
            statistics,
            self.experts(layer) if by_weights else None,
            self.plan.layers[layer].groups,
            self.grouping.grouping,
            x_SD=self.store.sample(layer, STATE_TOKENS).to(self.device).x_TD
            if by_weights
            else None,
            multiplexed=self.is_multiplexed,
        )
        artifacts.write_json(path, groups.tolist())

    def _weigh_neurons(self, layer: int, path: Path) -> None:
        self._calibrated(layer)
        call = self.store.sample(layer, self.factoring.fit_tokens).to(self.device)
        energy_EF = importance(self.experts(layer), call, self.metric(layer)) / len(call.x_TD)
        artifacts.write_tensors(path, {"energy_EF": energy_EF})

    def _factor(self, layer: int, path: Path) -> None:
        start = time.monotonic()
        if self.uses_neurons:
            module = self._kept(layer).module
            error = self._error(layer, module)
            made: dict[str, Any] = {"base": "neurons", "before": error, "after": error}
            artifacts.write_json(
                path.with_suffix(".json"), made | {"seconds": time.monotonic() - start}
            )
            artifacts.write_tensors(path, module.state_dict())
            return
        groups = self._artifact(self.groups_directory, layer, "json", "group")
        statistics = self._calibrated(layer)
        make = factor
        if self.is_multiplexed:
            make = partial(multiplex, grouping=self.grouping, seed=self._seed(layer))
        factored = make(
            self.experts(layer),
            statistics,
            self.store.sample(layer, self.factoring.fit_tokens + JUDGE_TOKENS).to(self.device),
            torch.tensor(artifacts.read_json(groups), device=self.device),
            self.plan.layers[layer],
            self.factoring,
        )
        made = {"base": factored.base, "before": factored.error, "after": factored.error}
        made["seconds"] = time.monotonic() - start
        artifacts.write_json(path.with_suffix(".json"), made)
        artifacts.write_tensors(path, factored.state)

    def _energy(self, layer: int) -> Tensor:
        """Read what the neurons of one layer are worth, (E, F)."""
        path = self._artifact(self.energies_directory, layer, "safetensors", "group")
        return artifacts.read_tensors(path)["energy_EF"]

    def _kept(self, layer: int) -> Kept:
        """Make one layer's neuron experts from the teacher's."""
        chosen, plan = self.settled
        return keep(
            self.experts(layer),
            self.store.sample(layer, self.factoring.fit_tokens).to(self.device),
            self._energy(layer).to(self.device),
            chosen[layer].to(self.device),
            choices_of(self.size),
            plan.layers[layer],
            self.metric_root(layer),
        )

    def _error(self, layer: int, module: torch.nn.Module) -> float:
        tokens = self.factoring.fit_tokens
        call = self.store.sample(layer, tokens + JUDGE_TOKENS).to(self.device)
        judge = call.rows(slice(tokens, None)) if len(call.x_TD) > tokens else call
        return measure(module, judge, power_of(judge), JUDGE_TOKENS)

    def distill(self) -> None:
        """Train each layer's student against what the teacher's layer returned, or should have."""
        if not self.distillation.steps:
            return
        for layer in self.reader.shape.layers:
            if self.uses_neurons:
                self._artifact(self.energies_directory, layer, "safetensors", "group")
            else:
                self._artifact(self.factors_directory, layer, "safetensors", "factor")
        if self.on_own_inputs:
            self._distill_in_order()
            return
        self._make_layers("distill")

    @property
    def on_own_inputs(self) -> bool:
        """Whether layers are distilled on what they receive above the students of lower layers."""
        wish = self.distillation.inputs
        return wish == "student" or (wish == "auto" and self.uses_neurons)

    def own_inputs(self, passed: Passed) -> OwnInputs:
        """Follow the student's own inputs, hidden states kept in ``passed``."""
        return OwnInputs(self.teacher, self.batches, passed)

    def _distill_in_order(self) -> None:
        """Distil every layer above the students of those below it."""
        layers = self.reader.shape.layers
        todo = dict(self._todo(self.distilled_directory, "safetensors", None))
        if not todo:
            return
        for layer in layers:
            self._calibrated(layer)
        passed = OnDisk(self.distilled_directory / "passed")
        if min(todo) < passed.layer:
            # Somebody removed a finished layer: what passed it is of a student that is gone.
            passed.restart()
        own = self.own_inputs(passed)
        for layer in layers:
            if layer < passed.layer:
                continue
            with self.suited_threads():
                call = own.call(layer)
                if layer in todo:
                    self._distill(layer, todo[layer], call)
                if layer != layers[-1]:
                    student = self.student(layer, self.distilled_directory, "distill")
                    own.take(student.to(self.stored).float())
        passed.remove()

    def _distill_alone(self, layer: int, path: Path) -> None:
        """Distil a layer on what the teacher's receives, whatever becomes of other layers."""
        self._distill(layer, path, self.call(layer))

    def _distill(self, layer: int, path: Path, call: ExpertsCall) -> None:
        start = time.monotonic()
        student = (
            self._kept(layer).trained()
            if self.uses_neurons
            else self.student(layer, self.factors_directory, "factor")
        )
        result = distill_layer(
            student,
            call,
            self.distillation,
            seed=self._seed(layer),
            progress=lambda steps: track(steps, f"Distil layer {layer}"),
            metric_root_DD=self.metric_root(layer),
        )
        say(f"Layer {layer}: relative error {result.before:.4f}, now {result.after:.4f}")
        made: dict[str, Any] = {"before": result.before, "after": result.after}
        made["seconds"] = time.monotonic() - start
        artifacts.write_json(path.with_suffix(".json"), made)
        if isinstance(student, TrainedNeuronExperts):
            student = student.packed()
        artifacts.write_tensors(path, student.state_dict())

    def _seed(self, layer: int) -> int:
        return self.compute.seed + layer

    def suited_threads(self) -> AbstractContextManager[None]:
        """Use as many CPU threads as this teacher's layers are worth."""
        return suited_threads(self.reader.shape.hidden, self.reader.shape.intermediate)

    def assemble(self, out: Path, *, stage_directory: Path | None = None) -> None:
        """Write the student's checkpoint to ``out``, from ``stage_directory`` or the distilled."""
        directory = stage_directory or self.distilled_directory
        stage = STAGE_OF[directory.name.split("-")[0]]
        plan = self.true_plan
        paths = {n: self._artifact(directory, n, "safetensors", stage) for n in plan.layers}
        record = self._record(out.name, directory)
        assemble(
            self.reader,
            plan.layers,
            lambda layer: artifacts.read_tensors(paths[layer]),
            out,
            dtype=self.stored,
            max_shard_bytes=self.max_shard_bytes,
            job=self._mark(directory),
            tokenizer_class=type(self.tokenizer).__name__,
            describe=lambda partial: write_card(partial, record),
        )

    def _record(self, name: str, directory: Path) -> CardRecord:
        """Return what the card of the student in ``directory`` tells."""
        has_steps = directory != self.factors_directory
        measured = self.measure(directory)
        errors = {
            str(layer): {when: error[when] for when in ("before", "after")}
            for layer, error in self.errors(directory).items()
        }
        return student_record(
            name,
            self.reader,
            self.sizes,
            self.true_plan,
            calibrated=Text(
                corpus.source_name(self.data),
                tokens=sum(int(mask_BS.sum()) for _, mask_BS in self.batches),
                sequence_length=self.calibration.sequence_length,
            ),
            distilled=Distilled(self.distillation.steps if has_steps else 0, errors),
            multiplexed=self._multiplexed_words() if self.is_multiplexed else None,
            measured=measured,
            unmeasured=UNMEASURED if measured is None else None,
        )

    def _multiplexed_words(self) -> str:
        """Say by which words of the release of 2025 the student was made."""
        merge = merge_of(self.grouping, self.factoring)
        if self.grouping.progressive:
            grouped = f"halved again and again by outputs with merge {merge}"
        else:
            grouped = f"grouping {self.grouping.grouping}, merge {merge}"
        return f"{grouped}, adapters {self.size.mixture or 'mixture'}"

    def measure(self, directory: Path | None = None) -> Measured | None:
        """Measure the student in ``directory`` against the teacher on the held-out text.

        ``directory`` is a stage's, by default distillation's. None where no text is held out.
        """
        directory = directory or self.distilled_directory
        if self.held_out is None:
            return None
        stage = STAGE_OF[directory.name.split("-")[0]]
        name = "one-shot" if directory == self.factors_directory else "distilled"

        def student(layer: int) -> torch.nn.Module:
            # As the checkpoint stores it, and then as the rest of the model computes.
            return self.student(layer, directory, stage).to(self.stored).to(self.dtype).eval()

        with self.suited_threads():
            return measure_student(
                self.teacher,
                student,
                self.held_out,
                name,
                teacher_directory=self.held_out_directory(self.held_out),
                directory=self.measured_directory(directory, self.held_out),
            )

    def errors(self, directory: Path | None = None) -> dict[int, dict[str, float]]:
        """Return every layer's relative error ``before`` and ``after`` distillation.

        ``directory`` is where a stage left them, by default distillation.
        """
        directory = directory or self.distilled_directory
        paths = {layer: directory / layer_file(layer, "json") for layer in self.reader.shape.layers}
        return {layer: artifacts.read_json(p) for layer, p in paths.items() if p.exists()}

    def forget(self) -> None:
        """Remove what earlier runs of this very job left."""
        for directory in self._directories():
            shutil.rmtree(directory, ignore_errors=True)

    def _directories(self) -> list[Path]:
        """Return where this job leaves its artifacts."""
        found = [
            self.store.directory,
            *([self.sensitivity_directory] if self.sensitivity_directory else []),
            self.energies_directory if self.uses_neurons else self.groups_directory,
            self.factors_directory,
            self.distilled_directory,
            *self._measured_directories(),
        ]
        return list(dict.fromkeys(found))

    def _measured_directories(self) -> list[Path]:
        if self.held_out is None:
            return []
        return [
            self.held_out_directory(self.held_out),
            self.measured_directory(self.distilled_directory, self.held_out),
        ]

    # What the stages work on.

    def experts(self, layer: int) -> Experts:
        """Read one layer's routed experts, on the device and in the stored dtype.

        Meanwhile those of the next layer are read from the disk into the system's cache.
        """
        gate_up_EFD, down_EDF, biases = self.reader.read_experts(layer, device=self.device)
        following = next((n for n in self.reader.shape.layers if n > layer), None)
        if following is not None:
            self.reader.read_ahead(following, outside=False)
        return Experts(gate_up_EFD, down_EDF, self.gating(layer), biases)

    def gating(self, layer: int) -> Gating:
        """Return what joins gate and up in a layer's routed experts."""
        family = self.reader.family
        native = self.teacher.layers[layer].get_submodule(
            f"{family.moe_name}.{family.experts_name}"
        )
        return gating_of(native, family.gating(self.reader.config))

    def call(self, layer: int) -> ExpertsCall:
        """Read all that one layer's experts received and returned, on the device."""
        self._calibrated(layer)
        return self.store.all_calls(layer).to(self.device)

    def student(self, layer: int, directory: Path, stage: str) -> torch.nn.Module:
        """Make one layer's fused module in fp32 with the weights that ``stage`` left."""
        path = self._artifact(directory, layer, "safetensors", stage)
        student = make_experts(
            self.reader.shape, self.true_plan.layers[layer], self.device, self.gating(layer)
        )
        student.load_state_dict(artifacts.read_tensors(path))
        return student

    def _calibrated(self, layer: int) -> Any:
        if not self.store.layer(layer).is_dir():
            raise _missing("calibrate", self.work)
        return self.store.statistics(layer)

    def _artifact(self, directory: Path, layer: int, suffix: str, stage: str) -> Path:
        path = directory / layer_file(layer, suffix)
        if not path.exists():
            raise _missing(stage, self.work)
        return path

    def _todo(
        self, directory: Path, suffix: str, description: str | None
    ) -> Iterator[tuple[int, Path]]:
        """Yield the layers whose artifact is not there yet, with its path."""
        artifacts.remove_leftovers(directory)
        paths = {n: directory / layer_file(n, suffix) for n in self.reader.shape.layers}
        missing = [(layer, path) for layer, path in paths.items() if not path.exists()]
        yield from track(missing, description) if description and missing else missing


JobFor = Callable[[Mapping[str, Any]], Job]
"""Makes a job of one checkpoint with these settings beside those that all its jobs share."""


def jobs_of(
    checkpoint: str | Path,
    work: Path,
    values: Mapping[str, Any],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> JobFor:
    """Return what makes jobs of ``checkpoint`` that share ``work`` and the settings ``values``."""

    def job_for(more: Mapping[str, Any]) -> Job:
        return Job(
            checkpoint,
            work,
            {**values, **more},
            revision=revision,
            trust_remote_code=trust_remote_code,
        )

    return job_for


def _check_room(place: Path, needed: float, what: str, advice: str) -> None:
    """Raise ``UserError`` unless ``needed`` bytes are free where ``place`` is or will be."""
    free = shutil.disk_usage(existing_parent(place)).free
    if needed > free:
        raise UserError(
            f"Too little disk: {what} needs about {needed / 1e9:.2f} GB at {place}, where "
            f"{free / 1e9:.2f} GB are free; {advice}"
        )


def _missing(stage: str, work: Path) -> UserError:
    return UserError(
        f"{work} has no artifacts of '{stage}' for these settings; run 'moefuse {stage}' with the "
        "same settings first, or 'moefuse fuse', which runs every stage."
    )


@dataclass(frozen=True)
class FuseResult:
    """What ``fuse`` made: where, how large, how true to the teacher, at what cost.

    ``errors`` are each layer's relative errors before and after distillation, ``seconds`` the wall
    time of this run, ``waited_seconds`` how much of it passed in waiting for the checkpoint's disk,
    ``peak_bytes`` the peak resident memory of this process, ``peak_device_bytes`` the most that
    tensors took on the GPU, None without one.
    """

    out: Path
    plan: Plan
    errors: dict[int, dict[str, float]]
    seconds: float
    peak_bytes: int
    waited_seconds: float
    peak_device_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def fuse(
    checkpoint: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    *,
    work: str | Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    elsewhere: Elsewhere | None = None,
) -> FuseResult:
    """Run the whole job on ``checkpoint`` and write the student to ``out``.

    ``values`` are settings by name (see ``config``). Artifacts lie in ``work``; without one they
    lie beside ``out`` and are removed at the end. The same call after an interruption goes on from
    the last finished layer and gives the same bytes. Layers are made ``elsewhere`` where that is
    given. Raises ``UserError`` for bad input before any expensive work starts.
    """
    start, out = time.monotonic(), Path(out)
    check_new(out)
    own_work = out.with_name(out.name + ".work")
    if work is None:
        check_own(own_work, OWN_ENTRIES)
    place = own_work if work is None else Path(work)
    # An interrupted run of the same job may have written its output and not yet cleaned up.
    if not place.exists():
        check_output(out, overwrite=overwrite)
    job = Job(
        checkpoint,
        place,
        values,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    job.elsewhere = elsewhere
    job.check_apart(out)
    finished = resume and _is_output_of(out, job)
    if not finished:
        check_output(out, overwrite=overwrite)
        job.preflight(out)
        if elsewhere is not None:
            elsewhere.check(job)
        if not resume:
            job.forget()
        for stage in (job.calibrate, job.group, job.factor, job.distill):
            stage()
        job.assemble(out)
    artifacts.remove_replaced(out)
    result = FuseResult(
        out,
        job.true_plan,
        job.errors(),
        seconds=time.monotonic() - start,
        peak_bytes=peak_memory(),
        waited_seconds=job.reader.waited_seconds,
        peak_device_bytes=peak_device_memory(job.device),
    )
    if work is None:
        shutil.rmtree(own_work)
    return result


def _is_output_of(out: Path, job: Job) -> bool:
    """Say whether ``out`` is what this very job writes."""
    path = out / "config.json"
    if not (job.work.exists() and path.is_file()):
        return False
    try:
        return artifacts.read_json(path)["moefuse"]["job"] == job.output_mark
    except (ValueError, KeyError, TypeError):
        return False


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(device: str) -> int | None:
    """Return the most bytes that tensors have taken on a GPU so far; None for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None
