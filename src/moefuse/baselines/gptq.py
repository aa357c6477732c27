"""GPTQ: all experts kept, numbers rounded so that later ones make up for earlier ones' errors.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), with groups of 64. A group's scale is the one of least squared error for the numbers as
they are when the group's turn comes. Every expert has a Hessian of its own tokens.
"""

import torch
from torch import Tensor

from moefuse.baselines import Layer
from moefuse.baselines._quantized import GROUP, CodedWeights, QuantizedExperts, as_stored
from moefuse.mathematics.error_feedback import Round, feedback_factor, round_with_feedback
from moefuse.mathematics.expert_moments import input_moments
from moefuse.mathematics.quantization import WORDS, Format, best_scale, from_codes, to_codes

BITS = tuple(WORDS)


def quantize(layer: Layer, bits: float) -> QuantizedExperts:
    """Round the layer's experts to ``bits`` bits; raises ``UserError`` for bits not in ``BITS``."""
    fmt = Format(bits, GROUP)
    x_moment_EDD, z_moment_EFF = input_moments(layer.call, layer.experts)
    return QuantizedExperts(
        _coded(layer.experts.gate_up_EFD.float(), x_moment_EDD, fmt),
        _coded(layer.experts.down_EDF.float(), z_moment_EFF, fmt),
        layer.experts.gating,
        layer.experts.biases,
    )


@torch.no_grad()
def _coded(weight_EOI: Tensor, moment_EII: Tensor, fmt: Format) -> CodedWeights:
    scales: list[Tensor] = []
    row = Format(fmt.bits)

    def begin(weight_EOB: Tensor) -> Round:
        scale_EO1 = as_stored(best_scale(weight_EOB, row))
        scales.append(scale_EO1)

        def round_column(weight_EO: Tensor) -> tuple[Tensor, Tensor]:
            codes_EO1 = to_codes(weight_EO.unsqueeze(-1), scale_EO1, row)
            return codes_EO1.squeeze(-1), from_codes(codes_EO1, scale_EO1, row).squeeze(-1)

        return round_column

    codes_EOI = round_with_feedback(weight_EOI, feedback_factor(moment_EII), GROUP, begin)
    return CodedWeights(codes_EOI, torch.cat(scales, -1), fmt)
