"""QMoE: all experts kept, their numbers ternary, mostly zero, and stored below one bit each.

Frantar and Alistarh, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models" (2023):
rounding with error feedback to a negative value, zero and a positive value, then 16-bit codewords
for variable-length sequences. What is done otherwise here, each to the method's benefit:

- The paper has one size, which follows from a grid of a row's least and greatest weight. Here a
  threshold, in root mean squares of a line, says what becomes zero, and is sought for every budget.
- A line's two values fit its rounded numbers by least squares of the output error.
- A line, which has its own two values and can be decoded alone, is a row in the paper; but rows
  there have 768 to 6144 numbers. Here so many whole rows of an expert make a line that it has at
  least ``LINE`` numbers; a wide enough row is a line of its own.

Shape suffixes: E experts, O outputs, I inputs, L lines of an expert, N numbers of a line.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer, TooSmallError
from moefuse.baselines._quantized import QuantizedExperts, TrainedScales
from moefuse.errors import UserError
from moefuse.mathematics.dictionary_coding import Encoded, decode, encode
from moefuse.mathematics.error_feedback import Round, feedback_factor, round_with_feedback
from moefuse.mathematics.expert_moments import input_moments
from moefuse.mathematics.quantization import SCALE_BYTES

BITS = (1.5, 1, 0.8, 0.5, 0.25)
"""Budgets: bits stored for each of the teacher's numbers, scales and all included."""
LINE = 2048
"""The fewest numbers of a line."""
BLOCK = 64
LEAST_THRESHOLD = 0.43
"""It makes a third of normal numbers zero; any lower, and more codewords are needed, not fewer."""
HALVINGS = 10
"""How often the threshold's range is halved."""


class TernaryLines(nn.Module):
    """One ternary matrix of every expert: its coded stream and two values (E, L, 2) a line.

    The first value is that of code 0, the second that of code 2; code 1 is zero.
    """

    codes: Tensor

    def __init__(self, stream: Encoded, shape: torch.Size, value_EL2: Tensor) -> None:
        super().__init__()
        self.stream = stream
        self.register_buffer("codes", decode(stream).reshape(shape).to(value_EL2.device))
        self.scales = TrainedScales(value_EL2)

    def weight(self) -> Tensor:
        """Return the matrices, (E, O, I) floats."""
        value_EL2 = self.scales()
        codes_ELN = self.codes.reshape(*value_EL2.shape[:2], -1)
        negative_EL1, positive_EL1 = value_EL2.split(1, dim=-1)
        weight_ELN = (codes_ELN == 0) * negative_EL1 + (codes_ELN == 2) * positive_EL1
        return weight_ELN.reshape(self.codes.shape)

    def stored_bytes(self) -> int:
        """Return the bytes of the coded stream and of the lines' fp16 values."""
        return self.stream.stored_bytes() + SCALE_BYTES * self.scales.start.numel()

    def round_scales(self) -> None:
        """Make the values fp16 numbers."""
        self.scales.round()


def quantize(layer: Layer, bits: float) -> QuantizedExperts:
    """Make the layer's experts ternary, at most ``bits`` bits stored for each number.

    Raises ``UserError`` for no bits at all and ``TooSmallError`` where even zeros take more.
    """
    if not bits > 0:
        raise UserError(f"QMoE cannot store numbers in {bits} bits; take more than 0.")
    experts = layer.experts
    weights = (experts.gate_up_EFD.float(), experts.down_EDF.float())
    moments = input_moments(layer.call, layer.experts)
    factors = [feedback_factor(moment_EII) for moment_EII in moments]

    def at_threshold(threshold: float) -> QuantizedExperts:
        gate_up, down = (
            _ternary(weight_EOI, moment_EII, factor_EII, threshold)
            for weight_EOI, moment_EII, factor_EII in zip(weights, moments, factors, strict=True)
        )
        return QuantizedExperts(gate_up, down, experts.gating, experts.biases)

    return _least_threshold(at_threshold, layer.numbers * bits / 8)


def _least_threshold(
    at_threshold: Callable[[float], QuantizedExperts], most_bytes: float
) -> QuantizedExperts:
    """Return the student of the least threshold whose bytes fit."""
    low, high = LEAST_THRESHOLD, 2 * LEAST_THRESHOLD
    student = at_threshold(low)
    if student.stored_bytes() <= most_bytes:
        return student
    while (student := at_threshold(high)).stored_bytes() > most_bytes and not _is_nothing(student):
        low, high = high, 2 * high
    if student.stored_bytes() > most_bytes:
        raise _too_small(student, most_bytes)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = at_threshold(middle)
        if tried.stored_bytes() <= most_bytes:
            student, high = tried, middle
        else:
            low = middle
    if _is_nothing(student):
        raise _too_small(student, most_bytes)
    return student


