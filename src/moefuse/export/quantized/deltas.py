"""Deltas at few bits: moefuse's own packed form, for what no quantiser knows.

Shape suffixes: E experts, R rank, I inputs and O outputs of a matrix.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics.lowrank import balanced_factors
from moefuse.modeling.modeling_moefuse import CodedLowRankDelta, FusedExperts, LowRankDelta
from moefuse.modeling.training import encode
from moefuse.sizes import LayerPlan

PLAIN_BITS, DEFAULT_BITS = "16", "8"
"""Bits of a number of deltas' factors: as the student has them, and as nothing is lost."""
PLAIN = "low_rank"
"""What ``config.json`` calls deltas whose factors are plain numbers."""
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def bits_of(asked: str | None, plans: Iterable[LayerPlan]) -> str:
    """Return the bits of deltas' numbers for a student of ``plans``; ``asked`` None: the best.

    Raises ``UserError`` where few bits are asked for and there is nothing to store in them.
    """
    some = any(plan.rank and plan.delta == PLAIN for plan in plans)
    if asked not in (None, PLAIN_BITS) and not some:
        raise UserError(
            f"--delta-bits {asked} is for deltas of low rank, and the student has none; leave it "
            "out."
        )
    return (asked or DEFAULT_BITS) if some else PLAIN_BITS


def stored_kind(plan: LayerPlan, bits: str) -> str:
    """Return what ``config.json`` calls a layer's deltas once they are stored in ``bits`` bits."""
    if bits == PLAIN_BITS or plan.delta != PLAIN or not plan.rank:
        return plan.delta
    return f"{PLAIN}_{bits}_bits"


def coded(factors: Mapping[str, Tensor], bits: str) -> CodedLowRankDelta:
    """Return deltas with factors of ``bits`` bits; ``factors`` are those of a ``LowRankDelta`` by
    name, and their dtype becomes that of scales and codebooks.

    Factors are balanced first: a rank's row of A and column of B, which are what has a scale, are
    then as long as each other, and orthogonal to the others, so that no rank is rounded more
    coarsely for the sake of another. The products of an expert stay what they were.
    """
    experts, rank, hidden = factors["gate_up_a"].shape
    intermediate = factors["down_a"].shape[2]
    made = CodedLowRankDelta(experts, hidden, intermediate, rank, bits=bits)
    made.requires_grad_(False).to(factors["gate_up_a"].dtype)
    for part in ("gate_up", "down"):
        b_EOR, a_ERI = balanced_factors(factors[f"{part}_b"].float(), factors[f"{part}_a"].float())
        encode(getattr(made, f"{part}_in"), a_ERI)
        encode(getattr(made, f"{part}_out"), b_EOR.mT)
    return made


def with_coded_deltas(
    tensors: Iterable[tuple[str, Tensor]], bits: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield a student's ``tensors`` by name, deltas' factors at ``bits`` bits.

    Nothing but one layer's factors is waited for.
    """
    for stem, found in _gathered(tensors, bits):
        if isinstance(found, Tensor):
            yield stem, found
            continue
        for part, stored in coded(found, bits).state_dict().items():
            yield f"{stem}.delta.{part}", stored


def as_stored(tensors: Mapping[str, Tensor], bits: str) -> dict[str, Tensor]:
    """Return ``tensors`` by the same names with deltas' factors that ``bits`` bits stand for."""
    told: dict[str, Tensor] = {}
    for stem, found in _gathered(tensors.items(), bits):
        if isinstance(found, Tensor):
            told[stem] = found
        else:
            made = coded(found, bits)
            told |= {f"{stem}.delta.{factor}": getattr(made, factor) for factor in FACTORS}
    return told


def _gathered(
    tensors: Iterable[tuple[str, Tensor]], bits: str
) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]]:
    """Yield tensors by name, and all factors of a layer at once by the name of its experts."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        stem, _, factor = name.rpartition(".delta.")
        if bits == PLAIN_BITS or factor not in FACTORS:
            yield name, tensor
            continue
        factors = waiting.setdefault(stem, {})
        factors[factor] = tensor
        if len(factors) == len(FACTORS):
            yield stem, waiting.pop(stem)
    assert not waiting, f"a factor of {sorted(waiting)} is missing"


def code_deltas(experts: FusedExperts, bits: str) -> int:
    """Store the deltas of a loaded layer at ``bits`` bits; returns the bytes that they take."""
    if experts.delta is None:
        return 0
    if bits != PLAIN_BITS and type(experts.delta) is LowRankDelta:
        experts.delta = coded(experts.delta.state_dict(), bits)
    return sum(tensor.nbytes for tensor in experts.delta.state_dict().values())


def with_stored_kinds(
    config: Mapping[str, Any], plans: Mapping[int, LayerPlan], bits: str
) -> dict[str, Any]:
    """Return a student's ``config.json`` that names the form of its deltas."""
    layers = {
        number: {**layer, "delta": stored_kind(plans[int(number)], bits)}
        for number, layer in config["moefuse"]["layers"].items()
    }
    return {**config, "moefuse": {**config["moefuse"], "layers": layers}}
