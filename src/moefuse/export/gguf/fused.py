"""A fused student's tensors, for llama.cpp with moefuse's patch (``integrations/llama.cpp``).

Every projection has its bases once, one for each group, and beside them what is each expert's own.
Expert e of group g, chosen with weight w, adds::

    down_g z + B'_e A'_e z,    z = w * glu(scale_e * (gate_up_g x) + B_e A_e x + bias_e)

The stock engine refuses such a file: it looks for a matrix for every expert. Shapes as in
``modeling_moefuse``: E experts, G groups, D hidden width, F neurons of an expert, R rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moefuse.errors import UserError
from moefuse.export.gguf.tensors import Layout, Piece
from moefuse.export.student_reader import StudentReader

VERSION = 1
"""Of what the tensors mean; the patched engine refuses versions that it does not know."""
GROUPS = "ffn_down_exps.group_of_expert"
BASES = {"gate_up_proj": "ffn_gate_up_exps.weight", "down_proj": "ffn_down_exps.weight"}
FACTORS = {
    "gate_up_a": "ffn_gate_up_exps.delta_a",
    "gate_up_b": "ffn_gate_up_exps.delta_b",
    "down_a": "ffn_down_exps.delta_a",
    "down_b": "ffn_down_exps.delta_b",
}
"""The engine's names of deltas' factors by those of ``LowRankDelta``'s parameters."""
OWN = {"scale": "ffn_gate_up_exps.expert_scale", "bias": "ffn_gate_up_exps.expert_bias"}
"""What else is one expert's own: its names by those of ``FusedExperts``' parameters."""


@dataclass(frozen=True)
class FusedLayout(Layout):
    """Which tensors the file of a fused student has."""

    reader: StudentReader

    @property
    def keys(self) -> dict[str, int]:
        """Say which version of fused experts the file holds."""
        return {"moefuse.version": VERSION}

    def _routed(self, layer: int) -> str:
        return f"{self.reader.family.experts_path(layer)}."

    def _named(self, name: str) -> str:
        return super()._named(self.reader.family.published_name(name))

    def _experts(self, layer: int) -> Iterator[Piece]:
        """Yield a layer's bases, (G, 2F, D) and (G, D, F), what is its experts' own, and the map.

        Of gate and up those of the gate come first. Own are, as far as there are any, deltas A
        (E, R, D) and (E, R, F), B (E, 2F, R) and (E, D, R), scales and biases (E, 2F).
        """
        prefix, tensors, read = self._routed(layer), self.reader.tensors, self.reader.read
        groups = self.reader.plans[layer].groups
        block = f"blk.{layer}."
        yield Piece(
            block + GROUPS,
            (self.reader.shape.experts, 1),
            lambda: read(f"{prefix}group_of_expert").view(-1, 1),
            kind="I32",
        )
        for part, named in BASES.items():
            names = [f"{prefix}bases.{group}.{part}.weight" for group in range(groups)]
            make = lambda names=names: torch.stack([read(name) for name in names])  # noqa: E731
            yield Piece(block + named, (groups, *tensors[names[0]].shape), make)
        for part, shape in self.reader.factor_shapes(layer).items():
            make = lambda part=part: self.reader.read_factors(layer)[part]  # noqa: E731
            yield Piece(block + FACTORS[part], tuple(shape), make, own=True)
        for part, named in OWN.items():
            name = prefix + part
            if name in tensors:
                make = lambda name=name: read(name)  # noqa: E731
                yield Piece(block + named, tensors[name].shape, make, own=True)


def check_shared(reader: StudentReader) -> None:
    """Raise ``UserError`` for a student without shared bases, which the patch knows alone."""
    if any(plan.neurons is not None for plan in reader.plans.values()):
        raise UserError(
            f"{reader.source} is a student of own neurons at few bits, whose experts differ in "
            "width and whose neurons lie in codes of moefuse's own, which no matrix product of "
            "llama.cpp reads; write its experts out with 'moefuse expand', then export that with "
            "--quant."
        )
