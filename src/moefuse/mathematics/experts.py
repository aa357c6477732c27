"""What is passed between stages about one layer's experts.

Shape suffixes: T tokens, K experts chosen per token, E experts, D hidden width, F neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moefuse.mathematics.alignment import ExpertWeights


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
class Experts:
    """A layer's routed experts: ``gate_up_EFD`` (E, 2F, D), gate first; ``down_EDF`` (E, D, F).

    They stay in the dtype that they are stored in; whatever computes in fp32 takes one expert in
    fp32 at a time, so that a layer of bf16 never takes twice its memory.
    """

    gate_up_EFD: Tensor
    down_EDF: Tensor
    activation: Callable[[Tensor], Tensor]

    def run(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return one expert's output, (T, D), before it is weighted, in the dtype of ``x_TD``."""
        gate_up_FD = self.gate_up_EFD[expert].to(x_TD.dtype)
        gate_TF, up_TF = (x_TD @ gate_up_FD.T).chunk(2, dim=-1)
        return (self.activation(gate_TF) * up_TF) @ self.down_EDF[expert].to(x_TD.dtype).T

    def gate_up(self, expert: int) -> Tensor:
        """Return one expert's gate and up projections, (2F, D) fp32."""
        return self.gate_up_EFD[expert].float()

    def down(self, expert: int) -> Tensor:
        """Return one expert's down projection, (D, F) fp32."""
        return self.down_EDF[expert].float()

    def weights(self, expert: int) -> ExpertWeights:
        """Return one expert's three projections, fp32."""
        gate_FD, up_FD = self.gate_up(expert).chunk(2)
        return ExpertWeights(gate_FD, up_FD, self.down(expert))

    def in_fp32(self) -> "Experts":
        """Return all experts in fp32."""
        return replace(self, gate_up_EFD=self.gate_up_EFD.float(), down_EDF=self.down_EDF.float())
