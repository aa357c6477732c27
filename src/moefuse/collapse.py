"""Collapse: a student as a plain model of its teacher's architecture, one expert for each group.

Any engine that runs the teacher's family runs it unmodified, at the price of what told the members
of a group apart. The fused student is streamed as the teacher of this one (``StudentReader``): each
layer begins at the mean of its groups' members, router and experts learn what the fused layer
returns on what arrives through the layers below, and on request the whole is healed against the
student. What is lost is measured: KL both ways on held-out text.
"""

import shutil
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefuse import artifacts, corpus
from moefuse.checkpoint.native import Weights, from_native
from moefuse.checkpoint.passed import OnDisk
from moefuse.checkpoint.reader import fingerprint_of
from moefuse.checkpoint.streaming import native_model
from moefuse.config import (
    CollapseConfig,
    ComputeConfig,
    DistillConfig,
    HealConfig,
    build,
    parse_bytes,
    parse_count,
)
from moefuse.console import say, track
from moefuse.devices import choose_device, choose_dtype, suited_threads
from moefuse.distillation.collapsed import CollapsedLayer, begin, fit_router, routed_mass
from moefuse.distillation.loop import distill_layer
from moefuse.distillation.own_inputs import OwnInputs
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_model, load_tokenizer, pad_id
from moefuse.evaluation.quality import Quality, evaluate
from moefuse.evaluation.report import machine_meta, report_json
from moefuse.evaluation.rows import Row
from moefuse.evaluation.streamed import HeldOut, pass_through, remembered
from moefuse.export.plain import write_plain
from moefuse.export.plain_card import plain_card
from moefuse.export.streamed_student import stream
from moefuse.export.student_reader import StudentReader
from moefuse.families import Family
from moefuse.heal import heal_in_place
from moefuse.healing.text import PackedText, pack
from moefuse.measuring import read_held_out
from moefuse.modeling.modeling_moefuse import FusedExperts
from moefuse.places import check_new, check_output, check_outside, check_own, size_of

STAGES = (ComputeConfig, CollapseConfig)
REPORT = "collapse.json"
OWN_ENTRIES = ("collapse-",)
FUSED, COLLAPSED = "fused", "collapsed"
WHAT = (
    "A plain model of the architecture of {base}, with {groups} routed experts a layer, made of "
    "the fused student {student}: each group of its experts became one, and a router of as many "
    "ways was learnt. It takes {bytes}, the student {student_bytes}, whose deltas for every "
    "original expert it does not have."
)


@dataclass(frozen=True)
class Loss:
    """What a stage of the plain model loses against the fused student, on held-out text.

    ``kl`` is KL(fused || plain), ``reverse_kl`` KL(plain || fused), both means in nats per token;
    ``agreement`` the share of tokens whose likeliest word is the same.
    """

    stage: str
    tokens: int
    kl: float
    reverse_kl: float
    agreement: float
    cross_entropy: float
    fused_cross_entropy: float


@dataclass(frozen=True)
class CollapseResult:
    """Where the plain model is, its layers' relative errors, what it loses; seconds of this run."""

    out: Path
    groups: int
    top_k: int
    bytes: int
    student_bytes: int
    errors: dict[int, dict[str, float]]
    losses: list[Loss]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


