"""moefuse: shrink Mixture-of-Experts language models by fusing their experts.

The library's functions follow the stages of the job::

    import moefuse

    moefuse.inspect("path/to/moe")                        # what it is made of
    moefuse.plan("path/to/moe", params="4B")              # what a size costs
    moefuse.fuse("path/to/moe", "student", groups=8, data="text.jsonl")
    model = moefuse.load("student")                       # a Transformers model
    moefuse.evaluate("student", teacher="path/to/moe", data="held_out.jsonl")

``calibrate``, ``group``, ``factor``, ``distill`` and ``assemble`` are ``fuse``'s stages, one by
one. All are imported when first used, so that ``import moefuse`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moefuse.errors import UserError

if TYPE_CHECKING:
    from moefuse.api import (
        assemble,
        calibrate,
        distill,
        evaluate,
        factor,
        fuse,
        group,
        inspect,
        load,
        plan,
    )

__all__ = [
    "UserError",
    "assemble",
    "calibrate",
    "distill",
    "evaluate",
    "factor",
    "fuse",
    "group",
    "inspect",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Import the library's functions when they are first asked for."""
    if name in __all__:
        return getattr(importlib.import_module("moefuse.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
