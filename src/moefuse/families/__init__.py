"""The model families that moefuse knows, found by listing this folder.

A family is added by adding a file; nothing is registered by hand, and a file that fails to import
fails loudly instead of making its family vanish.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from moefuse.errors import UserError
from moefuse.families._unsupported import REASONS
from moefuse.families.base import ExpertNames, ExpertsLayout, Family, MoeShape

__all__ = [
    "ExpertNames",
    "ExpertsLayout",
    "Family",
    "MoeShape",
    "all_families",
    "family_of",
    "unsupported_families",
]

# What Mixture-of-Experts configurations, known or not, call their number of routed experts.
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def all_families() -> dict[str, Family]:
    """Return every known family by its ``model_type``, in alphabetical order.

    Raises ``RuntimeError`` when two files claim one ``model_type``.
    """
    return dict(_discovered())


def unsupported_families() -> dict[str, str]:
    """Return why a family with experts cannot be fused, by its ``model_type``."""
    return dict(REASONS)


@cache
def _discovered() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    files = (name for name in names if name != "base" and not name.startswith("_"))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in files)
    return collect(module.FAMILY for module in modules)


def collect(families: Iterable[Family]) -> dict[str, Family]:
    """Return ``families`` by ``model_type``; raises ``RuntimeError`` for a duplicate."""
    found: dict[str, Family] = {}
    for family in families:
        if family.model_type in found:
            raise RuntimeError(f"two families are both called {family.model_type!r}")
        found[family.model_type] = family
    return found


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a ``config.json`` belongs to.

    Raises ``UserError`` for an already fused checkpoint, a dense model, a family that cannot
    be fused and an unknown one.
    """
    if "moefuse" in config:
        raise UserError(
            "This checkpoint is already fused (its config.json has a 'moefuse' block); "
            "start from the original teacher instead."
        )
    known = all_families()
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError("config.json lacks the key 'model_type', which names the model's family.")
    if model_type in known:
        return known[model_type]
    if model_type in REASONS:
        raise UserError(
            f"The model family {model_type!r} is not supported: {REASONS[model_type]}; moefuse "
            f"knows {', '.join(known)}."
        )
    if not any(config.get(key) for key in _EXPERT_COUNTS):
        raise UserError(
            f"{model_type!r} is a dense model: it has no routed experts, so there is nothing to "
            f"fuse; moefuse works on Mixture-of-Experts models ({', '.join(known)})."
        )
    raise UserError(
        f"The model family {model_type!r} is not supported yet; moefuse knows {', '.join(known)}."
    )