class CollapseJob:
    """One collapse: what goes in, checked before any work, and what is made of it."""

    def __init__(
        self,
        student: Path,
        out: Path,
        values: Mapping[str, Any],
        healing: Mapping[str, Any] | None,
    ) -> None:
        self.compute, self.options = build(ComputeConfig, values), build(CollapseConfig, values)
        self.max_shard_bytes = parse_bytes(self.options.max_shard, "--max-shard")
        self.reader = StudentReader.of(student, exactly=False)
        self.groups = collapsible_groups(self.reader)
        check_outside(out, self.reader.directory, "output")
        self.config = self.reader.family.with_fewer_experts(self.reader.config, self.groups)
        self.device = choose_device(self.compute.device)
        self.dtype = choose_dtype(self.compute.dtype, self.reader.dtype, self.device)
        if self.options.data is None:
            raise UserError(
                "Say with --data what text to distil on: a file, a folder, JSONL with text or "
                "messages, or a hub data set."
            )
        self.tokenizer = load_tokenizer(student)
        self.healing = None if healing is None else self._healing(healing)
        self.batches = self._batches()
        self.held_out = self._held_out()
        self.teacher = stream(self.reader, device=self.device, dtype=self.dtype)
        shape = self.reader.shape
        self.threads = lambda: suited_threads(shape.hidden, shape.intermediate)
        self.work = out.with_name(out.name + ".work")
        self.directory = self.work / f"collapse-{self.mark}"

    def _healing(self, healing: Mapping[str, Any]) -> HealConfig:
        values = {"data": self.options.data, "sequence_length": self.options.sequence_length}
        return build(HealConfig, {**values, **healing})

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        options = self.options
        return corpus.read_batches(
            str(options.data),
            self.tokenizer,
            sequence_length=options.sequence_length,
            tokens=options.tokens,
            batch_size=options.batch_size,
            vocabulary=self.reader.config["vocab_size"],
            source=self.reader.source,
        )

    def _held_out(self) -> HeldOut | None:
        options = self.options
        if options.held_out is None:
            return None
        return read_held_out(
            options.held_out, self.tokenizer, options.sequence_length, options.held_out_tokens
        )

    @cached_property
    def mark(self) -> str:
        """What tells this job's layers from others'."""
        options = {
            key: value
            for key, value in asdict(self.options).items()
            if key not in ("data", "held_out", "held_out_tokens", "max_shard")
        }
        tokens = [[ids.tolist(), mask.sum(1).tolist()] for ids, mask in self.batches]
        student = fingerprint_of(self.reader.directory, self.reader.config, self.reader.tensors)
        place = [self.compute.seed, self.device.split(":")[0], str(self.dtype)]
        return artifacts.fingerprint([student, options, tokens, place])

    # Making the layers.

    def make_layers(self) -> None:
        """Make whatever layers are not there yet, each above those below it."""
        layers = self.reader.shape.layers
        artifacts.remove_leftovers(self.directory)
        if all(self.path(layer).exists() for layer in layers):
            return
        passed = OnDisk(self.directory / "passed")
        if any(not self.path(layer).exists() for layer in layers if layer < passed.layer):
            passed.restart()
        own = OwnInputs(self.teacher, self.batches, passed)
        for layer in layers:
            if layer < passed.layer:
                continue
            with self.threads():
                call = own.call(layer)
                if not self.path(layer).exists():
                    self._make(layer, call)
                if layer != layers[-1]:
                    own.take(self.student(layer).float())
        passed.remove()

    def _make(self, layer: int, call: Any) -> None:
        module, options = self.empty_layer(layer), self.options
        weights = self.reader.read_experts(layer, device=self.device)
        group_E = self.group_of_expert(layer).to(self.device)
        mass_E = routed_mass(call, self.reader.shape.experts)
        begin(module, self.router(layer), weights, group_E, mass_E)
        fit_router(
            module,
            call,
            group_E,
            steps=options.router_steps,
            batch_tokens=options.batch_tokens,
            seed=self.compute.seed + layer,
            progress=lambda steps: track(steps, f"Router of layer {layer}"),
        )
        distilling = {
            name: getattr(options, name) for name in ("steps", "batch_tokens", "learning_rate")
        }
        result = distill_layer(
            module,
            call,
            build(DistillConfig, distilling),
            seed=self.compute.seed + layer,
            progress=lambda steps: track(steps, f"Distil layer {layer}"),
        )
        say(f"Layer {layer}: relative error {result.before:.4f}, now {result.after:.4f}")
        path = self.path(layer)
        errors = {"before": result.before, "after": result.after}
        artifacts.write_json(path.with_suffix(".json"), errors)
        artifacts.write_tensors(path, module.block.state_dict())

    def path(self, layer: int) -> Path:
        """Return where a layer's block is kept."""
        return self.directory / f"layer-{layer:03d}.safetensors"

    def empty_layer(self, layer: int) -> CollapsedLayer:
        """Build a layer without weights."""
        family = self.reader.family
        block = self.plain_model.get_submodule(family.moe_path(layer))
        return CollapsedLayer(deepcopy(block), family)

    @cached_property
    def plain_model(self) -> Any:
        """The plain model on the meta device, from which layers are copied."""
        return native_model(self.reader.family, self.config)

    def group_of_expert(self, layer: int) -> Tensor:
        """Read which group each expert of a layer belongs to, (E,) int64; groups without a member
        must not be."""
        module = self.reader.module(layer)
        assert isinstance(module, FusedExperts)
        return module.group_of_expert.long()

    def router(self, layer: int) -> dict[str, Tensor]:
        """Read the student's router of a layer by the names in its module."""
        family = self.reader.family
        prefix = f"{family.moe_name}.{family.router_name}."
        tensors = self.reader.read_layer(layer, experts=False)
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }

    def student(self, layer: int) -> CollapsedLayer:
        """Make a layer with what was learnt, as it is stored, in the dtype that is computed in."""
        module = self.empty_layer(layer)
        module.block.to_empty(device=self.device)
        module.block.load_state_dict(self.stored(layer))
        return module.to(self.dtype)

    def stored(self, layer: int) -> dict[str, Tensor]:
        """Read what was learnt of a layer, rounded to the dtypes that it is stored in."""
        router = self.router(layer)
        family = self.reader.family
        state = artifacts.read_tensors(self.path(layer))
        prefix = f"{family.router_name}."
        return {
            name: tensor.to(
                router[name.removeprefix(prefix)].dtype
                if name.startswith(prefix)
                else self.reader.dtype
            )
            for name, tensor in state.items()
        }

    # Measuring and writing.

    def measure(self) -> list[Loss]:
        """Measure layer by layer what the plain model loses; nothing without held-out text."""
        held_out = self.held_out
        if held_out is None:
            return []
        places = [self.directory / f"passed-{name}" for name in (FUSED, COLLAPSED)]
        with self.threads():
            passed = pass_through(
                self.teacher, held_out, places[1], "Measure the plain model", self.student
            )
            with remembered(self.teacher, held_out, places[0]) as fused:
                collapsed = replace(fused, passed=passed)
                size = held_out.batch_size(self.reader.config["vocab_size"])
                loss = both_ways("distilled", fused, collapsed, held_out, size, self.teacher.device)
        return [loss]

    def write(self, out: Path, errors: Mapping[int, Any], losses: list[Loss]) -> None:
        """Write the plain checkpoint out of the layers."""
        family = self.reader.family
        states: dict[int, dict[str, Tensor]] = {}

        def of(layer: int) -> dict[str, Tensor]:
            if layer not in states:
                states.clear()
                states[layer] = self.stored(layer)
            return states[layer]

        def change(name: str, tensor: Tensor) -> Tensor:
            layer = family.layer_of(name)
            if layer is None or layer not in self.reader.shape.layers:
                return tensor
            return of(layer).get(name.removeprefix(f"{family.moe_path(layer)}."), tensor)

        def experts(layer: int) -> Weights:
            return _below(of(layer), f"{family.experts_name}.", family)

        self._write(out, change, experts, errors, losses)

    def write_model(
        self, out: Path, state: Mapping[str, Tensor], errors: Mapping[int, Any], losses: list[Loss]
    ) -> None:
        """Write the plain checkpoint out of a whole model's ``state``."""
        family = self.reader.family

        def change(name: str, tensor: Tensor) -> Tensor:
            return state[name].detach().to("cpu", tensor.dtype)

        def experts(layer: int) -> Weights:
            path = f"{family.experts_path(layer)}."
            found = {name: tensor for name, tensor in state.items() if name.startswith(path)}
            stored = {n: t.detach().to("cpu", self.reader.dtype) for n, t in found.items()}
            return _below(stored, path, family)

        self._write(out, change, experts, errors, losses)

    def _write(
        self, out: Path, change: Any, experts: Any, errors: Mapping[int, Any], losses: list[Loss]
    ) -> None:
        meta = {
            **machine_meta(
                "moefuse collapse",
                device=self.device,
                data=None if self.held_out is None else self.held_out.to_json(),
            ),
            "errors": {str(layer): error for layer, error in errors.items()},
            "losses": [asdict(loss) for loss in losses],
        }
        rows = [
            Row(
                method=COLLAPSED,
                groups=self.groups,
                stage=loss.stage,
                tokens=loss.tokens,
                kl=loss.kl,
                cross_entropy=loss.cross_entropy,
                agreement=loss.agreement,
            )
            for loss in losses
        ]
        write_plain(
            self.reader,
            self.config,
            experts,
            out,
            card=plain_card(
                out.name,
                self.reader,
                WHAT.replace("{groups}", str(self.groups)),
                student_bytes=self.reader.total_bytes,
                made_bytes=self.plain_bytes,
                sections=lost(losses),
            ),
            description="Write",
            change=change,
            max_shard_bytes=self.max_shard_bytes,
            beside={REPORT: report_json(meta, rows)},
        )

    @property
    def plain_bytes(self) -> int:
        """Bytes of the plain model's tensors, all in the student's dtype."""
        state = self.plain_model.state_dict()
        return sum(tensor.numel() for tensor in state.values()) * self.reader.dtype.itemsize

    def errors(self) -> dict[int, dict[str, float]]:
        """Return every layer's relative error before and after distillation."""
        return {
            layer: artifacts.read_json(self.path(layer).with_suffix(".json"))
            for layer in self.reader.shape.layers
        }

    def heal(self, out: Path, losses: list[Loss]) -> list[Loss]:
        """Train the whole plain model against the student, in memory, and write it anew.

        Interrupted, the same job goes on from the last checkpoint of the training.
        """
        assert self.healing is not None
        self.write(self.directory / "unhealed", self.errors(), losses)
        model, _ = load_model(self.directory / "unhealed", dtype="float32", device=self.device)
        fused, _ = load_model(self.reader.directory, dtype="float32", device=self.device)
        text = pack(
            corpus.load_documents(str(self.healing.data)),
            self.tokenizer,
            self.healing.sequence_length,
            tokens=parse_count(self.healing.tokens, "--heal-tokens", of="tokens"),
            seed=self.compute.seed,
        )
        with self.threads():
            heal_in_place(
                model,
                fused,
                text,
                self.reader.family,
                self.healing,
                seed=self.compute.seed,
                device=self.device,
                directory=self.directory / f"healing-{_healing_mark(self.healing, text)}",
                description="Heal the plain model",
            )
            if self.held_out is not None:
                healed = both_ways(
                    "healed", fused, model, self.held_out, 8, self.device, pad_id(self.tokenizer)
                )
                losses = [*losses, healed]
        self.write_model(out, model.state_dict(), self.errors(), losses)
        return losses


