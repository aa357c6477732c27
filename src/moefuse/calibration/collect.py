"""Calibrate: what every MoE layer of the teacher receives and returns, kept once on disk.

The teacher is streamed (see ``checkpoint.streaming``). Each layer leaves a directory with one file
per batch and one of statistics; the directory appears whole, by a rename. What is passed on to the
next layer is written too, so that an interrupted run goes on from the last finished layer, and is
kept in memory besides as long as it is small.

Everything here is independent of how many groups or what rank a student will have: calibrate once,
fuse to many sizes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moefuse import artifacts
from moefuse.checkpoint.passing import PassedOn, batch_file, first_unfinished
from moefuse.checkpoint.streaming import StreamedTeacher, without_padding
from moefuse.console import say, track
from moefuse.errors import UserError
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics
from moefuse.modeling.native import experts_of

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CalibrationStore:
    """The artifacts of a calibration: ``directory/layer-003/{batch-00000,statistics}``."""

    directory: Path

    def layer(self, layer: int) -> Path:
        """Return the directory of one MoE layer."""
        return self.directory / f"layer-{layer:03d}"

    def hidden(self, layer: int) -> Path:
        """Return the directory of what enters a decoder layer."""
        return self.directory / f"hidden-{layer:03d}"

    def statistics(self, layer: int) -> LayerStatistics:
        """Read one layer's statistics."""
        path = self.layer(layer) / "statistics.safetensors"
        return LayerStatistics.from_tensors(artifacts.read_tensors(path))

    def calls(self, layer: int) -> Iterator[ExpertsCall]:
        """Yield the recorded calls of one layer, a batch at a time."""
        for path in sorted(self.layer(layer).glob("batch-*.safetensors")):
            yield ExpertsCall(**artifacts.read_tensors(path))

    def all_calls(self, layer: int) -> ExpertsCall:
        """Read every recorded token of one layer into memory."""
        return ExpertsCall.joined(list(self.calls(layer)))

    def sample(self, layer: int, tokens: int) -> ExpertsCall:
        """Read the first ``tokens`` recorded tokens of one layer, or all where there are fewer."""
        taken: list[ExpertsCall] = []
        for call in self.calls(layer):
            taken.append(call)
            if sum(len(part.x_TD) for part in taken) >= tokens:
                break
        return ExpertsCall.joined(taken).rows(slice(0, tokens))


def collect(teacher: StreamedTeacher, batches: list[Batch], store: CalibrationStore) -> None:
    """Pass all batches through the teacher and leave every MoE layer's artifacts in ``store``.

    ``batches`` are pairs (input ids, attention mask), each (B, S) int64. Layers whose artifacts are
    complete are not run again.
    """
    moe_layers = teacher.reader.shape.layers
    last = max(moe_layers)
    finished = all(store.layer(layer).is_dir() for layer in moe_layers)
    first = last + 1 if finished else first_unfinished(store.hidden, last)
    artifacts.remove_leftovers(store.directory)
    # An interruption may have come between the next layer's input and the removal of this one's.
    for layer in range(1, first):
        shutil.rmtree(store.hidden(layer), ignore_errors=True)
    if finished:
        return
    passed = PassedOn(store.hidden, first)
    while passed.layer <= last:
        with teacher.loaded(passed.layer) as module:
            if passed.layer in moe_layers:
                _record_layer(teacher, module, batches, store, passed)
            else:
                _run_layer(teacher, module, batches, passed)
        passed.advance(needed=passed.layer < last)


def _run_layer(
    teacher: StreamedTeacher,
    module: nn.Module,
    batches: list[Batch],
    passed: PassedOn,
    heard: Callable[[int], None] | None = None,
) -> None:
    """Pass every batch through one loaded layer; ``heard(number)`` is called after each."""
    for number, batch in enumerate(track(batches, f"Calibrate layer {passed.layer}")):
        embedded_BSD, received = teacher.embed(*batch)
        entering = passed.read(number)
        hidden_BSD = embedded_BSD if entering is None else entering
        passed.write(number, teacher.forward_layer(module, hidden_BSD, received[passed.layer]))
        if heard is not None:
            heard(number)


def _record_layer(
    teacher: StreamedTeacher,
    module: nn.Module,
    batches: list[Batch],
    store: CalibrationStore,
    passed: PassedOn,
) -> None:
    """Run one MoE layer and leave what its experts received and returned, with statistics."""
    shape = teacher.reader.shape
    statistics = LayerStatistics.empty(shape.experts, shape.hidden)
    experts = layer_experts(teacher, module)
    partial = artifacts.partial_directory(store.layer(passed.layer))
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def heard(number: int) -> None:
        call = without_padding(calls.pop(), batches[number][1])
        _check_finite(call, passed.layer)
        statistics.add(call, experts)
        artifacts.write_tensors(partial / batch_file(number), vars(call))

    with teacher.listening(module, lambda *call: calls.append(call)):
        _run_layer(teacher, module, batches, passed, heard)
    artifacts.write_tensors(partial / "statistics.safetensors", statistics.tensors())
    if statistics.never_routed:
        say(
            f"Layer {passed.layer}: no calibration token chose experts {statistics.never_routed}; "
            "nothing is known of what they add."
        )
    artifacts.finish_directory(partial, store.layer(passed.layer))


def _check_finite(call: ExpertsCall, layer: int) -> None:
    for tensor in (call.x_TD, call.y_TD):
        if not bool(torch.isfinite(tensor).all()):
            name = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"Layer {layer} of the teacher computes NaN or infinity in {name}; choose another "
                "--dtype, such as float32."
            )


def layer_experts(teacher: StreamedTeacher, module: nn.Module) -> Experts:
    """Return the routed experts of a loaded decoder layer."""
    family = teacher.reader.family
    native = module.get_submodule(f"{family.moe_name}.{family.experts_name}")
    return experts_of(native, family, teacher.reader.config)
