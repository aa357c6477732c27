"""Deltas at few bits: moefuse's own packed form, for what no quantiser knows.

Shape suffixes: E experts, R rank, I inputs and O outputs of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from moefuse.mathematics.lowrank import balanced_factors
from moefuse.modeling.modeling_moefuse import CodedLowRankDelta, FusedExperts
from moefuse.modeling.training import encode

DELTA_BITS = ("16", "8", "4", "3", "2")
"""Bits of a number of deltas' factors; 16 are the student's own numbers."""
DELTA = ".experts.delta."
"""What is in the names of all that deltas store."""
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def kind_of(bits: str) -> str:
    """Return what deltas of so many bits are called in ``config.json``."""
    return "low_rank" if bits == "16" else f"low_rank_{bits}_bits"


def coded(factors: Mapping[str, Tensor], bits: str) -> CodedLowRankDelta:
    """Return deltas with factors of ``bits`` bits, fp32 scales; ``factors`` are those of a
    ``LowRankDelta`` by name.

    Factors are balanced first: a rank's row of A and column of B, which are what has a scale, are
    then as long as each other, and orthogonal to the others, so that no rank is rounded more
    coarsely for the sake of another. The products of an expert stay what they were.
    """
    experts, rank, hidden = factors["gate_up_a"].shape
    intermediate = factors["down_a"].shape[2]
    made = CodedLowRankDelta(experts, hidden, intermediate, rank, bits=bits).requires_grad_(False)
    for part in ("gate_up", "down"):
        b_EOR, a_ERI = balanced_factors(factors[f"{part}_b"].float(), factors[f"{part}_a"].float())
        encode(getattr(made, f"{part}_in"), a_ERI)
        encode(getattr(made, f"{part}_out"), b_EOR.mT)
    return made


def with_coded_deltas(
    tensors: Iterable[tuple[str, Tensor]], bits: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a student's ``tensors`` by name, deltas' factors at ``bits`` bits.

    Scales and codebooks have the factors' dtype. Nothing but one layer's factors is waited for.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        stem, _, factor = name.rpartition(".delta.")
        if bits == "16" or factor not in FACTORS:
            yield name, tensor
            continue
        factors = waiting.setdefault(stem, {})
        factors[factor] = tensor
        if len(factors) == len(FACTORS):
            made = coded(waiting.pop(stem), bits).to(tensor.dtype)
            for part, stored in made.state_dict().items():
                yield f"{stem}.delta.{part}", stored
    assert not waiting, f"a factor of {sorted(waiting)} is missing"


def code_deltas(experts: FusedExperts, bits: str) -> int:
    """Store the deltas of a loaded layer at ``bits`` bits; returns the bytes that they take."""
    if experts.delta is not None and bits != "16":
        made = coded(experts.delta.state_dict(), bits)
        experts.delta = made.to(experts.delta.gate_up_a.dtype)
    if experts.delta is None:
        return 0
    return sum(tensor.nbytes for tensor in experts.delta.state_dict().values())


def with_delta_kind(config: dict[str, Any], bits: str) -> dict[str, Any]:
    """Return a student's ``config.json`` that names the form of its deltas."""
    if bits == "16":
        return dict(config)
    layers = {
        number: {**layer, "delta": kind_of(bits)}
        for number, layer in config["moefuse"]["layers"].items()
    }
    return {**config, "moefuse": {**config["moefuse"], "layers": layers}}