def _healing_mark(options: HealConfig, text: PackedText) -> str:
    """Return what tells one healing from others of the same layers."""
    ignored = ("data", "report_to")
    settings = {name: value for name, value in asdict(options).items() if name not in ignored}
    return artifacts.fingerprint([settings, text.fingerprint()])


def _below(state: Mapping[str, Tensor], path: str, family: Family) -> Weights:
    """Return a native experts module's weights out of a state, by what its names start with."""
    names = [name for name in state if name.startswith(path)]
    native = {name.removeprefix(path): state[name] for name in names}
    return from_native(native, family.layout)


def collapsible_groups(reader: StudentReader) -> int:
    """Return how many experts a layer of the plain model has; raises ``UserError`` where a plain
    model of the family cannot be made of the student."""
    plans = reader.plans.values()
    if any(plan.neurons is not None for plan in plans):
        raise UserError(
            f"{reader.source} keeps neurons of each expert's own, so it has no groups to make one "
            "expert of; 'moefuse expand' writes it out, or fuse with --groups for 'collapse'."
        )
    groups = sorted({plan.groups for plan in plans})
    if len(groups) > 1:
        raise UserError(
            f"{reader.source} has {groups[0]} groups in one layer and {groups[-1]} in another, and "
            "a plain model has as many experts in every layer; fuse with --groups."
        )
    if groups[0] < 2:
        raise UserError(
            f"{reader.source} has one group a layer, and a model with one expert is a dense one, "
            "which its family is not; fuse to 2 groups or more, or use 'moefuse expand'."
        )
    return groups[0]


