"""The loss of healing, a few tokens at a time.

With a vocabulary of 100,000 the logits of one batch in fp32 dwarf the model. So the student's head
is never applied to the whole batch: its hidden states are cut into chunks of tokens, each chunk's
logits are made, compared with the teacher's and dropped, and made again on the way back
(checkpointing, Chen et al., 2016). Only one chunk's logits exist at a time, forward and backward.
Tokens whose prediction does not count are left out before the head.

The loss is computed inside the student's own forward, in the place of its head. There the head's
weights are whole, however they are sharded between steps, and the loss is what the model returns,
which is what data parallel wrappers listen to.

Shape suffixes: B sequences, S positions, T tokens that count, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    def losses(self, chunk: slice, student_TV: Tensor, options: HealConfig) -> Tensor:
        """Return the divergence from the teacher's full distribution: (T,) fp32."""
        with torch.no_grad():
            teacher_TV = self.head(self.hidden_TD[chunk])
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


def chunked_losses(
    hidden_TD: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Targets,
    next_T: Tensor,
    options: HealConfig,
) -> Tensor:
    """Return every token's loss, (T,) fp32, the logits of one chunk in memory at a time.

    ``hidden_TD`` are the student's last hidden states at the tokens that count, ``head`` makes
    logits of them, ``next_T`` (int64) are the tokens that follow.
    """

    def losses(part_TD: Tensor, start: int) -> Tensor:
        chunk = slice(start, start + len(part_TD))
        student_TV = head(part_TD)
        loss_T = targets.losses(chunk, student_TV, options)
        if options.cross_entropy:
            loss_T = loss_T + options.cross_entropy * cross_entropy(student_TV, next_T[chunk])
        return loss_T

    parts, start = [], 0
    size = max(1, CHUNK_NUMBERS // vocabulary_of(head))
    for part_TD in hidden_TD.split(size):
        parts.append(
            checkpoint(losses, part_TD, start, use_reentrant=False, preserve_rng_state=False)
        )
        start += len(part_TD)
    return torch.cat(parts)


def vocabulary_of(head: object) -> int:
    """Return how many logits a head makes of one token."""
    owner = getattr(head, "__self__", head)
    return int(owner.out_features)  # type: ignore[attr-defined]


@contextmanager
def losses_in_place_of_logits(
    head: nn.Module, compute: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
) -> Iterator[None]:
    """Make ``head`` return ``compute(hidden_BSD, its own forward)``, as (B, S, 1), not logits."""
    forward, own = head.forward, head.__dict__.get("forward")

    def replaced(hidden_BSD: Tensor) -> Tensor:
        return compute(hidden_BSD, forward).unsqueeze(-1)

    head.forward = replaced
    try:
        yield
    finally:
        if own is None:
            del head.forward  # the class's own shows again
        else:
            head.forward = own
