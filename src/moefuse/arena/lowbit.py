"""Structural students at few bits: matrices rounded to nearest in every step of their training.

A matrix is every trained parameter of two or more dimensions. Its numbers are rounded in groups of
``GROUP``, along whichever of its last two dimensions takes fewer bytes (thin factors would spend
more on scales than on codes); each group has a trained scale, stored as fp16. What else there is
stays at 16 bits. The router is no part of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moefuse.arena.cells import WHOLE
from moefuse.baselines._quantized import GROUP, TrainedScales
from moefuse.comparison import index_bytes, routed_part
from moefuse.mathematics.quantization import Format, best_scale, fake_quantize, stored_bytes

WHOLE_BYTES = 2


def bits_per_number(bits: float) -> float:
    """Return the bits that a number takes with its share of a scale, where groups are full."""
    return bits if bits == WHOLE else bits + WHOLE / GROUP


def numbers_bytes(student: nn.Module, bits: float) -> int:
    """Return the stored bytes of a student's routed numbers and scales, index maps left out."""
    routed = list(routed_part(student).parameters())
    if bits == WHOLE:
        return WHOLE_BYTES * sum(parameter.numel() for parameter in routed)
    return sum(_parameter_bytes(parameter, Format(bits, GROUP)) for parameter in routed)


def student_bytes(student: nn.Module, bits: float) -> int:
    """Return all bytes that a structural student takes: numbers, scales and index maps."""
    return numbers_bytes(student, bits) + index_bytes(student)


def _parameter_bytes(parameter: nn.Parameter, fmt: Format) -> int:
    if not _is_matrix(parameter):
        return WHOLE_BYTES * parameter.numel()
    shape = parameter.mT.shape if _is_mirrored(parameter, fmt) else parameter.shape
    return stored_bytes(tuple(shape), fmt)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.ndim >= 2


def _is_mirrored(matrix: Tensor, fmt: Format) -> bool:
    along, across = tuple(matrix.shape), tuple(matrix.mT.shape)
    return stored_bytes(across, fmt) < stored_bytes(along, fmt)


class RoundedStudent(nn.Module):
    """A student in training whose matrices are rounded to ``bits`` in every forward pass.

    Gradients pass the rounding straight through (see ``fake_quantize``). ``student`` is any module
    that is called like a Transformers experts module, fp32; it is trained in place. ``whole`` is
    the dtype of what is not rounded to few bits; ``scales`` are known ones, of every matrix.
    """

    def __init__(
        self,
        student: nn.Module,
        bits: float,
        whole: torch.dtype,
        scales: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.format = Format(bits, GROUP)
        self.whole = whole
        self.student = student
        matrices = {name: p for name, p in student.named_parameters() if _is_matrix(p)}
        self.mirrored = {name: _is_mirrored(p, self.format) for name, p in matrices.items()}
        # Distillation has a learning rate of its own for what begins with "scale".
        self.scales = scales or nn.ModuleList(
            TrainedScales(best_scale(self._grouped(name, p.detach()), self.format))
            for name, p in matrices.items()
        )

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return the routed output, (T, D), of the rounded matrices."""
        return functional_call(self.student, self.rounded(), (x_TD, index_TK, weight_TK))

    def rounded(self) -> dict[str, Tensor]:
        """Return every matrix as it is stored, by its name in the student."""
        found = {}
        for scales, name in zip(self.scales, self.mirrored, strict=True):
            matrix = self._grouped(name, self.student.get_parameter(name))
            found[name] = self._grouped(name, fake_quantize(matrix, scales(), self.format))
        return found

    @torch.no_grad()
    def finished(self) -> nn.Module:
        """Return the student with the very numbers that its codes and fp16 scales stand for."""
        for scales in self.scales:
            assert isinstance(scales, TrainedScales)
            scales.round()
        for name, value in self.rounded().items():
            self.student.get_parameter(name).copy_(value)
        matrices = {id(self.student.get_parameter(name)) for name in self.mirrored}
        rest = (p for p in routed_part(self.student).parameters() if id(p) not in matrices)
        round_to(rest, self.whole)
        return self.student

    def of_experts(self) -> "RoundedStudent":
        """Return the routed experts alone, rounded in the same way by the same scales."""
        experts = routed_part(self.student).requires_grad_(True)
        return RoundedStudent(experts, self.format.bits, self.whole, self.scales)

    def _grouped(self, name: str, matrix: Tensor) -> Tensor:
        """Turn a matrix so that its groups lie along the last dimension, or turn it back."""
        return matrix.mT if self.mirrored[name] else matrix


@torch.no_grad()
def round_to(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Round parameters in place to what a ``dtype`` of 16 bits can hold."""
    for parameter in parameters:
        parameter.copy_(parameter.to(dtype))
