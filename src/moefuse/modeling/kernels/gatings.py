"""The gatings that kernels know, by number."""

from typing import Any

SILU, GELU, CLAMPED = 0, 1, 2
"""``silu(gate) * up``, ``gelu(gate) * up`` with the exact gelu, and gpt-oss's."""


def number_of(gating: Any) -> tuple[int, float, float] | None:
    """Return the kernels' number, alpha and limit of a gating that they know."""
    # By name, because the classes of a checkpoint's own file are not moefuse's.
    if type(gating).__name__ == "ClampedGating":
        return CLAMPED, gating.alpha, gating.limit
    activation = getattr(gating, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    number = {"silu": SILU, "SiLU": SILU, "SiLUActivation": SILU, "gelu": GELU, "GELU": GELU}
    exact = getattr(activation, "approximate", "none") == "none"
    return (number[name], 0.0, 0.0) if name in number and exact else None
