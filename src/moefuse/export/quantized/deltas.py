"""Deltas at few bits: moefuse's own packed form, for what no quantiser knows.

Shape suffixes: E experts, R rank, I inputs and O outputs of a matrix.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moefuse.errors import UserError
from moefuse.mathematics.lowrank import balanced_factors
from moefuse.modeling.modeling_moefuse import CodedLowRankDelta, FusedExperts, LowRankDelta
from moefuse.modeling.training import TrainedLowRankDelta, encode
from moefuse.sizes import LayerPlan

PLAIN_BITS, DEFAULT_BITS = "16", "8"
"""Bits of a number of deltas' factors: as the student has them, and as nothing is lost."""
PLAIN = "low_rank"
"""What ``config.json`` calls deltas whose factors are plain numbers."""


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
    name, and their dtype becomes that of scales and codebooks."""
    return _coded(factors, bits)[0]


def learning(delta: LowRankDelta, bits: str, dtype: torch.dtype) -> TrainedLowRankDelta:
    """Return fp32 deltas whose codes learn, to be stored in ``bits`` bits, other numbers in
    ``dtype``."""
    factors = {name: factor.to(dtype) for name, factor in delta.state_dict().items()}
    made, rows = _coded(factors, bits)
    return TrainedLowRankDelta(made.float(), rows)


def _coded(factors: Mapping[str, Tensor], bits: str) -> tuple[CodedLowRankDelta, dict[str, Tensor]]:
    """Return coded deltas, and the rows that their codes stand for by name.

    Factors are balanced first: a rank's row of A and column of B, which are what has a scale, are
    then as long as each other, and orthogonal to the others, so that no rank is rounded more
    coarsely for the sake of another. The products of an expert stay what they were.
    """
    experts, rank, hidden = factors["gate_up_a"].shape
    intermediate = factors["down_a"].shape[2]
    made = CodedLowRankDelta(experts, hidden, intermediate, rank, bits=bits)
    made.requires_grad_(False).to(factors["gate_up_a"].dtype)
    rows: dict[str, Tensor] = {}
    for part in ("gate_up", "down"):
        b_EOR, a_ERI = balanced_factors(factors[f"{part}_b"].float(), factors[f"{part}_a"].float())
        rows |= {f"{part}_in": a_ERI, f"{part}_out": b_EOR.mT}
    for name, values_ERI in rows.items():
        encode(getattr(made, name), values_ERI)
    return made, rows


def code_deltas(experts: FusedExperts, bits: str) -> int:
    """Store the deltas of a layer at ``bits`` bits; returns the bytes that they take."""
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
