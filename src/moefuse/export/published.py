"""Checkpoints in the layout of the fused releases of March and April 2025, read and written anew.

That layout keeps, in every MoE layer, G fused experts of equally many members each, an adapter of
rank R for every member (``mixture``) or group (``lora``), and which members a group has. Its
formula is ``MultiplexedExperts``; the published code leaves all adapters out when a group receives
exactly one token, as in decoding, which is not followed.

Scales of adapters are multiplied into their B: ``scaling`` of shape (out), or 0.1 ``scaling`` of
shape (members, out), where in addition shares up to 1e-6 count as nothing.

Shape suffixes: G groups, M members of one, E = G * M experts, R rank, I and O widths.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.headers import CARD, local_directory, local_headers
from moefuse.checkpoint.reader import CheckpointReader, fingerprint_of
from moefuse.devices import STORED
from moefuse.errors import UserError
from moefuse.export.assemble import assemble
from moefuse.families import all_families
from moefuse.families.base import require
from moefuse.places import check_output, check_outside
from moefuse.sizes import LayerPlan

FUSED, RANK, METHOD = "n_fused_experts", "fused_expert_dora_rank", "fused_expert_method"
MEMBERS = "inv_mapping_dict"
KINDS = ("mixture", "lora")
LATER_SCALE = 0.1
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_SHARD_BYTES = 4_000_000_000
README = """\
# {name}

