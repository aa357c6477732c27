"""Signs: all experts kept, of every number only the sign, and one scale a row.

The scale is the row's mean magnitude, which is best for given signs: Rastegari et al., "XNOR-Net"
(2016), equation 6.
"""

from moefuse.baselines import Layer
from moefuse.baselines._quantized import QuantizedExperts, rounded_experts
from moefuse.errors import UserError
from moefuse.mathematics.quantization import Format

BITS = (1,)


def quantize(layer: Layer, bits: float) -> QuantizedExperts:
    """Keep the signs of the layer's experts; raises ``UserError`` for other bits than 1."""
    if bits not in BITS:
        raise UserError(f"Signs have 1 bit, not {bits}; take round-to-nearest for other bits.")
    return rounded_experts(layer, Format(bits))
