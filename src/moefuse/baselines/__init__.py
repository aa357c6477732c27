"""Rival methods, each in a file of its own with one function.

A rival gets what this design gets (the layer's experts, its calibration statistics, a sample of
what the layer received and returned) and returns a student module that is called like a
Transformers experts module, so that the same loop distils it and the same code evaluates it. There
are two kinds:

- ``compress(layer, numbers)``: a structural method. The student's routed part (the router left
  out) holds at most ``numbers`` numbers; the arena stores them at 16, 4 or 2 bits.
- ``quantize(layer, bits)``: a method that keeps all experts and stores them at ``bits`` bits, one
  of the file's ``BITS``; its size is whatever that takes.

A student has two methods besides ``forward``: ``active_parameters(top_k)``, the most routed
numbers that one token passes, and, if it is quantised by itself, ``stored_bytes()``.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from moefuse.errors import UserError
from moefuse.families import Family
from moefuse.mathematics.experts import Experts, ExpertsCall
from moefuse.mathematics.statistics import LayerStatistics


class TooSmallError(Exception):
    """The budget is below the smallest student that a method can make."""


@dataclass(frozen=True)
class Layer:
    """What a rival may look at: one MoE layer of the teacher.

    ``block`` is the native module that holds router and experts, with its weights; ``config`` the
    Transformers configuration that made it; ``call`` calibration tokens with what the layer
    returned, floats in fp32; ``seed`` what any random choice starts from.
    """

    family: Family
    config: Any
    block: nn.Module
    experts: Experts
    statistics: LayerStatistics
    call: ExpertsCall
    seed: int = 0

    @property
    def numbers(self) -> int:
        """Numbers that the matrices of all routed experts hold.

        Biases come on top for the teacher and all its students alike.
        """
        return self.experts.gate_up_EFD.numel() + self.experts.down_EDF.numel()

    def experts_within(self, numbers: int) -> int:
        """Return how many whole experts ``numbers`` numbers hold; raises ``TooSmallError``."""
        count = len(self.experts.gate_up_EFD)
        one = self.numbers // count
        if numbers < one:
            raise TooSmallError(f"{numbers} numbers hold no expert; one takes {one}.")
        return min(count, numbers // one)


def method_names() -> list[str]:
    """List the rival methods, as they are called on the command line."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def method(name: str) -> ModuleType:
    """Return the file of the method called ``name``; raises ``UserError`` for an unknown one."""
    if name not in method_names():
        raise UserError(f"There is no method {name!r}; choose from {', '.join(method_names())}.")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
