"""Writing plain checkpoints, of a teacher's own architecture, that any engine of its family takes.

The files carry the names that published checkpoints do, and nothing of moefuse is needed to load
them. The directory appears whole, by a rename.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.formats.base import without_settings
from moefuse.checkpoint.headers import CARD, CONFIG
from moefuse.checkpoint.native import Weights, to_native
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.console import track
from moefuse.families import Family

MAX_SHARD_BYTES = 4_000_000_000

Named = Iterator[tuple[str, Tensor]]


def named_experts(family: Family, layer: int, experts: Weights) -> Named:
    """Yield one layer's experts under the names of published checkpoints, as those have them."""
    if family.stacked is not None:
        native = to_native(experts, family.layout)
        yield from ((name, native[own]) for own, name in family.stacked_names(layer).items())
        return
    gate_up_EFD, down_EDF, _ = experts
    for expert, (gate_up_FD, down_DF) in enumerate(zip(gate_up_EFD, down_EDF, strict=True)):
        names = family.expert_names(layer, expert)
        gate_FD, up_FD = gate_up_FD.chunk(2)
        yield from ((names.gate, gate_FD), (names.up, up_FD), (names.down, down_DF))


def named_rest(
    reader: CheckpointReader, layer: int | None, change: Callable[[str, Tensor], Tensor] | None
) -> Named:
    """Yield what a layer has beside its experts, or what is under no layer, by published names.

    ``change(name, tensor)`` may put another tensor in the place of one, by the module's name.
    """
    family = reader.family
    if layer is None:
        found = {family.module_name(name): reader.read(name) for name in reader.outside_names()}
    else:
        prefix = family.layer_prefix(layer)
        tensors = reader.read_layer(layer, experts=False)
        found = {prefix + name: tensor for name, tensor in tensors.items()}
    for name, tensor in found.items():
        yield family.published_name(name), tensor if change is None else change(name, tensor)


def write_plain(
    reader: CheckpointReader,
    config: dict[str, Any],
    experts: Callable[[int], Weights],
    out: Path,
    *,
    card: str,
    description: str,
    change: Callable[[str, Tensor], Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint of the plain model of ``config``, one layer in memory at a time.

    All that is beside the experts comes from ``reader``, as ``change`` has it; ``experts(layer)``
    returns those of one layer in the dtype that they are stored in. ``card`` is its ``README.md``,
    ``beside`` what further JSON files hold, by name.
    """
    partial = artifacts.partial_directory(out)
    family = reader.family
    with ShardedWriter(partial, max_shard_bytes) as writer:
        for name, tensor in named_rest(reader, None, change):
            writer.add(family.within_whole(name), tensor)
        for layer in track(range(family.layer_count(config)), description):
            for name, tensor in named_rest(reader, layer, change):
                writer.add(family.within_whole(name), tensor)
            if layer in reader.shape.layers:
                for name, tensor in named_experts(family, layer, experts(layer)):
                    writer.add(family.within_whole(name), tensor)
    reader.copy_auxiliary_files(partial)
    artifacts.write_json(partial / CONFIG, without_settings(config))
    artifacts.write_text(partial / CARD, card)
    for name, value in (beside or {}).items():
        artifacts.write_json(partial / name, value)
    artifacts.finish_directory(partial, out)
