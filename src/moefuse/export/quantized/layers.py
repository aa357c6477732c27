"""Which linear layers of a student there are, and of which kind."""

from torch import nn

from moefuse.checkpoint.streaming import native_model
from moefuse.errors import UserError
from moefuse.export.student_reader import StudentReader
from moefuse.families import Family

BASES = "bases"
KINDS = (BASES, "shared", "attention", "dense")
"""Shared bases, shared experts, attention, and the feed-forward part of layers without experts."""
SMALLEST_SIDE = 16
"""Narrower layers, such as gates of one output, are not worth rounding."""


def linear_layers(reader: StudentReader) -> dict[str, str | None]:
    """Return the kind of every ``nn.Linear`` of the student by its name, in the model's order.

    The kind is one of ``KINDS``, or None for what always stays: head, router, gates.
    """
    found: dict[str, str | None] = {}
    for name, module in native_model(reader.family, reader.config).named_modules():
        if isinstance(module, nn.Linear):
            found[name] = _kind(reader, name, module)
    for layer, plan in reader.plans.items():
        path = f"{reader.family.experts_path(layer)}.bases"
        for group in range(plan.groups):
            for projection in ("gate_up_proj", "down_proj"):
                found[f"{path}.{group}.{projection}"] = BASES
    return found


def _kind(reader: StudentReader, name: str, module: nn.Linear) -> str | None:
    family: Family = reader.family
    layer = family.layer_of(name)
    if layer is None or min(module.weight.shape) < SMALLEST_SIDE:
        return None
    own = name.removeprefix(family.layer_prefix(layer))
    if not own.startswith(f"{family.moe_name}."):
        return "attention"
    if layer not in reader.shape.layers:
        return "dense"
    router = f"{family.moe_name}.{family.router_name}"
    return None if own == router or own.startswith(f"{router}.") else "shared"


def chosen(kinds: dict[str, str | None], what: str) -> list[str]:
    """Return the layers of the kinds in ``what``, commas between.

    Raises ``UserError`` for a kind that there is not, or of which the student has no layer.
    """
    wanted = [part.strip() for part in what.split(",")]
    strange = [part for part in wanted if part not in KINDS]
    if strange:
        raise UserError(
            f"--what has {strange[0]!r}; it takes {', '.join(KINDS)}, with commas between."
        )
    there = [kind for kind in KINDS if kind in kinds.values()]
    missing = [part for part in wanted if part not in there]
    if missing:
        raise UserError(
            f"--what has {missing[0]!r}, of which the student has no linear layer; it has "
            f"{', '.join(there)}."
        )
    return [name for name, kind in kinds.items() if kind in wanted]
