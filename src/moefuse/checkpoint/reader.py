"""Reading a teacher, one layer at a time.

A shard is mapped only while tensors are copied out of it and is mapped afresh for every
:data:`MAPPED_BYTES`, because pages that were once read stay resident as long as the mapping does;
so reading a whole model never holds more than what the caller keeps plus that much. The cost
against one long-lived mapping is parsing the shard's header again, a millisecond or two each time.
What is about to be copied out is read by a thread first (see ``read_ahead``), and what comes after
it too where somebody says what that is.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from moefuse import artifacts
from moefuse.checkpoint.formats import check_known, format_of, settings_of
from moefuse.checkpoint.formats.base import DamagedPartsError
from moefuse.checkpoint.headers import (
    CARD,
    CONFIG,
    HUB_ERRORS,
    INDEX,
    PICKLE_SUFFIXES,
    SINGLE,
    TensorInfo,
    contained_path,
    hub_error,
    local_directory,
    local_headers,
    read_config,
    read_weight_map,
)
from moefuse.checkpoint.native import Weights, of_one, to_native, weights_of
from moefuse.checkpoint.promises import check_experts, check_plain_floats
from moefuse.checkpoint.read_ahead import Range, ReadAhead
from moefuse.console import track
from moefuse.devices import STORED, stored_dtype
from moefuse.errors import UserError
from moefuse.families import Family, MoeShape, all_families, family_of

MAPPED_BYTES = 64_000_000
CHECKED_AT_ONCE = 1 << 24
SAMPLED_BYTES = 4096

_TOKENIZER = ("tokenizer*", "*vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_MODELS = ("*.tiktoken", "sentencepiece*.model", "spiece.model", "tekken.json")
_TEMPLATES = ("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json")
_LICENCES = ("LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "USE_POLICY*")
AUXILIARY = (*_TOKENIZER, *_TOKENIZER_MODELS, *_TEMPLATES, *_LICENCES)
"""Patterns of the files that a student inherits from its teacher unchanged."""


@dataclass(frozen=True)
class CheckpointReader:
    """A published Mixture-of-Experts checkpoint, read lazily; make one with :meth:`open`."""

    source: str
    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    family: Family
    shape: MoeShape

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "CheckpointReader":
        """Open a local directory or a hub id and check everything that headers can tell.

        A hub id is downloaded first: safetensors, JSON and tokenizer files, never pickles.
        ``trust_remote_code`` is only the user's consent; nothing is imported here. Quantised
        weights of a known format (see ``formats``) are read as the plain ones they stand for.

        Raises ``UserError`` for whatever is wrong with the checkpoint.
        """
        directory = local_directory(source)
        if directory is None:
            directory = _download(str(source), revision, trust_remote_code)
        family = _known_family(read_config(directory), trust_remote_code)
        headers = local_headers(str(source), directory)
        check_known(headers.source, headers.config)
        shape = family.shape(headers.config)
        check_experts(headers, family, shape)
        check_plain_floats(headers)
        return cls(headers.source, directory, headers.config, headers.tensors, family, shape)

    def read(self, name: str) -> Tensor:
        """Return one tensor by its checkpoint name: on the CPU, in the stored dtype, a copy.

        A quantised one comes in the dtype that the model is meant to be in.
        """
        found: dict[str, Tensor] = {}
        self._visit([name], lambda name, mapped: found.update({name: mapped.clone()}))
        return found[name]

    def read_layer(self, layer: int, *, experts: bool = True) -> dict[str, Tensor]:
        """Return a decoder layer's tensors by the name that the layer's module gives them.

        Names come without the layer's prefix (``self_attn.o_proj.weight``). Routed experts stay
        single tensors as in the checkpoint; ``experts=False`` leaves them out.
        """
        prefix = self.family.layer_prefix(layer)
        found: dict[str, Tensor] = {}

        def take(name: str, mapped: Tensor) -> None:
            found[self.family.module_name(name).removeprefix(prefix)] = mapped.clone()

        own, routed = self._names(layer)
        self._visit(own + routed if experts else own, take)
        return found

    def read_experts(
        self,
        layer: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Weights:
        """Return a layer's routed experts: ``gate_up`` (E, 2F, D), ``down`` (E, D, F), biases.

        Gate rows come first; biases are None where the family has none. All are on ``device`` in
        ``dtype``, by default the stored one. They are converted one by one, so that no second copy
        of the layer is ever there.
        """
        if self.family.stacked is not None:
            return self._read_stacked(layer, device, dtype)
        shape, width = self.shape, self.shape.intermediate
        names = [self.family.expert_names(layer, expert) for expert in range(shape.experts)]
        place = {"dtype": dtype or self.dtype, "device": device}
        gate_up = torch.empty((shape.experts, 2 * width, shape.hidden), **place)
        down = torch.empty((shape.experts, shape.hidden, width), **place)
        places: dict[str, Tensor] = {}
        for expert, name in enumerate(names):
            places[name.gate] = gate_up[expert, :width]
            places[name.up] = gate_up[expert, width:]
            places[name.down] = down[expert]
        self._visit(list(places), lambda name, mapped: places[name].copy_(mapped))
        return gate_up, down, None

    def read_native(
        self, layer: int, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Return a layer's routed experts as parameters of Transformers' module, by their names."""
        if self.family.stacked is None:
            weights = self.read_experts(layer, device=device, dtype=dtype)
            return to_native(weights, self.family.layout)
        names = self.family.stacked_names(layer)
        return {own: self.read(name).to(device, dtype) for own, name in names.items()}

    def _read_stacked(
        self, layer: int, device: str | torch.device, dtype: torch.dtype | None
    ) -> Weights:
        """Read experts that lie in one tensor for each projection, an expert after the other.

        Only one tensor is there twice while it is read, and mapped once.
        """
        layout, names = self.family.layout, self.family.stacked_names(layer)
        found: dict[str, Tensor] = {}

        def take(own: str, stacked: Tensor) -> None:
            first = of_one(own, stacked[0], layout)
            place = {"dtype": dtype or stacked.dtype, "device": device}
            found[own] = torch.empty((len(stacked), *first.shape), **place)
            for expert, one in enumerate(stacked):
                found[own][expert] = of_one(own, one, layout)

        for own, name in names.items():
            self._visit([name], lambda _, stacked, own=own: take(own, stacked))
        return weights_of(found)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the routed experts, once plain."""
        return stored_dtype(self.tensors, self.family, self.config)

    def read_ahead(self, layer: int, *, outside: bool = True, experts: bool = True) -> None:
        """Begin to read a layer's tensors from the disk while others are worked on.

        ``outside`` and ``experts`` say whether those beside its routed experts and these are
        wanted. Raises ``OSError`` where what was begun before could not be read.
        """
        own, routed = self._names(layer)
        names = [
            *self._in_order(own if outside else []),
            *self._in_order(routed if experts else []),
        ]
        self._ahead.start(self._ranges(names))

    @property
    def waited_seconds(self) -> float:
        """How long callers have waited for the disk so far."""
        return self._ahead.waited_seconds

    def outside_names(self) -> list[str]:
        """Return the tensors under no decoder layer: embeddings, final norm, head.

        What Transformers does not load is none of them.
        """
        outside = [name for name in self.tensors if self.family.layer_of(name) is None]
        return [name for name in outside if not name.startswith(self.family.unused)]

    def check_finite(self) -> None:
        """Read every tensor once; raises ``UserError`` naming the first with NaN or infinity."""

        def check(name: str, stored: list[Tensor]) -> None:
            if not all(map(is_finite, stored)):
                raise UserError(
                    f"The tensor {name!r} in {self.directory / self.tensors[name].shard} holds NaN "
                    "or infinity, so nothing sound can come of it; download the checkpoint again."
                )

        self._ahead.start(self._ranges(self.tensors))
        for name in track(self.tensors, "Checking weights"):
            self._visit([name], check, _as_stored)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this checkpoint from others, wherever it lies.

        See ``fingerprint_of``.
        """
        return fingerprint_of(self.directory, self.config, self.tensors)

    def auxiliary_files(self) -> list[Path]:
        """Return what a student inherits unchanged: tokenizer, chat template, licence, ..."""
        found = {path for pattern in AUXILIARY for path in self.directory.glob(pattern)}
        names = sorted(path.relative_to(self.directory).as_posix() for path in found)
        paths = [contained_path(self.directory, name) for name in names]
        return [path for path in paths if path.is_file() and path.suffix not in PICKLE_SUFFIXES]

    def copy_auxiliary_files(self, directory: Path) -> None:
        """Copy what a student inherits unchanged into ``directory``, subdirectories kept."""
        for path in self.auxiliary_files():
            target = directory / path.relative_to(self.directory)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())

    @cached_property
    def _by_layer(self) -> dict[int, list[str]]:
        grouped: dict[int, list[str]] = {}
        for name in self.tensors:
            layer = self.family.layer_of(name)
            if layer is not None:
                grouped.setdefault(layer, []).append(name)
        return grouped

    @cached_property
    def _ahead(self) -> ReadAhead:
        return ReadAhead()

    def _ranges(self, names: Iterable[str]) -> list[Range]:
        """Return where the bytes of tensors lie, in the order of ``names``."""
        stored = [part for name in names for part in self.tensors[name].stored]
        return [Range(p.name, self._paths[p.shard], p.begin, p.nbytes) for p in stored]

    @cached_property
    def _paths(self) -> dict[str, Path]:
        """The path of every shard; following links for each tensor anew would take seconds."""
        shards = {part.shard for tensor in self.tensors.values() for part in tensor.stored}
        return {shard: contained_path(self.directory, shard) for shard in shards}

    def _names(self, layer: int) -> tuple[list[str], list[str]]:
        """Return the names of a layer's tensors beside its routed experts, and of those."""
        routed = self.family.routed_prefixes(layer)
        parts: tuple[list[str], list[str]] = ([], [])
        for name in self._by_layer.get(layer, ()):
            parts[name.startswith(routed)].append(name)
        return parts

    def _in_order(self, names: list[str]) -> list[str]:
        """Sort names by where their bytes lie."""
        return sorted(names, key=lambda name: (self.tensors[name].shard, self.tensors[name].begin))

    def _visit(
        self,
        names: list[str],
        take: Callable[[str, Any], object],
        make: "Callable[[TensorInfo, Mapping[str, Any]], Any] | None" = None,
    ) -> None:
        """Call ``take(name, tensor)`` for each name; plain tensors are views of the mapped shard.

        ``make(tensor, files)`` gets them out of open files, by default as ``_plain`` does. A
        callback and not a generator, so that no suspended frame keeps a shard mapped.
        """
        if len(names) > 1:
            self._ahead.start(self._ranges(self._in_order(names)))
        for shards, batch in self._batches(names):
            self._ahead.wait_for([entry.name for entry in self._ranges(batch)])
            with ExitStack() as open_files:
                files = {
                    shard: open_files.enter_context(safe_open(self._paths[shard], framework="pt"))
                    for shard in shards
                }
                for name in batch:
                    take(name, (make or self._plain)(self.tensors[name], files))

    def _plain(self, tensor: TensorInfo, files: Mapping[str, Any]) -> Tensor:
        """Return a tensor out of open files, made of its parts if it is quantised."""
        if not tensor.parts:
            return files[tensor.shard].get_tensor(tensor.stored_name)
        found = format_of(self.config)
        assert found is not None
        parts = {end: files[part.shard].get_tensor(part.name) for end, part in tensor.parts}
        try:
            weight = found.unpack(parts, settings_of(self.config) or {}, tensor.shape)
        except DamagedPartsError as error:
            raise UserError(
                f"The tensor {tensor.name!r} in {self.directory / tensor.shard} is quantised, and "
                f"{error}; download the checkpoint again."
            ) from error
        return weight.to(STORED[tensor.dtype])

    def _batches(self, names: list[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """Split names into runs of the same shards and at most ``MAPPED_BYTES`` (or one tensor)."""
        shards: tuple[str, ...] = ()
        batch: list[str] = []
        held = 0
        for tensor in (self.tensors[name] for name in self._in_order(names)):
            lies_in = tuple(sorted({part.shard for part in tensor.stored}))
            if batch and (lies_in != shards or held + tensor.stored_bytes > MAPPED_BYTES):
                yield shards, batch
                batch, held = [], 0
            shards = lies_in
            batch.append(tensor.name)
            held += tensor.stored_bytes
        if batch:
            yield shards, batch


def _as_stored(tensor: TensorInfo, files: Mapping[str, Any]) -> list[Tensor]:
    return [files[part.shard].get_tensor(part.stored_name) for part in tensor.stored]


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor of any shape and dtype is free of NaN and infinity.

    Integers and 4-bit floats always are: they have no such values.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return True
    # Pieces, so that a large embedding needs no second copy of itself for the comparison.
    for piece in tensor.reshape(-1).split(CHECKED_AT_ONCE):
        wide = piece.float() if piece.element_size() == 1 else piece
        if not bool(torch.isfinite(wide).all()):
            return False
    return True


def _known_family(config: dict[str, Any], trust_remote_code: bool) -> Family:
    unknown = config.get("model_type") not in all_families()
    if unknown and "auto_map" in config and not trust_remote_code:
        raise UserError(
            f"The model type {config.get('model_type')!r} needs code that the checkpoint brings "
            "along (its config.json has 'auto_map'); pass --trust-remote-code if you trust it."
        )
    return family_of(config)


def _download(source: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Fetch a hub id into the cache: the small files first, so that refusals cost nothing."""
    try:
        directory = Path(
            snapshot_download(source, revision=revision, allow_patterns=[CONFIG, INDEX])
        )
    except HUB_ERRORS as error:
        raise hub_error(source, error) from error
    _known_family(read_config(directory), trust_remote_code)
    index = directory / INDEX
    shards = set(read_weight_map(index).values()) if index.is_file() else {SINGLE}
    wanted = [CONFIG, INDEX, CARD, *AUXILIARY, *sorted(shards)]
    # The commit that the first call found, so that both see one version of a moving branch.
    commit = directory.name if directory.parent.name == "snapshots" else revision
    try:
        directory = Path(
            snapshot_download(
                source,
                revision=commit,
                allow_patterns=wanted,
                ignore_patterns=[f"*{suffix}" for suffix in PICKLE_SUFFIXES],
            )
        )
    except HUB_ERRORS as error:
        raise hub_error(source, error) from error
    if not any(directory.glob("*.safetensors")):
        raise UserError(
            f"{source} has no safetensors weights on the hub, and moefuse never loads pickles; "
            "convert it to safetensors first."
        )
    return directory


def fingerprint_of(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> str:
    """Return 16 hexadecimal digits that tell a checkpoint from others, wherever it lies.

    Hashes the configuration, the headers, the shards' sizes and a few bytes out of the middle
    of each shard: fine-tuned siblings differ in nothing else.
    """
    layout = [[t.name, t.dtype, list(t.shape), t.shard] for t in tensors.values()]
    shards = sorted({part.shard for tensor in tensors.values() for part in tensor.stored})
    samples = [_sample(directory / shard) for shard in shards]
    return artifacts.fingerprint([config, layout, samples])


def _sample(shard: Path) -> list[int | str]:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        file.seek(size // 2)
        return [size, file.read(SAMPLED_BYTES).hex()]
