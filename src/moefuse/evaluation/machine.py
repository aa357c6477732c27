"""What a report says about the machine and the versions it was made with, and nothing more."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("moefuse", "torch", "transformers", "safetensors", "numpy")
CPU_FACTS = Path("/proc/cpuinfo")
# The directories of an absolute path, wherever one can start in a command line.
ABSOLUTE_DIRECTORY = re.compile(r"(?<![\w.\-/])~?/(?:[^\s'\"/]+/)*")


def machine_meta(
    command: str,
    *,
    device: str = "cpu",
    data: dict[str, Any] | None = None,
    **details: Any,
) -> dict[str, Any]:
    """Return what a report says about its making.

    ``command`` is the command line; directories of absolute paths are taken out of it. ``data``
    says what the figures were measured on (name, documents, tokens, a fingerprint). ``details``
    come last, as they are. Nothing names the machine or its folders.
    """
    return {
        "command": ABSOLUTE_DIRECTORY.sub("", command),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": _device(device),
        "data": data,
        **details,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return moefuse's own commit, with ``-dirty`` if changed, when it runs from its repository."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_FACTS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def _device(device: str) -> str:
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else str(kind)
