"""Round to nearest: all experts kept, every number rounded by itself.

Groups of 64 numbers share an fp16 scale, the one of least squared error. No data is looked at.
"""

from moefuse.baselines import Layer
from moefuse.baselines._quantized import GROUP, QuantizedExperts, rounded_experts
from moefuse.mathematics.quantization import WORDS, Format

BITS = tuple(WORDS)


def quantize(layer: Layer, bits: float) -> QuantizedExperts:
    """Round the layer's experts to ``bits`` bits; raises ``UserError`` for bits not in ``BITS``."""
    return rounded_experts(layer, Format(bits, GROUP))
