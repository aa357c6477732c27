"""Which weights kernels can read."""

from typing import Any

from torch import Tensor, nn


def obstacle_of_weights(module: Any, x_TD: Tensor, *, casts: bool = False) -> str | None:
    """Say which weights of ``module`` are not plain, or do not go with ``x_TD`` (T, D), or None.

    ``casts`` says that weights of another dtype than the input's are cast.
    """
    linears = [linear for base in getattr(module, "bases", ()) for linear in base.children()]
    strange = next((one for one in linears if type(one) is not nn.Linear), None)
    if strange is not None:
        return f"a base is a {type(strange).__name__}, not a plain nn.Linear"
    for parameter in module.parameters():
        fits = casts or parameter.dtype == x_TD.dtype
        if parameter.device != x_TD.device or not fits:
            return f"weights are {parameter.dtype} on {parameter.device}, the input is not"
    return None
