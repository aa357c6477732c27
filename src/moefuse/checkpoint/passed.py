"""Hidden states between two decoder layers, where text passes through a model layer by layer."""

import shutil
from pathlib import Path

from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.passing import batch_file

States = dict[str, Tensor]
"""Hidden states of one batch by the path that they came, each (B, S, D)."""


class OnDisk:
    """Hidden states in ``directory``, one file a batch; an interrupted run goes on from there.

    What enters a layer appears whole or not at all.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._partial: Path | None = None
        artifacts.remove_leftovers(directory)
        numbers = [int(path.name.rpartition("-")[2]) for path in directory.glob("entering-*")]
        self.layer = max(numbers, default=0)
        for number in numbers:
            if number != self.layer:
                shutil.rmtree(self._place(number))

    def restart(self) -> None:
        """Forget everything and begin with the first layer."""
        self.remove()
        self.layer = 0

    def remove(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def entering(self, number: int) -> States:
        """Read a batch that enters the layer."""
        return artifacts.read_tensors(self._place(self.layer) / batch_file(number))

    def leave(self, number: int, pair: States) -> None:
        """Write a batch that leaves the layer."""
        artifacts.write_tensors(self._coming() / batch_file(number), pair)

    def leaving(self, number: int) -> States:
        """Read a batch that leaves the layer."""
        return artifacts.read_tensors(self._coming() / batch_file(number))

    def advance(self) -> None:
        """Go to the next layer; what entered this one goes once what enters that is there."""
        artifacts.finish_directory(self._coming(), self._place(self.layer + 1))
        shutil.rmtree(self._place(self.layer), ignore_errors=True)
        self._partial = None
        self.layer += 1

    def _place(self, layer: int) -> Path:
        return self.directory / f"entering-{layer:03d}"

    def _coming(self) -> Path:
        if self._partial is None:
            self._partial = artifacts.partial_directory(self._place(self.layer + 1))
        return self._partial