def both_ways(
    stage: str,
    fused: Any,
    plain: Any,
    held_out: HeldOut,
    batch_size: int,
    device: str | torch.device,
    padding: int = 0,
) -> Loss:
    """Measure how far two models are apart, seen from either; see ``Loss``."""

    def seen(judge: Any, judged: Mapping[str, Any]) -> dict[str, Quality]:
        return evaluate(
            judged,
            held_out.sequences,
            teacher=judge,
            documents=held_out.documents,
            batch_size=batch_size,
            pad_id=padding,
            device=device,
            description="Measure",
        )

    found = seen(fused, {FUSED: fused, COLLAPSED: plain})
    back = seen(plain, {FUSED: fused})[FUSED]
    forward = found[COLLAPSED]
    assert forward.kl is not None
    assert forward.agreement is not None
    assert back.kl is not None
    return Loss(
        stage,
        forward.tokens,
        kl=forward.kl,
        reverse_kl=back.kl,
        agreement=forward.agreement,
        cross_entropy=forward.cross_entropy,
        fused_cross_entropy=found[FUSED].cross_entropy,
    )


def lost(losses: list[Loss]) -> tuple[str, ...]:
    """Say what is lost against the fused student, as parts of a card."""
    if not losses:
        return ("What it loses against the fused student was not measured: no text was held out.",)
    head = (
        "| | KL(fused \\|\\| this) | KL(this \\|\\| fused) | same first choice | cross-entropy | "
        "the student's |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    rows = [
        f"| {x.stage} | {x.kl:.4f} | {x.reverse_kl:.4f} | {x.agreement:.1%} | "
        f"{x.cross_entropy:.4f} | {x.fused_cross_entropy:.4f} |"
        for x in losses
    ]
    told = f"What it loses against the fused student, on {losses[0].tokens:,} held-out tokens:"
    return (told, "\n".join([head, *rows]))