def _too_small(zeros: QuantizedExperts, most_bytes: float) -> TooSmallError:
    needed = zeros.stored_bytes()
    return TooSmallError(f"{most_bytes:.0f} bytes hold no QMoE; zeros alone take {needed}.")


def _is_nothing(student: QuantizedExperts) -> bool:
    return all(
        bool((matrix.codes == 1).all()) for matrix in (student.scaled_gate_up, student.scaled_down)
    )


@torch.no_grad()
def _ternary(
    weight_EOI: Tensor, moment_EII: Tensor, factor_EII: Tensor, threshold: float
) -> TernaryLines:
    """Round with feedback: what is beyond ``threshold`` root mean squares of its line stays."""
    experts, outputs, inputs = weight_EOI.shape
    lines = outputs // rows_of_line(outputs, inputs)
    weight_ELN = weight_EOI.reshape(experts, lines, -1)
    limit_EL1 = threshold * weight_ELN.square().mean(-1, keepdim=True).sqrt()
    value_EL2 = _means_beyond(weight_ELN, limit_EL1)
    rows_per_line = outputs // lines
    limit_EO = limit_EL1.expand(-1, -1, rows_per_line).reshape(experts, outputs)
    value_EO2 = value_EL2.repeat_interleave(rows_per_line, 1)

    def round_column(weight_EO: Tensor) -> tuple[Tensor, Tensor]:
        below_EO, above_EO = weight_EO < -limit_EO, weight_EO > limit_EO
        value_EO = below_EO * value_EO2[..., 0] + above_EO * value_EO2[..., 1]
        return 1 - below_EO.byte() + above_EO.byte(), value_EO

    def begin(_: Tensor) -> Round:
        return round_column

    codes_EOI = round_with_feedback(weight_EOI, factor_EII, BLOCK, begin)
    stream = encode(codes_EOI.reshape(experts * lines, -1).cpu())
    return TernaryLines(stream, codes_EOI.shape, _fitted(weight_EOI, moment_EII, codes_EOI, lines))


def _means_beyond(weight_ELN: Tensor, limit_EL1: Tensor) -> Tensor:
    """Return the means of what lies below ``-limit`` and above ``limit``, (E, L, 2).

    A side where nothing does gets the line's least or greatest number, as in the paper.
    """
    sides = []
    for sign in (-1.0, 1.0):
        side_ELN = weight_ELN * sign
        beyond_ELN = side_ELN > limit_EL1
        count_EL = beyond_ELN.sum(-1)
        mean_EL = (side_ELN * beyond_ELN).sum(-1) / count_EL.clamp_min(1)
        sides.append(sign * torch.where(count_EL > 0, mean_EL, side_ELN.amax(-1)))
    return torch.stack(sides, -1)


def _fitted(weight_EOI: Tensor, moment_EII: Tensor, codes_EOI: Tensor, lines: int) -> Tensor:
    """Return the values (E, L, 2) of least expected output error for these codes.

    With M_0 and M_2 the masks of a line's codes 0 and 2, W its weights and H the inputs' moment,
    the normal equations are ``sum_j tr(M_i H M_j^T) v_j = tr(M_i H W^T)``.
    """

    def by_line(product_EOI: Tensor) -> Tensor:
        return product_EOI.reshape(len(product_EOI), lines, -1).sum(-1)

    masks = [(codes_EOI == code).to(weight_EOI.dtype) for code in (0, 2)]
    seen = [mask_EOI @ moment_EII for mask_EOI in masks]
    rows = [torch.stack([by_line(a * b) for b in masks], -1) for a in seen]
    right_EL2 = torch.stack([by_line(a * weight_EOI) for a in seen], -1)
    inverse_EL22 = torch.linalg.pinv(torch.stack(rows, -2), hermitian=True)
    return (inverse_EL22 @ right_EL2.unsqueeze(-1)).squeeze(-1)


def rows_of_line(outputs: int, inputs: int) -> int:
    """Return how many rows make a line: the fewest, of equal lines, with ``LINE`` numbers."""
    wanted = math.ceil(LINE / inputs)
    return min(
        (rows for rows in range(1, outputs + 1) if not outputs % rows and rows >= wanted),
        default=outputs,
    )
