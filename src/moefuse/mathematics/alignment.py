"""Neuron alignment: the same function, its neurons in another order.

An expert's F neurons can be permuted freely, and the up row and down column of a neuron can be
rescaled by c and 1/c (c may be negative) without changing what the expert computes, where only
the gate passes through a non-linearity (``linear_in_up``). Two experts that compute alike can
therefore look unrelated until their neurons are matched. Matching is a linear assignment problem on
the similarity of neurons; see Ainsworth et al., "Git Re-Basin" (2022), section 3.

Shape suffixes: D hidden width, F neurons.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

TINY = 1e-12


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: ``gate_FD``, ``up_FD`` (F, D) and ``down_DF`` (D, F), any float dtype.

    Biases of gate and up, where there are any, are one more column of their rows.
    """

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    linear_in_up: bool = True

    def permuted(self, order_F: Tensor, sign_F: Tensor | None = None) -> "ExpertWeights":
        """Return the same function with its neurons in ``order_F`` (F,) integers.

        ``sign_F`` (F,) of ones and minus ones flips the up row and down column of a neuron of the
        *result*, which cancels.
        """
        sign = torch.ones_like(self.up_FD[:, 0]) if sign_F is None else sign_F
        return ExpertWeights(
            self.gate_FD[order_F],
            self.up_FD[order_F] * sign[:, None],
            self.down_DF[:, order_F] * sign[None, :],
            self.linear_in_up,
        )

    def balanced(self) -> "ExpertWeights":
        """Return the same function with each neuron's up row and down column of equal norm.

        As it is where that would be another function.
        """
        if not self.linear_in_up:
            return self
        up = self.up_FD.norm(dim=1).clamp_min(TINY)
        down = self.down_DF.norm(dim=0).clamp_min(TINY)
        c_F = (down / up).sqrt()
        return ExpertWeights(self.gate_FD, self.up_FD * c_F[:, None], self.down_DF / c_F[None, :])

    def flat(self) -> Tensor:
        """Return all weights in one vector, (3FD,)."""
        parts = (self.gate_FD, self.up_FD, self.down_DF)
        return torch.cat([part.flatten() for part in parts])

    def norm(self) -> Tensor:
        """Return the Euclidean norm of all weights, a scalar in fp64."""
        parts = (self.gate_FD, self.up_FD, self.down_DF)
        return torch.stack([part.double().norm() for part in parts]).norm()

    def gate_up(self) -> Tensor:
        """Return gate and up stacked, gate first: (2F, D)."""
        return torch.cat([self.gate_FD, self.up_FD])


class Members(Sequence[ExpertWeights]):
    """Experts whose weights are made when they are asked for, so that few are there at once."""

    def __init__(self, count: int, make: Callable[[int], ExpertWeights]) -> None:
        self.length, self.make = count, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, member: Any) -> Any:
        return self.make(member)

    def __iter__(self) -> Iterator[ExpertWeights]:
        return (self.make(member) for member in range(self.length))

    def stacked(self, part: Callable[[ExpertWeights], Tensor]) -> Tensor:
        """Return one matrix of every member, (M, ...)."""
        first = part(self.make(0))
        whole = first.new_empty(self.length, *first.shape)
        for number, member in enumerate(self):
            whole[number] = part(member)
        return whole


def neuron_similarity(reference: ExpertWeights, member: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Compare every neuron of ``reference`` with every neuron of ``member``.

    Returns the similarity (F, F), the sum of the inner products of gate rows and of up rows and
    down columns under the better of the two signs, and that sign (F, F): always 1 where a neuron's
    sign cannot be changed.
    """
    gate_FF = reference.gate_FD @ member.gate_FD.T
    signed_FF = reference.up_FD @ member.up_FD.T + reference.down_DF.T @ member.down_DF
    if not reference.linear_in_up:
        return gate_FF + signed_FF, torch.ones_like(signed_FF)
    sign_FF = torch.where(signed_FF < 0, -1.0, 1.0).to(signed_FF.dtype)
    return gate_FF + signed_FF.abs(), sign_FF


def match_neurons(reference: ExpertWeights, member: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Find the order and signs of ``member``'s neurons that bring it closest to ``reference``.

    Returns ``order_F`` (F,) int64 and ``sign_F`` (F,) such that
    ``member.permuted(order_F, sign_F)`` minimises the squared weight distance to ``reference``
    over all permutations and signs.
    """
    return next(match_all([(reference, member)]))[:2]


Match = tuple[Tensor, Tensor, float]
"""Order (F,) and signs (F,) of a member's neurons, and the similarity of all matched together."""


def match_all(pairs: Iterable[tuple[ExpertWeights, ExpertWeights]]) -> Iterator[Match]:
    """Do what ``match_neurons`` does for many pairs of a reference and a member, in their order.

    Similarities are computed one pair at a time, where the weights are; assignments are solved on
    the CPU meanwhile, several at once. What they return does not depend on that.
    """
    with ThreadPoolExecutor(os.cpu_count()) as solvers:
        waiting: list[Callable[[], Match]] = []
        for reference, member in pairs:
            similarity_FF, sign_FF = neuron_similarity(reference, member)
            costs = similarity_FF.double().cpu().numpy()
            solved = solvers.submit(linear_sum_assignment, costs, maximize=True)
            waiting.append(_match(solved, similarity_FF, sign_FF))
            # As many at once as there are solvers: each holds three F x F matrices.
            if len(waiting) > (os.cpu_count() or 1):
                yield waiting.pop(0)()
        for found in waiting:
            yield found()


def _match(solved: Future, similarity_FF: Tensor, sign_FF: Tensor) -> Callable[[], Match]:
    def found() -> Match:
        rows_F, order_F = (torch.as_tensor(n, device=sign_FF.device) for n in solved.result())
        together = float(similarity_FF[rows_F, order_F].double().sum())
        return order_F, sign_FF[rows_F, order_F], together

    return found


def align(reference: ExpertWeights, member: ExpertWeights) -> ExpertWeights:
    """Return ``member`` with its neurons matched to ``reference``'s."""
    order_F, sign_F = match_neurons(reference, member)
    return member.permuted(order_F, sign_F)
