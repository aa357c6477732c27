"""What a student's layer receives once the layers below it are students too, and what it should
make of that.

Distilled on the teacher's inputs, a layer never sees the errors of those below it, and nobody
mends them. Here text passes through the decoder layers twice, once as the teacher's and once as the
student's hidden states, one layer in memory at a time. With f the teacher's routed experts, x what
the student's layer receives, and t and s what leaves the decoder layer on the teacher's and on the
student's path while it still has the teacher's experts, a student is distilled to return::

    f(x) + share * (t - s)

The first term asks to compute what the teacher would have computed; the second, to steer what is
passed on back to the teacher's. ``CORRECTED``, half of it, did better than none and than all
(docs/research.md). Layers must then be distilled in order.

Shape suffixes: B sequences, S positions, D hidden width, T = B * S, N tokens of the text among
them, K experts chosen per token.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moefuse.checkpoint.passed import States
from moefuse.checkpoint.streaming import StreamedTeacher, without_padding
from moefuse.console import track
from moefuse.mathematics.experts import ExpertsCall
from moefuse.mathematics.losses import student_output

CORRECTED = 0.5
"""Share of the distance to the teacher's path that a layer's target makes up for."""

Batch = tuple[Tensor, Tensor]
Heard = tuple[Tensor, Tensor, Tensor, Tensor]
Pair = States
"""``teacher`` and ``student``: hidden states of one batch on either path, (B, S, D)."""


class Passed(Protocol):
    """Where the hidden states between two decoder layers are kept, a pair a batch."""

    layer: int
    """The decoder layer that they enter."""

    def entering(self, number: int) -> Pair:
        """Return a batch that enters the layer; only where ``layer`` is not 0."""
        ...

    def leave(self, number: int, pair: Pair) -> None:
        """Keep a batch that leaves the layer, in the place of what was kept of it before."""
        ...

    def leaving(self, number: int) -> Pair:
        """Return a batch that leaves the layer."""
        ...

    def advance(self) -> None:
        """Go to the next layer: what left this one enters it."""
        ...


class InMemory:
    """Hidden states in memory, for models that are small."""

    def __init__(self) -> None:
        self.layer = 0
        self._entering: dict[int, Pair] = {}
        self._leaving: dict[int, Pair] = {}

    def entering(self, number: int) -> Pair:
        """Return a batch that enters the layer."""
        return self._entering[number]

    def leave(self, number: int, pair: Pair) -> None:
        """Keep a batch that leaves the layer."""
        self._leaving[number] = pair

    def leaving(self, number: int) -> Pair:
        """Return a batch that leaves the layer."""
        return self._leaving[number]

    def advance(self) -> None:
        """Go to the next layer."""
        self._entering, self._leaving = self._leaving, {}
        self.layer += 1


class OwnInputs:
    """Both paths through the model, layer after layer, with the students made so far.

    For every MoE layer in order: ``call(layer)``, then ``take(student)`` with what was made of it.
    ``batches`` are pairs (input ids, attention mask), each (B, S) int64.
    """

    def __init__(self, teacher: StreamedTeacher, batches: list[Batch], passed: Passed) -> None:
        self.teacher, self.batches, self.passed = teacher, batches, passed
        self._first = min(teacher.reader.shape.layers)
        self._scale = teacher.reader.family.experts_scale(teacher.reader.config)
        self._call: ExpertsCall | None = None

    def call(self, layer: int) -> ExpertsCall:
        """Return what the student's ``layer`` receives, and as ``y_TD`` what it should return.

        All tokens of the text, floats in fp32 on the teacher's device. Layers come in order.
        """
        while self.passed.layer < layer:
            self._through(has_experts=False)
            self.passed.advance()
        assert self.passed.layer == layer
        call = ExpertsCall.joined(self._through(has_experts=True))
        self._call = call.to(self.teacher.device)
        return self._call

    @torch.no_grad()
    def take(self, student: nn.Module) -> None:
        """Pass on what ``student``, fp32, returns in the place of the layer called last."""
        assert self._call is not None
        start = 0
        for number, (_, mask_BS) in enumerate(self.batches):
            stop = start + int(mask_BS.sum())
            output_ND = student_output(student, self._call.rows(slice(start, stop)))
            output_ND = output_ND * self._scale
            pair = self.passed.leaving(number)
            hidden_BSD = pair["student"].clone()
            kept_BS = mask_BS.bool().to(hidden_BSD.device)
            hidden_BSD[kept_BS] += output_ND.to(hidden_BSD.device)
            self.passed.leave(number, {**pair, "student": hidden_BSD.to(pair["teacher"].dtype)})
            start = stop
        self._call = None
        self.passed.advance()

    def _through(self, *, has_experts: bool) -> list[ExpertsCall]:
        """Pass all batches on both paths through the layer that they enter.

        A layer with routed experts leaves the student's path without what these add, and what they
        received and should return is returned, a call a batch.
        """
        layer, calls = self.passed.layer, []
        with self.teacher.loaded(layer) as module:
            for number, batch in enumerate(track(self.batches, f"Own inputs of layer {layer}")):
                hidden_BSD, received = self.teacher.embed(*batch)
                alike = {"teacher": hidden_BSD, "student": hidden_BSD}
                pair = self.passed.entering(number) if layer else alike
                left, heard = self._both(module, pair, received[layer], has_experts=has_experts)
                if heard is not None:
                    call = without_padding(heard, batch[1])
                    call = _target(call, left, batch[1], self._scale)
                    left["student"] = _without_experts(left["student"], heard[3], self._scale)
                    calls.append(call)
                self.passed.leave(number, left)
        return calls

    def _both(
        self, module: nn.Module, pair: Pair, received: dict[str, Any], *, has_experts: bool
    ) -> tuple[Pair, Heard | None]:
        """Return what leaves the teacher's layer on both paths, and what its experts were called
        with on the student's and returned."""
        heard: list[Heard] = []
        listening = self.teacher.listening(module, lambda *call: heard.append(call))
        with listening if has_experts else nullcontext():
            student_BSD = self.teacher.forward_layer(module, pair["student"], received)
        teacher_BSD = student_BSD.clone()
        if self.passed.layer > self._first:
            teacher_BSD = self.teacher.forward_layer(module, pair["teacher"], received)
        return {"teacher": teacher_BSD, "student": student_BSD}, heard[0] if heard else None


def _target(call: ExpertsCall, left: Pair, mask_BS: Tensor, scale: float) -> ExpertsCall:
    """Add to what the experts returned a share of what the student's path has strayed."""
    kept_BS = mask_BS.bool().to(call.y_TD.device)
    strayed_ND = left["teacher"][kept_BS].float() - left["student"][kept_BS].float()
    return replace(call, y_TD=call.y_TD.float() + CORRECTED * strayed_ND / scale)


def _without_experts(hidden_BSD: Tensor, experts_TD: Tensor, scale: float) -> Tensor:
    """Take what the routed experts added from what leaves their layer; fp32, as it is small."""
    return hidden_BSD.float() - experts_TD.reshape(hidden_BSD.shape).float() * scale
