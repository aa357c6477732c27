"""Which weights kernels can read."""

from typing import Any

from torch import Tensor, nn


def linears_of(module: Any) -> list[Any]:
    """Return the linear layers of all bases; none for experts of own neurons."""
    bases = getattr(module, "bases", ())
    return [linear for base in bases for linear in (base.gate_up_proj, base.down_proj)]


def weights_of(module: Any) -> list[Tensor]:
    """Return the weights of ``module``, whose bases are plain.

    They are asked for by name where they are known: a walk over all modules would keep the host
    busy for longer than a layer keeps a GPU.
    """
    linears, delta = linears_of(module), getattr(module, "delta", None)
    if not linears or (delta is not None and type(delta).__name__ != "LowRankDelta"):
        return list(module.parameters())
    factors = (
        () if delta is None else (delta.gate_up_a, delta.gate_up_b, delta.down_a, delta.down_b)
    )
    extras = (one for one in (module.scale, module.bias, module.down_bias) if one is not None)
    return [*(linear.weight for linear in linears), *factors, *extras]


def obstacle_of_weights(module: Any, x_TD: Tensor, *, casts: bool = False) -> str | None:
    """Say which weights of ``module`` are not plain, or do not go with ``x_TD`` (T, D), or None.

    ``casts`` says that weights of another dtype than the input's are cast.
    """
    strange = next((one for one in linears_of(module) if type(one) is not nn.Linear), None)
    if strange is not None:
        return f"a base is a {type(strange).__name__}, not a plain nn.Linear"
    dtype, device = x_TD.dtype, x_TD.device
    for weight in weights_of(module):
        if type(weight) not in (Tensor, nn.Parameter):
            return f"a weight is a {type(weight).__name__}, not a plain tensor"
        if weight.device != device or not (casts or weight.dtype == dtype):
            return f"weights are {weight.dtype} on {weight.device}, the input is not"
    return None
