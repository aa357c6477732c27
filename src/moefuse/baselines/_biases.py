"""The biases of a layer's experts, which rivals keep as they are, in a student of a rival's.

Shape suffixes: N rows sorted by expert, E experts, D hidden width, F neurons of an expert.
"""

from torch import Tensor, nn

from moefuse.mathematics.experts import ExpertBiases

BIAS_BYTES = 2


class Biases(nn.Module):
    """``gate_up`` (E, 2F), gate first, and ``down`` (E, D); both None where experts have none."""

    def __init__(self, biases: ExpertBiases | None) -> None:
        super().__init__()
        self.gate_up = None if biases is None else nn.Parameter(biases.gate_up_EF.float().clone())
        self.down = None if biases is None else nn.Parameter(biases.down_ED.float().clone())

    def with_gate_up(self, h_NF: Tensor, expert_N: Tensor) -> Tensor:
        """Return what gate and up projections give, (N, 2F), with their biases."""
        if self.gate_up is None:
            return h_NF
        return h_NF + self.gate_up.index_select(0, expert_N).to(h_NF.dtype)

    def with_down(self, y_ND: Tensor, expert_N: Tensor, weight_N1: Tensor) -> Tensor:
        """Return weighted outputs, (N, D), with the weighted biases of the down projections."""
        if self.down is None:
            return y_ND
        return y_ND + (self.down.index_select(0, expert_N) * weight_N1).to(y_ND.dtype)

    def active_parameters(self, top_k: int) -> int:
        """Return the numbers of ``top_k`` experts."""
        return sum(min(top_k, len(bias)) * bias.shape[1] for bias in self.parameters())

    def stored_bytes(self) -> int:
        """Return the bytes of all biases in 16 bits."""
        return BIAS_BYTES * sum(bias.numel() for bias in self.parameters())
