"""The loss of healing, a few tokens at a time.

With a vocabulary of 100,000 the logits of one batch in fp32 dwarf the model. So the student's head
is never applied to the whole batch: its hidden states are cut into chunks of tokens, each chunk's
logits are made, compared with the teacher's, turned into gradients and dropped. Only one chunk's
logits exist at a time. Tokens whose prediction does not count are left out before the head.

The loss is computed inside the student's own forward, in the place of its head. There the head's
weights are whole, however they are sharded between steps, and the loss is what the model returns,
which is what data parallel wrappers listen to.

Shape suffixes: B sequences, S positions, T tokens that count, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moefuse.config import HealConfig
from moefuse.mathematics.divergence import cross_entropy, forward_kl, reverse_kl
from moefuse.mathematics.truncated import TopLogits, truncated_kl

CHUNK_NUMBERS = 1 << 24
"""How many logits a chunk has at most; 64 MB of them in fp32."""


class Targets(Protocol):
    """What the teacher says about the tokens of one batch that count, in their order."""

    def losses(self, chunk: slice, student_TV: Tensor, options: HealConfig) -> Tensor:
        """Return the divergence of the student's logits at the tokens of ``chunk``: (T,) fp32."""
        ...


@dataclass(frozen=True)
class LiveTargets:
    """A live teacher's last hidden states at the tokens that count, (T, D), and its head."""

    hidden_TD: Tensor
    head: nn.Module
    scale: float = 1.0
    """What the family multiplies the head's output by."""

    def losses(self, chunk: slice, student_TV: Tensor, options: HealConfig) -> Tensor:
        """Return the divergence from the teacher's full distribution: (T,) fp32."""
        with torch.no_grad():
            teacher_TV = scaled(self.head(self.hidden_TD[chunk]), self.scale)
        total_T = torch.zeros(len(student_TV), device=student_TV.device)
        if options.forward_kl:
            kl_T = forward_kl(teacher_TV, student_TV, options.temperature)
            total_T = total_T + options.forward_kl * kl_T
        if options.reverse_kl:
            kl_T = reverse_kl(teacher_TV, student_TV, options.temperature)
            total_T = total_T + options.reverse_kl * kl_T
        return total_T


@dataclass(frozen=True)
class CachedTargets:
    """What a cache kept of the teacher's predictions at the tokens that count."""

    top: TopLogits

    def losses(self, chunk: slice, student_TV: Tensor, options: HealConfig) -> Tensor:
        """Return an unbiased estimate of the forward divergence: (T,) fp32."""
        return options.forward_kl * truncated_kl(self.top.rows(chunk), student_TV)


@dataclass(frozen=True)
class NoTargets:
    """No teacher's predictions."""

    def losses(self, chunk: slice, student_TV: Tensor, options: HealConfig) -> Tensor:  # noqa: ARG002
        """Return zeros: (T,) fp32."""
        return torch.zeros(len(student_TV), device=student_TV.device)


def scaled(logits: Tensor, scale: float) -> Tensor:
    """Return logits of any shape times ``scale``, themselves where that is 1."""
    return logits if scale == 1 else logits * scale


def chunked_loss(
    hidden_TD: Tensor,
    head: nn.Linear,
    targets: Targets,
    next_T: Tensor,
    options: HealConfig,
    scale: float = 1.0,
) -> Tensor:
    """Return the sum of all tokens' losses, a scalar, fp32, the logits of one chunk at a time.

    ``hidden_TD`` are the student's last hidden states at the tokens that count, ``head`` makes
    logits of them, which are multiplied by ``scale``, ``next_T`` (int64) are the tokens that
    follow.
    """

    def losses(chunk: slice, student_TV: Tensor) -> Tensor:
        student_TV = scaled(student_TV, scale)
        loss_T = targets.losses(chunk, student_TV, options)
        if options.cross_entropy:
            loss_T = loss_T + options.cross_entropy * cross_entropy(student_TV, next_T[chunk])
        return loss_T.sum()

    return _ChunkedLoss.apply(hidden_TD, head.weight, head.bias, losses)  # type: ignore[return-value]


class _ChunkedLoss(torch.autograd.Function):
    """The sum of ``losses(chunk, logits)`` over chunks, and its gradients, in one go.

    A chunk's gradients are added up as soon as its logits are there: the logits are made once, and
    the head's gradient is one matrix, where differentiating a chunk would make another each time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        losses: Callable[[slice, Tensor], Tensor],
    ) -> Tensor:
        learns = ctx.needs_input_grad
        found = _Gradients(hidden_TD, weight_VD, bias_V, learns)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        size = max(1, CHUNK_NUMBERS // len(weight_VD))
        for start in range(0, len(hidden_TD), size):
            chunk = slice(start, min(start + size, len(hidden_TD)))
            logits_TV = nn.functional.linear(hidden_TD[chunk], weight_VD, bias_V)
            if not any(learns[:3]):
                total += losses(chunk, logits_TV)
                continue
            with torch.enable_grad():
                logits_TV.requires_grad_()
                loss = losses(chunk, logits_TV)
            total += loss.detach()
            if loss.requires_grad:
                found.add(chunk, *torch.autograd.grad(loss, logits_TV))
        ctx.found = [found.hidden_TD, found.weight_VD, found.bias_V]
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place, and once: a second matrix as large as the head would be as much again.
        found, ctx.found = ctx.found, None
        for part in found:
            if part is not None:
                part.mul_(upstream[0].to(part.dtype))
        return (*found, None)


class _Gradients:
    """The gradients of hidden states, head and its bias, each where it is asked for, fp32."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, learns: Sequence[bool]
    ) -> None:
        def zeros(of: Tensor | None, is_wanted: bool) -> Tensor | None:
            return torch.zeros_like(of) if is_wanted and of is not None else None

        self.given = hidden_TD, weight_VD
        self.hidden_TD = zeros(hidden_TD, learns[0])
        self.weight_VD = zeros(weight_VD, learns[1])
        self.bias_V = zeros(bias_V, learns[2])

    def add(self, chunk: slice, gradient_TV: Tensor) -> None:
        """Add what a chunk's logits ask for."""
        hidden_TD, weight_VD = self.given
        if self.hidden_TD is not None:
            product_TD = gradient_TV.to(weight_VD.dtype) @ weight_VD
            self.hidden_TD[chunk] = product_TD.to(hidden_TD.dtype)
        if self.weight_VD is not None:
            with torch.autocast(gradient_TV.device.type, enabled=False):
                part_TD = hidden_TD[chunk].to(weight_VD.dtype)
                self.weight_VD.addmm_(gradient_TV.to(weight_VD.dtype).T, part_TD)
        if self.bias_V is not None:
            self.bias_V += gradient_TV.sum(0).to(self.bias_V.dtype)


@contextmanager
def losses_in_place_of_logits(
    head: nn.Module, compute: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Make ``head`` return ``compute(hidden_BSD)``, with a last axis of one, not logits."""
    own = head.__dict__.get("forward")

    def replaced(hidden_BSD: Tensor) -> Tensor:
        return compute(hidden_BSD).unsqueeze(-1)

    head.forward = replaced
    try:
        yield
    finally:
        if own is None:
            del head.forward  # the class's own shows again
        else:
            head.forward = own