def collapse(
    student: str | Path,
    out: str | Path,
    values: Mapping[str, Any],
    *,
    healing: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> CollapseResult:
    """Make a plain model with one expert for each group of ``student``, written to ``out``.

    ``values`` are settings by name (see ``CollapseConfig``), ``healing`` those of healing the whole
    afterwards (see ``HealConfig``), None to leave it out. The same call after an interruption goes
    on from the last finished layer, or the last checkpoint of healing. Raises ``UserError`` before
    any work.
    """
    start, out = time.monotonic(), Path(out)
    check_new(out)
    check_output(out, overwrite=overwrite)
    check_own(out.with_name(out.name + ".work"), OWN_ENTRIES)
    job = CollapseJob(Path(student), out, values, healing)
    job.make_layers()
    losses = job.measure()
    if healing is None:
        job.write(out, job.errors(), losses)
    else:
        losses = job.heal(out, losses)
    result = CollapseResult(
        out,
        job.groups,
        job.config[job.reader.family.top_k_key],
        size_of(out),
        job.reader.total_bytes,
        job.errors(),
        losses,
        time.monotonic() - start,
    )
    shutil.rmtree(job.work)
    return result


def render_collapsed(result: CollapseResult) -> str:
    """Say in a few lines what was made, and what it lost."""
    told = [
        f"{result.groups} experts a layer, of which a token chooses {result.top_k}, in "
        f"{result.out} ({result.bytes / 1e6:.1f} MB; the fused student "
        f"{result.student_bytes / 1e6:.1f} MB; {result.seconds:.0f} s)."
    ]
    told += [
        f"  {loss.stage}: KL(fused || this) {loss.kl:.4f}, KL(this || fused) "
        f"{loss.reverse_kl:.4f}, same first choice {loss.agreement:.1%} on "
        f"{loss.tokens:,} held-out tokens"
        for loss in result.losses
    ]
    if not result.losses:
        told.append("  What it loses is not measured; give --held-out.")
    return "\n".join(told)
