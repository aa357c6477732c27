"""What one layer of a streamed teacher passes on to the next, kept so that a kill loses little.

The hidden states that enter a layer lie in a directory of their own, one file a batch, which
appears whole when the layer before is finished. So an interrupted run goes on from the last
finished layer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moefuse import artifacts

MEMORY_BYTES = 1_000_000_000


def batch_file(number: int) -> str:
    """Return the name of a batch's file."""
    return f"batch-{number:05d}.safetensors"


def first_unfinished(hidden: Callable[[int], Path], last: int) -> int:
    """Find where to go on: the latest layer whose input is on disk, or the first of all.

    ``hidden(layer)`` is the directory of what enters a layer; ``last`` the last that is asked for.
    """
    return max((n for n in range(1, last + 1) if hidden(n).is_dir()), default=0)


class PassedOn:
    """The hidden states between two layers: on disk always, in memory while they are small.

    ``hidden(layer)`` is the directory of what enters a layer, ``layer`` the one to begin with.
    """

    def __init__(self, hidden: Callable[[int], Path], layer: int) -> None:
        self.hidden = hidden
        self.layer = layer
        self.kept: dict[int, Tensor] = {}
        self._start_output()

    def _start_output(self) -> None:
        self.partial = artifacts.partial_directory(self.hidden(self.layer + 1))
        self.coming: dict[int, Tensor] = {}
        self.room = MEMORY_BYTES

    def read(self, number: int) -> Tensor | None:
        """Return what enters the layer for one batch, or None before the first layer."""
        if self.layer == 0:
            return None
        if number in self.kept:
            return self.kept[number]
        return artifacts.read_tensors(self.hidden(self.layer) / batch_file(number))["hidden"]

    def write(self, number: int, hidden_BSD: Tensor) -> None:
        """Keep what leaves the layer for one batch."""
        artifacts.write_tensors(self.partial / batch_file(number), {"hidden": hidden_BSD})
        self.room -= hidden_BSD.nbytes
        if self.room >= 0:
            self.coming[number] = hidden_BSD.cpu()

    def advance(self, *, needed: bool) -> None:
        """Go to the next layer: its input appears whole, that of this one is removed."""
        if needed:
            artifacts.finish_directory(self.partial, self.hidden(self.layer + 1))
        else:
            shutil.rmtree(self.partial)
        shutil.rmtree(self.hidden(self.layer), ignore_errors=True)
        self.kept = self.coming
        self.layer += 1
        if needed:
            self._start_output()
