"""Teachers of any size without a checkpoint, for plans."""

from typing import Any

from moefuse.config import SizeConfig, build
from moefuse.families import MoeShape
from moefuse.fusion.plan import Teacher


def teacher(shape: MoeShape, itemsize: int = 2) -> Teacher:
    """Return a teacher of this shape with a little besides its experts."""
    return Teacher(
        shape=shape,
        outside=5000,
        outside_bytes=5000 * itemsize,
        largest_outside_layer=1500,
        embedding=1000,
        itemsize=itemsize,
    )


def wish(**size: Any) -> SizeConfig:
    """Return a wish for a size."""
    return build(SizeConfig, size)
