"""What a checkpoint holds, learnt from headers alone.

A safetensors file starts with eight bytes of length and that many bytes of JSON: every tensor's
name, dtype, shape and place. Reading only those tells the whole layout of a 671 B model in about a
second and finds damaged checkpoints before any hour is spent on them. A header is input from a
stranger, so nothing it says is believed before it is checked against the file.

For a hub id the same headers are fetched with range requests; no weights are downloaded.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # its own home changes by release
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)

from moefuse.artifacts import read_json
from moefuse.checkpoint.formats import as_plain
from moefuse.checkpoint.tensor_info import DTYPE_BITS, TensorInfo
from moefuse.errors import UserError
from moefuse.families import all_families

CONFIG = "config.json"
CARD = "README.md"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# The limit that the safetensors library itself sets.
MAX_HEADER_BYTES = 100_000_000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# HTTPError is a lost connection, OSError a missing cache entry, ValueError a malformed hub id.
HUB_ERRORS = (HfHubHTTPError, HTTPError, OSError, ValueError)


@dataclass(frozen=True)
class CheckpointHeaders:
    """A checkpoint's configuration and layout."""

    source: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    """Every tensor by name, in alphabetical order; quantised ones as what they stand for."""

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors; headers are not counted."""
        return sum(tensor.stored_bytes for tensor in self.tensors.values())


def read_headers(source: str | Path, *, revision: str | None = None) -> CheckpointHeaders:
    """Read the layout of a checkpoint: a local directory or a hub id.

    Raises ``UserError`` for anything that is not a whole safetensors checkpoint.
    """
    directory = local_directory(source)
    if directory is not None:
        return local_headers(str(source), directory)
    return _hub_headers(str(source), revision)


def local_directory(source: str | Path) -> Path | None:
    """Return the directory that ``source`` names, or None when it looks like a hub id.

    Raises ``UserError`` when it is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{source} is a file; give the checkpoint's directory, the one with {CONFIG}."
        )
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise UserError(
            f"{source} does not exist; give a directory with {CONFIG} and safetensors files, "
            "or a hub id such as organisation/model."
        )
    return None


def local_headers(source: str, directory: Path) -> CheckpointHeaders:
    """Read the layout of the checkpoint in ``directory``; ``source`` is what to call it.

    Raises ``UserError`` for anything that is not a whole safetensors checkpoint.
    """
    config = read_config(directory)
    shards = list_shards(directory)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for tensor in read_shard_header(contained_path(directory, shard), shard):
            if tensor.name in tensors:
                raise UserError(
                    f"{directory} holds the tensor {tensor.name!r} twice, in "
                    f"{tensors[tensor.name].shard} and {shard}; download the checkpoint again."
                )
            tensors[tensor.name] = tensor
    index = directory / INDEX
    if index.is_file():
        _match_index(index, read_weight_map(index), tensors)
    return _of(source, config, tensors)


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json``; raises ``UserError`` when it is missing or not a JSON object."""
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(
            f"{directory} has no {CONFIG}, so it is not a checkpoint; give the directory that "
            "holds the model's configuration and safetensors files."
        )
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    # Deeply nested input exhausts the parser's recursion instead of failing to parse.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; download the file again.")
    return value


def list_shards(directory: Path) -> list[str]:
    """Return the file names of a checkpoint's shards, each known to be a file inside it.

    Raises ``UserError`` for a missing shard, a name that leaves the directory, and a checkpoint
    that has pickles only.
    """
    if (directory / INDEX).is_file():
        shards = sorted(set(read_weight_map(directory / INDEX).values()))
    elif (directory / SINGLE).is_file():
        shards = [SINGLE]
    else:
        raise _no_weights(directory)
    missing = [name for name in shards if not contained_path(directory, name).is_file()]
    if missing:
        raise UserError(_missing_shards(directory, missing, shards))
    return shards


def read_weight_map(index: Path) -> dict[str, str]:
    """Return which shard holds which tensor, by an index file.

    Raises ``UserError`` when it is malformed or names a shard outside its directory.
    """
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no 'weight_map'; download the index again.")
    for shard in set(map(str, weight_map.values())):
        if not _is_plain_shard_name(shard):
            raise UserError(
                f"{index} names the shard {shard!r}; shards must be .safetensors files beside the "
                "index, so this checkpoint is not trusted."
            )
    return weight_map


def _is_plain_shard_name(shard: str) -> bool:
    plain = not re.search(r"[\\/:\x00]", shard) and not shard.startswith(".")
    return plain and shard.endswith(".safetensors")


def contained_path(directory: Path, name: str) -> Path:
    """Return a file's path; raises ``UserError`` when a link leads it out of the checkpoint.

    The hub's cache is the one place where files are links: from ``snapshots/REVISION`` to
    ``blobs`` of the same repository.
    """
    root = directory.resolve()
    target = (directory / name).resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{directory / name} is a link to {target}, outside the checkpoint; copy the file "
            "into the checkpoint if you trust it."
        )
    return directory / name


def _no_weights(directory: Path) -> UserError:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return UserError(
            f"{directory} holds pickled weights only ({pickles[0]}), which moefuse never loads; "
            "convert the checkpoint to safetensors first."
        )
    loose = sorted(path.name for path in directory.glob("*.safetensors"))
    if loose:
        return UserError(
            f"{directory} holds {loose[0]} but neither {INDEX} nor {SINGLE}; download the index "
            "too, or give the shard its published name back."
        )
    return UserError(
        f"{directory} has a {CONFIG} but no safetensors weights; download them into it."
    )


def _missing_shards(directory: Path, missing: list[str], shards: list[str]) -> str:
    present = {path.name for path in directory.glob("*.safetensors")}
    strangers = sorted(present - set(shards))
    hint = (
        f"{strangers[0]} is there under a name the index does not know: rename it back"
        if strangers
        else "download it again"
    )
    count = f"{len(missing)} of {len(shards)} shards" if len(missing) > 1 else "the shard"
    return f"{directory} lacks {count} {missing[0]}, which {INDEX} names; {hint}."


def _match_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise UserError(
                f"{index} says that the tensor {name!r} is in {shard}, but that shard does not "
                "hold it; download the index and that shard again."
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise UserError(
                f"{index.parent / tensor.shard} holds the tensor {name!r}, which {index.name} does "
                "not name; download the index and that shard again."
            )


def read_shard_header(path: Path, shard: str) -> list[TensorInfo]:
    """Read and check the header of one safetensors file; ``shard`` is what to call it.

    Raises ``UserError`` when the file is truncated or its header does not describe it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise _bad_header(path, f"its header would be {length:,} bytes long")
        if length > size - 8:
            raise _truncated(path, 8 + length, size)
        text = file.read(length)
    return _parse_header(path, shard, text, size - 8 - length)