The fused checkpoint {old}, whose layout is another one, in moefuse's. Its groups mix their members
before the non-linearity, as its authors' formula has it, for prompts and for single tokens alike.
It loads with `trust_remote_code=True`, or by `moefuse.load`.
"""


@dataclass(frozen=True)
class PublishedReader(CheckpointReader):
    """A checkpoint in that layout; ``kind`` is mixture or lora."""

    groups: int
    rank: int
    kind: str

    @classmethod
    def of(cls, source: str | Path) -> "PublishedReader":
        """Open a directory and check all that headers tell; raises ``UserError``."""
        directory = local_directory(source)
        if directory is None:
            raise UserError(f"{source} is no directory; download the checkpoint first.")
        headers = local_headers(str(source), directory)
        config = headers.config
        family = all_families().get(str(config.get("model_type")))
        if FUSED not in config or family is None:
            raise UserError(
                f"{source} is no checkpoint of that layout: its config.json lacks {FUSED!r}, or "
                "its model_type is of no family that is known."
            )
        groups, rank = require(config, FUSED), require(config, RANK)
        kind = config.get(METHOD)
        if kind not in KINDS:
            raise UserError(
                f"{source} has adapters of the kind {kind!r} ({METHOD!r}); known are "
                f"{', '.join(KINDS)}."
            )
        own = {FUSED, RANK, METHOD, "auto_map"}
        config = {key: value for key, value in config.items() if key not in own}
        shape = family.shape(config)
        if shape.experts % groups:
            raise UserError(
                f"{source} has {shape.experts} experts in {groups} groups, which cannot be of "
                "equal size; download its config.json again."
            )
        reader = cls(
            headers.source, directory, config, headers.tensors, family, shape, groups, rank, kind
        )
        reader.check()
        return reader

    def check(self) -> None:
        """Raise ``UserError`` unless every layer has all tensors in shapes that fit."""
        for layer in self.shape.layers:
            for name, shapes in self._expected(layer).items():
                found = self.tensors.get(name)
                if found is None:
                    raise UserError(f"{self.source} lacks the tensor {name!r}; download it again.")
                if found.shape not in shapes:
                    raise UserError(
                        f"The tensor {name!r} in {self.source} has the shape {list(found.shape)}, "
                        f"where its config.json means {list(shapes[0])}."
                    )

    def _expected(self, layer: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        shape, members = self.shape, self.members
        path, hidden, width = self.family.moe_path(layer), shape.hidden, shape.intermediate
        wanted: dict[str, tuple[tuple[int, ...], ...]] = {
            f"{path}.{MEMBERS}": ((self.groups, members),)
        }
        for group in range(self.groups):
            prefix = f"{path}.experts.{group}."
            wanted[f"{prefix}mask_up_proj.weight"] = ((hidden, members),)
            for name in PROJECTIONS:
                inner, outer = (width, hidden) if name == "down_proj" else (hidden, width)
                place = f"{prefix}{name}."
                wanted[f"{place}fused_layer.weight"] = ((outer, inner),)
                wanted[f"{place}scaling_factor"] = ((outer,), (members, outer))
                rows, columns = (self.rank, inner), (outer, self.rank)
                if self.kind == "mixture":
                    rows, columns = (members, *rows), (members, *columns)
                else:
                    wanted[f"{place}mask_up_proj"] = ((members, self.rank),)
                    wanted[f"{place}scaling_factor"] = ((outer,),)
                wanted[f"{place}qa_weights"], wanted[f"{place}qb_weights"] = (rows,), (columns,)
        return wanted

    @property
    def members(self) -> int:
        """M."""
        return self.shape.experts // self.groups

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the fused layers, once plain."""
        path = self.family.moe_path(self.shape.layers[0])
        first = self.tensors[f"{path}.experts.0.gate_proj.fused_layer.weight"]
        return STORED.get(first.dtype, torch.bfloat16)

    def read_layer(self, layer: int, *, experts: bool = True) -> dict[str, Tensor]:
        """Return a layer's tensors but for the list of members."""
        found = super().read_layer(layer, experts=experts)
        found.pop(f"{self.family.moe_name}.{MEMBERS}", None)
        return found

    def plan(self, layer: int) -> LayerPlan:
        """Return what a layer becomes."""
        later = "later_" if self._is_later(layer) else ""
        return LayerPlan(self.groups, self.rank, delta=f"multiplexed_{later}{self.kind}")

    def _is_later(self, layer: int) -> bool:
        """Say whether scales are of the second release: one for every member."""
        path = self.family.moe_path(layer)
        return len(self.tensors[f"{path}.experts.0.gate_proj.scaling_factor"].shape) == 2

    def state(self, layer: int) -> dict[str, Tensor]:
        """Return the state of one layer's ``MultiplexedExperts``; raises ``UserError``."""
        path = self.family.moe_path(layer)
        member_GM = self.read(f"{path}.{MEMBERS}").long()
        experts = self.shape.experts
        if sorted(member_GM.flatten().tolist()) != list(range(experts)):
            raise UserError(
                f"{path}.{MEMBERS} in {self.source} does not name each of {experts} experts once; "
                "download the checkpoint again."
            )
        order_E = member_GM.flatten().argsort()
        state: dict[str, Tensor] = {"group_of_expert": order_E // self.members}
        prefixes = [f"{path}.experts.{group}." for group in range(self.groups)]
        shifts = [self.read(f"{prefix}mask_up_proj.weight").T for prefix in prefixes]
        state["delta.shift"] = torch.cat(shifts)[order_E]
        for group, prefix in enumerate(prefixes):
            gate, up, down = (self.read(f"{prefix}{p}.fused_layer.weight") for p in PROJECTIONS)
            state[f"bases.{group}.gate_up_proj.weight"] = torch.cat([gate, up])
            state[f"bases.{group}.down_proj.weight"] = down
        for name in PROJECTIONS:
            adapters = [self._adapters(f"{prefix}{name}.") for prefix in prefixes]
            for part in adapters[0]:
                stacked = torch.cat([adapter[part] for adapter in adapters])
                by_member = len(stacked) == experts and (part == "mask" or self.kind == "mixture")
                place = f"delta.{name.removesuffix('_proj')}.{part}"
                state[place] = stacked[order_E] if by_member else stacked
        return state

    def _adapters(self, place: str) -> dict[str, Tensor]:
        """Return one group's adapters of one projection, scales multiplied into b."""
        a, b, scale = (
            self.read(place + name) for name in ("qa_weights", "qb_weights", "scaling_factor")
        )
        scale = scale.float() * (LATER_SCALE if scale.ndim == 2 else 1)
        b = (b.float() * scale.unsqueeze(-1)).to(b.dtype)
        if self.kind == "mixture":
            return {"a": a, "b": b}
        return {"a": a[None], "b": b[None], "mask": self.read(f"{place}mask_up_proj")}


def import_published(old: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write the checkpoint ``old``, in that layout, as one of moefuse's own in ``out``.

    Quantised layers of a known format (AWQ) come out plain. Raises ``UserError`` before any work.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    reader = PublishedReader.of(old)
    check_outside(out, reader.directory, "output")
    card = README.format(name=out.name, old=reader.directory.name)
    assemble(
        reader,
        {layer: reader.plan(layer) for layer in reader.shape.layers},
        reader.state,
        out,
        dtype=reader.dtype,
        max_shard_bytes=MAX_SHARD_BYTES,
        job=fingerprint_of(reader.directory, reader.config, reader.tensors),
        describe=lambda partial: artifacts.write_text(partial / CARD, card),
    )
    return out
