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
from moefuse.checkpoint.streaming import StreamedTeacher, without_padding
from moefuse.console import say, track
from moefuse.errors import UserError
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics

MEMORY_BYTES = 1_000_000_000

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
    first = last + 1 if finished else _first_unfinished(store, last)
    artifacts.remove_leftovers(store.directory)
    # An interruption may have come between the next layer's input and the removal of this one's.
    for layer in range(1, first):
        shutil.rmtree(store.hidden(layer), ignore_errors=True)
    if finished:
        return
    passed = _PassedOn(store, first)
    while passed.layer <= last:
        with teacher.loaded(passed.layer) as module:
            if passed.layer in moe_layers:
                _record_layer(teacher, module, batches, store, passed)
            else:
                _run_layer(teacher, module, batches, passed)
        passed.advance(needed=passed.layer < last)


def _first_unfinished(store: CalibrationStore, last: int) -> int:
    """Find where to go on: the latest layer whose input is on disk, or the first of all."""
    return max((n for n in range(1, last + 1) if store.hidden(n).is_dir()), default=0)


class _PassedOn:
    """The hidden states between two layers: on disk always, in memory while they are small."""

    def __init__(self, store: CalibrationStore, layer: int) -> None:
        self.store = store
        self.layer = layer
        self.kept: dict[int, Tensor] = {}
        self._start_output()

    def _start_output(self) -> None:
        self.partial = artifacts.partial_directory(self.store.hidden(self.layer + 1))
        self.coming: dict[int, Tensor] = {}
        self.room = MEMORY_BYTES

    def read(self, number: int) -> Tensor | None:
        """Return what enters the layer for one batch, or None before the first layer."""
        if self.layer == 0:
            return None
        if number in self.kept:
            return self.kept[number]
        return artifacts.read_tensors(self.store.hidden(self.layer) / _batch_file(number))["hidden"]

    def write(self, number: int, hidden_BSD: Tensor) -> None:
        """Keep what leaves the layer for one batch."""
        artifacts.write_tensors(self.partial / _batch_file(number), {"hidden": hidden_BSD})
        self.room -= hidden_BSD.nbytes
        if self.room >= 0:
            self.coming[number] = hidden_BSD.cpu()

    def advance(self, *, needed: bool) -> None:
        """Go to the next layer: its input appears whole, that of this one is removed."""
        if needed:
            artifacts.finish_directory(self.partial, self.store.hidden(self.layer + 1))
        else:
            shutil.rmtree(self.partial)
        shutil.rmtree(self.store.hidden(self.layer), ignore_errors=True)
        self.kept = self.coming
        self.layer += 1
        if needed:
            self._start_output()


def _batch_file(number: int) -> str:
    return f"batch-{number:05d}.safetensors"


def _run_layer(
    teacher: StreamedTeacher,
    module: nn.Module,
    batches: list[Batch],
    passed: _PassedOn,
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
    passed: _PassedOn,
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
        artifacts.write_tensors(partial / _batch_file(number), vars(call))

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
    """Return the routed experts of a loaded decoder layer, without copying them."""
    family = teacher.reader.family
    native = module.get_submodule(f"{family.moe_name}.{family.experts_name}")
    return Experts(native.gate_up_proj.data, native.down_proj.data, native.act_fn)  # type: ignore
