"""Rival methods, each in a file of its own with one name: ``compress``.

A rival gets what this design gets (the layer's experts, its calibration statistics, a number of
experts that the same bytes buy) and returns a student module that is called like a Transformers
experts module, so that the same loop distils it and the same code evaluates it.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moefuse.errors import UserError
from moefuse.families import Family
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.statistics import LayerStatistics


@dataclass(frozen=True)
class Layer:
    """What a rival may look at: one MoE layer of the teacher.

    ``block`` is the native module that holds router and experts, with its weights; ``config`` the
    Transformers configuration that made it.
    """

    family: Family
    config: Any
    block: nn.Module
    experts: Experts
    statistics: LayerStatistics


Compress = Callable[[Layer, int], nn.Module]


def method_names() -> list[str]:
    """List the rival methods, as they are called on the command line."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def method(name: str) -> Compress:
    """Return the function that compresses a layer by the method called ``name``.

    Raises ``UserError`` for an unknown method.
    """
    if name not in method_names():
        raise UserError(f"There is no method {name!r}; choose from {', '.join(method_names())}.")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").compress
