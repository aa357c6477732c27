"""Writing a checkpoint shard by shard.

The shards' names say how many there are, which nobody knows until the last tensor came. So shards
are written and flushed under temporary names, and only :meth:`ShardedWriter.__exit__` renames them
and writes the index last: a checkpoint is there as a whole or not at all.
"""

import re
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moefuse.artifacts import TEMPORARY_SUFFIX, write_json, write_tensors
from moefuse.checkpoint.headers import INDEX, SINGLE

_OWN_NAMES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class ShardedWriter:
    """Writes tensors as safetensors shards and their index; use it in a ``with`` statement.

    ``directory`` exists already; what an earlier checkpoint of any shard count left there is
    replaced. ``max_shard_bytes`` bounds a shard, and with it the memory held, unless one tensor is
    larger. The same tensors in the same order give the same bytes.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = 4_000_000_000) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._shards: list[Path] = []
        self._shard_of: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of ``tensor`` (any device, dtype and strides) to be stored as ``name``.

        Raises ``ValueError`` when ``name`` was added before.
        """
        if name in self._shard_of:
            raise ValueError(f"the tensor {name!r} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._max_shard_bytes:
            self._write_shard()
        # A view would keep all of the storage it looks into alive until the shard is full.
        self._held[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._shard_of[name] = len(self._shards)
        self._held_bytes += size
        self._total_bytes += size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
            return
        for shard in self._shards:
            shard.unlink()

    def _write_shard(self) -> None:
        name = f"model-{len(self._shards) + 1:05d}.safetensors{TEMPORARY_SUFFIX}"
        write_tensors(self._directory / name, self._held)
        self._shards.append(self._directory / name)
        self._held, self._held_bytes = {}, 0

    def _finish(self) -> None:
        assert self._held, "a checkpoint needs at least one tensor"
        self._write_shard()
        for path in self._directory.iterdir():
            if _OWN_NAMES.fullmatch(path.name):
                path.unlink()
        names = self._final_names()
        for shard, name in zip(self._shards, names, strict=True):
            shard.replace(self._directory / name)
        if len(names) > 1:
            weight_map = {name: names[at] for name, at in sorted(self._shard_of.items())}
            metadata = {"total_size": self._total_bytes}
            index = {"metadata": metadata, "weight_map": weight_map}
            write_json(self._directory / INDEX, index)

    def _final_names(self) -> list[str]:
        count = len(self._shards)
        if count == 1:
            return [SINGLE]
        return [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
