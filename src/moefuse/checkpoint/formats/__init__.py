"""Quantised checkpoints, read as the plain ones that they stand for.

One file a format, found by listing, with one instance named ``FORMAT``. From headers alone a format
tells which stored tensors make up a weight, its name and shape; reading it, it makes one weight at
a time of them. Everything else in moefuse sees plain tensors.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from moefuse.checkpoint.formats.base import Format, quantization_method, settings_of
from moefuse.checkpoint.tensor_info import TensorInfo
from moefuse.errors import UserError

__all__ = [
    "Format",
    "all_formats",
    "as_plain",
    "check_known",
    "format_of",
    "known_formats",
    "quantization_method",
    "settings_of",
]


@cache
def all_formats() -> tuple[Format, ...]:
    """Return every format of this folder, by its title."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{n}") for n in names if n not in ("base", "bits")]
    return tuple(sorted((module.FORMAT for module in found), key=lambda known: known.title))


def known_formats() -> str:
    """Return the titles of all formats, for a sentence."""
    return ", ".join(known.title for known in all_formats())


def format_of(config: Mapping[str, Any]) -> Format | None:
    """Return the format that a ``config.json`` names; None where it names none or one not known."""
    method = quantization_method(config)
    if method is None:
        return None
    return next((known for known in all_formats() if known.method == method), None)


def check_known(source: str, config: Mapping[str, Any]) -> None:
    """Raise ``UserError`` for a ``config.json`` that names a format which moefuse cannot read.

    Formats of the same tensor names may mean other numbers, so nothing is guessed from those.
    """
    method = quantization_method(config)
    if method is not None and format_of(config) is None:
        raise UserError(
            f"{source} is quantised with {method}, which is no format that moefuse reads: "
            f"{known_formats()}. Start from the checkpoint that was not quantised."
        )


def as_plain(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors with every quantised weight as the one that it stands for.

    ``source`` is what to call the checkpoint. Raises ``UserError`` where parts of a weight are
    missing or do not fit each other.
    """
    known, settings = format_of(config), settings_of(config)
    plain = dict(tensors)
    if known is None or settings is None:
        return plain
    for packed in known.find(source, tensors, settings):
        for _, part in packed.parts:
            plain.pop(part.name, None)
        plain[packed.name] = packed.named(config)
    return {name: t for name, t in plain.items() if not name.endswith(known.leaves_out)}
