"""Who the original of a student is: its name on the hub, and what of its card holds on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from moefuse.checkpoint.headers import CARD
from moefuse.export.record import Base

if TYPE_CHECKING:
    # torch takes seconds to import, and reading a card needs none of it.
    from moefuse.checkpoint.reader import CheckpointReader

CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of a card's front matter that are as true of a student as of its teacher."""
CACHED = "models--"
"""How the hub's cache begins the name of a model's directory."""


def original_of(reader: "CheckpointReader") -> Base:
    """Tell who the teacher is, by its place in the hub's cache, its own card or its directory."""
    front = front_matter(reader.directory / CARD)
    metadata = {key: front[key] for key in CARRIED_OVER if _is_words(front.get(key))}
    directory = reader.directory.resolve()
    hub_id = _hub_id(directory)
    if hub_id is not None:
        return Base(hub_id, hub_id, directory.name, metadata)
    named = front.get("base_model")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    candidates = (str(named), directory.name) if isinstance(named, str) else (directory.name,)
    base_model = next((name for name in candidates if is_repo_id(name)), None)
    return Base(directory.name, base_model, None, metadata)


def front_matter(card: Path) -> dict[str, Any]:
    """Return the YAML block at the head of a card; empty where there is none that can be read."""
    try:
        found = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def is_repo_id(name: str) -> bool:
    """Say whether the hub would take ``name`` as a repository's."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _hub_id(directory: Path) -> str | None:
    """Return the hub id of a snapshot in the hub's cache, None for any other directory.

    A resolved snapshot lies at ``models--organisation--name/snapshots/commit``.
    """
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith(CACHED):
        return None
    return repository.removeprefix(CACHED).replace("--", "/")


def _is_words(value: Any) -> bool:
    """Say whether a value is text or a list of texts; YAML of strangers holds anything."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word for word in words)
