"""A student that keeps all experts, as codes of few bits; their scales are all that is trained.

Shape suffixes: T tokens, K experts chosen per token, N = T * K rows sorted by expert, E experts,
D hidden width, F expert intermediate width, O outputs, I inputs, G groups of a row's numbers.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer
from moefuse.baselines._biases import Biases
from moefuse.mathematics.experts import ExpertBiases, Gating
from moefuse.mathematics.quantization import (
    Format,
    best_scale,
    from_codes,
    stored_bytes,
    to_codes,
)
from moefuse.modeling.modeling_moefuse import expert_linear

GROUP = 64
"""Numbers that share a scale."""


class StoredWeights(Protocol):
    """A module that holds one matrix of every expert in few bytes: ``codes`` (E, O, I)."""

    codes: Tensor

    def weight(self) -> Tensor:
        """Return the matrices, (E, O, I) floats, to be differentiated by the scales."""
        ...

    def stored_bytes(self) -> int:
        """Return the bytes that the matrices take on disk."""
        ...

    def round_scales(self) -> None:
        """Round the scales to what is stored of them."""
        ...


class TrainedScales(nn.Module):
    """Scales as a factor of what they were to begin with: an optimiser's steps are then relative.

    ``start`` is any shape, fp32, rounded to fp16 numbers.
    """

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", as_stored(start))
        self.factor = nn.Parameter(torch.ones_like(start))

    def forward(self) -> Tensor:
        """Return the scales."""
        return self.start * self.factor

    @torch.no_grad()
    def round(self) -> None:
        """Make the scales fp16 numbers, to be trained from there."""
        self.start.copy_(as_stored(self.forward()))
        self.factor.fill_(1.0)


class CodedWeights(nn.Module):
    """One matrix of every expert: uint8 codes (E, O, I) and scales (E, O, G)."""

    codes: Tensor

    def __init__(self, codes_EOI: Tensor, scale_EOG: Tensor, fmt: Format) -> None:
        super().__init__()
        self.format = fmt
        self.register_buffer("codes", codes_EOI)
        self.scales = TrainedScales(scale_EOG)

    def weight(self) -> Tensor:
        """Return the matrices, (E, O, I) floats."""
        return from_codes(self.codes, self.scales(), self.format)

    def stored_bytes(self) -> int:
        """Return the bytes of packed codes and fp16 scales."""
        return stored_bytes(tuple(self.codes.shape), self.format)

    def round_scales(self) -> None:
        """Make the scales fp16 numbers."""
        self.scales.round()


class QuantizedExperts(nn.Module):
    """All experts of a layer, called like a Transformers experts module.

    ``gate_up`` holds matrices of 2F x D, gate first, ``down`` of D x F. Scales begin as fp16
    numbers and are trained in fp32; ``round_scales`` makes them fp16 numbers again.
    """

    def __init__(
        self,
        gate_up: StoredWeights,
        down: StoredWeights,
        gating: Gating,
        biases: ExpertBiases | None = None,
    ) -> None:
        super().__init__()
        # Distillation has a learning rate of its own for what begins with "scale".
        self.scaled_gate_up = gate_up
        self.scaled_down = down
        self.gating = gating
        # Scales are all that is trained.
        self.biases = Biases(biases).requires_grad_(False)

    def stored_bytes(self) -> int:
        """Return the true bytes of all codes, scales and biases."""
        parts = (self.scaled_gate_up, self.scaled_down, self.biases)
        return sum(part.stored_bytes() for part in parts)

    def active_parameters(self, top_k: int) -> int:
        """Return the most routed numbers that one token passes: ``top_k`` whole experts."""
        codes = (self.scaled_gate_up.codes, self.scaled_down.codes)
        matrices = min(top_k, len(codes[0])) * sum(matrix[0].numel() for matrix in codes)
        return matrices + self.biases.active_parameters(top_k)

    def round_scales(self) -> None:
        """Round the scales to the fp16 numbers that are stored."""
        self.scaled_gate_up.round_scales()
        self.scaled_down.round_scales()

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output, (T, D)."""
        gate_up_EFD = self.scaled_gate_up.weight().to(x_TD.dtype)
        down_EDF = self.scaled_down.weight().to(x_TD.dtype)
        expert_N, order_N = index_TK.reshape(-1).sort(stable=True)
        token_N = order_N // index_TK.shape[1]
        rows_per_expert = torch.bincount(expert_N, minlength=len(down_EDF)).tolist()
        x_ND = x_TD.index_select(0, token_N)
        h_NF = expert_linear(x_ND, gate_up_EFD, rows_per_expert)
        gate_NF, up_NF = self.biases.with_gate_up(h_NF, expert_N).chunk(2, dim=-1)
        weight_N1 = weight_TK.reshape(-1, 1).index_select(0, order_N)
        z_NF = (self.gating(gate_NF, up_NF) * weight_N1).to(x_TD.dtype)
        y_ND = expert_linear(z_NF, down_EDF, rows_per_expert)
        y_ND = self.biases.with_down(y_ND, expert_N, weight_N1)
        return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)


def as_stored(scale: Tensor) -> Tensor:
    """Round scales to fp16 numbers, in the dtype that they have."""
    return scale.half().to(scale.dtype)


@torch.no_grad()
def rounded_experts(layer: Layer, fmt: Format) -> QuantizedExperts:
    """Round every number of the layer's experts to the nearest that its group's scale allows."""
    coded = []
    for weight_EOI in (layer.experts.gate_up_EFD.float(), layer.experts.down_EDF.float()):
        scale_EOG = as_stored(best_scale(weight_EOI, fmt))
        coded.append(CodedWeights(to_codes(weight_EOI, scale_EOG, fmt), scale_EOG, fmt))
    gate_up, down = coded
    return QuantizedExperts(gate_up, down, layer.experts.gating, layer.experts.biases)
