"""What is passed between stages about one layer's experts.

Shape suffixes: T tokens, K experts chosen per token, E experts, D hidden width, F neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights


class Gating(Protocol):
    """What joins an expert's gate and up, of one shape, to its neurons' values.

    ``linear_in_up`` says whether ``gating(gate, c * up)`` is ``c * gating(gate, up)``. Every gating
    multiplies a function of the gate by ``up + up_offset``, but for what it clamps.
    """

    linear_in_up: bool
    up_offset: float

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the neurons' values."""
        ...


@dataclass(frozen=True)
class ExpertsCall:
    """What one call of a layer's routed experts received and returned, padding left out.

    ``x_TD`` (T, D) and ``y_TD`` (T, D) in the working dtype, ``index_TK`` (T, K) int32,
    ``weight_TK`` (T, K) fp32.
    """

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    y_TD: Tensor

    @classmethod
    def joined(cls, calls: Sequence["ExpertsCall"]) -> "ExpertsCall":
        """Return several calls as one, their tokens in order."""
        parts = {f.name: torch.cat([getattr(c, f.name) for c in calls]) for f in fields(cls)}
        return cls(**parts)

    def rows(self, rows: Tensor | slice) -> "ExpertsCall":
        """Return the call for some of its tokens only: integers (N,) or a slice."""
        return ExpertsCall(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def to(self, device: str | torch.device) -> "ExpertsCall":
        """Return the call on another device, its floats in fp32."""
        moved = {name: tensor.to(device) for name, tensor in vars(self).items()}
        floats = {name: t.float() for name, t in moved.items() if t.is_floating_point()}
        return ExpertsCall(**{**moved, **floats})


@dataclass(frozen=True)
class ExpertBiases:
    """The biases of a layer's experts: ``gate_up_EF`` (E, 2F), gate first; ``down_ED`` (E, D)."""

    gate_up_EF: Tensor
    down_ED: Tensor

    def numel(self) -> int:
        """Return how many numbers they are."""
        return self.gate_up_EF.numel() + self.down_ED.numel()

    def float(self) -> "ExpertBiases":
        """Return the biases in fp32."""
        return ExpertBiases(self.gate_up_EF.float(), self.down_ED.float())

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "ExpertBiases":
        """Return the biases on a device in a dtype."""
        return ExpertBiases(self.gate_up_EF.to(device, dtype), self.down_ED.to(device, dtype))


@dataclass(frozen=True)
class Experts:
    """A layer's routed experts: ``gate_up_EFD`` (E, 2F, D), gate first; ``down_EDF`` (E, D, F).

    They stay in the dtype that they are stored in; whatever computes in fp32 takes one expert in
    fp32 at a time, so that a layer of bf16 never takes twice its memory.
    """

    gate_up_EFD: Tensor
    down_EDF: Tensor
    gating: Gating
    biases: ExpertBiases | None = None

    def neurons(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return the values of one expert's neurons, (T, F), in the dtype of ``x_TD``."""
        h_TF = x_TD @ self.gate_up_EFD[expert].to(x_TD.dtype).T
        if self.biases is not None:
            h_TF = h_TF + self.biases.gate_up_EF[expert].to(x_TD.dtype)
        return self.gating(*h_TF.chunk(2, dim=-1))

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return one expert's output, (T, D), before it is weighted, in the dtype of ``x_TD``."""
        y_TD = self.neurons(expert, x_TD) @ self.down_EDF[expert].to(x_TD.dtype).T
        return y_TD if self.biases is None else y_TD + self.biases.down_ED[expert].to(x_TD.dtype)

    @property
    def rows_EFD(self) -> Tensor:
        """The rows of gate and up, gate first, each with its bias, if there are any, behind it.

        (E, 2F, D) or (E, 2F, D + 1), a copy of the layer where experts have biases. What is done to
        whole rows is then done to biases too.
        """
        if self.biases is None:
            return self.gate_up_EFD
        return torch.cat([self.gate_up_EFD, self.biases.gate_up_EF.unsqueeze(-1)], -1)

    def gate_up(self, expert: int) -> Tensor:
        """Return one expert's gate and up projections, (2F, D) fp32."""
        return self.gate_up_EFD[expert].float()

    def down(self, expert: int) -> Tensor:
        """Return one expert's down projection, (D, F) fp32."""
        return self.down_EDF[expert].float()

    def weights(self, expert: int) -> ExpertWeights:
        """Return one expert in fp32, its biases of gate and up as the last column of their rows.

        What is done to whole rows is then done to biases too.
        """
        rows_FD = self.gate_up(expert)
        if self.biases is not None:
            bias_F = self.biases.gate_up_EF[expert].float()
            rows_FD = torch.cat([rows_FD, bias_F.unsqueeze(-1)], -1)
        gate_FD, up_FD = rows_FD.chunk(2)
        return ExpertWeights(gate_FD, up_FD, self.down(expert), self.gating.linear_in_up)

    def in_fp32(self) -> "Experts":
        """Return all experts in fp32."""
        biases = None if self.biases is None else self.biases.float()
        gate_up_EFD, down_EDF = self.gate_up_EFD.float(), self.down_EDF.float()
        return replace(self, gate_up_EFD=gate_up_EFD, down_EDF=down_EDF, biases=biases)

    def down_bias_added(self, index_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
        """Return what the biases of the down projections add to the output, (T, D), if anything."""
        if self.biases is None:
            return None
        down_ED = self.biases.down_ED.to(weight_TK.dtype)
        return torch.einsum("tk,tkd->td", weight_TK, down_ED[index_TK.long()])