def _parse_header(path: Path, shard: str, text: bytes, data_bytes: int) -> list[TensorInfo]:
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _bad_header(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _bad_header(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    places: list[tuple[int, int, str]] = []
    tensors: list[TensorInfo] = []
    for name, entry in header.items():
        tensor, begin, end = _parse_entry(path, shard, name, entry)
        tensors.append(replace(tensor, begin=8 + len(text) + begin))
        places.append((begin, end, name))
    _check_places(path, places, data_bytes)
    return tensors


def _distinct(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _parse_entry(path: Path, shard: str, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _bad_header(path, f"the entry of {name!r} lacks dtype, shape or offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad_header(path, f"{name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not _whole_numbers([*shape, begin, end]):
        raise _bad_header(path, f"the shape or the offsets of {name!r} are not whole numbers")
    if (end - begin) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise _bad_header(
            path, f"{name!r} has {end - begin:,} bytes for the shape {shape} in {dtype}"
        )
    return TensorInfo(name, dtype, tuple(shape), shard), begin, end


def _whole_numbers(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _check_places(path: Path, places: list[tuple[int, int, str]], data_bytes: int) -> None:
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            what = "overlaps the tensor before it" if begin < reached else "leaves a hole before it"
            raise _bad_header(path, f"{name!r} {what}")
        reached = end
    if reached > data_bytes:
        size = path.stat().st_size
        raise _truncated(path, size - data_bytes + reached, size)
    if reached < data_bytes:
        raise _bad_header(path, f"{data_bytes - reached:,} bytes follow its last tensor")


def _truncated(path: Path, expected: int, size: int) -> UserError:
    return UserError(
        f"{path} is truncated: its header describes {expected:,} bytes and the file has {size:,}; "
        "download it again."
    )


def _bad_header(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a sound safetensors file: {reason}; download it again.")


def _hub_headers(source: str, revision: str | None) -> CheckpointHeaders:
    try:
        config = Path(hf_hub_download(source, CONFIG, revision=revision))
        metadata = get_safetensors_metadata(source, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise hub_error(source, error) from error
    except HUB_ERRORS as error:
        return _cached_headers(source, revision, error)
    tensors: dict[str, TensorInfo] = {}
    for shard, file in metadata.files_metadata.items():
        for name, tensor in file.tensors.items():
            if tensor.dtype not in DTYPE_BITS:
                raise UserError(f"{name!r} of {source} has the unknown dtype {tensor.dtype!r}.")
            tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), shard)
    return _of(source, read_config(config.parent), tensors)


def _of(source: str, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> CheckpointHeaders:
    """Tell of a checkpoint: quantised tensors as plain ones, a whole model's text model alone."""
    plain = as_plain(source, config, tensors)
    family = all_families().get(str(config.get("model_type")))
    if family is not None and family.text_prefix is not None:
        own = {name: family.within_text(name) for name in plain}
        plain = {own[n]: replace(t, name=own[n], renamed=n) for n, t in plain.items()}
    return CheckpointHeaders(source, config, dict(sorted(plain.items())))


def _cached_headers(source: str, revision: str | None, reason: Exception) -> CheckpointHeaders:
    """Read a model that an earlier command downloaded, when the hub cannot be asked."""
    try:
        directory = snapshot_download(source, revision=revision, local_files_only=True)
    except HUB_ERRORS:
        raise hub_error(source, reason) from reason
    return local_headers(source, Path(directory))


def hub_error(source: str, error: Exception) -> UserError:
    """Turn an exception of huggingface_hub into a sentence that names the id and the reason."""
    kind = type(error).__name__
    if isinstance(error, GatedRepoError):
        advice = "accept its licence on the hub and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        advice = "check the spelling, or log in with `hf auth login` if it is private"
    elif isinstance(error, NotASafetensorsRepoError):
        advice = "it has no safetensors weights and moefuse never loads pickles: convert it first"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        advice = f"it has no {CONFIG}, so it is not a model"
    else:
        advice = (
            "it is not in the local cache either; check the connection and HF_HUB_OFFLINE, or give "
            "the path of a local directory"
        )
    return UserError(
        f"{source} is no local directory and could not be read from the hub ({kind}): {advice}."
    )
