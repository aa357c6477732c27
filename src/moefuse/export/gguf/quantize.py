"""llama.cpp's own quantiser, through llama-cpp-python (extra ``llama-cpp``)."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moefuse.errors import UserError

PREFIX = "LLAMA_FTYPE_MOSTLY_"


def _package() -> Any | None:
    try:
        return importlib.import_module("llama_cpp")  # an extra that takes minutes to build
    except ImportError:
        return None


def check_available(quant: str, written: Iterable[str], named: Iterable[str]) -> None:
    """Raise ``UserError`` unless llama.cpp is there and knows ``quant``.

    ``written`` are the kinds that are made here without it, ``named`` those that the gguf package
    has a name for: they tell an unknown kind where llama.cpp is not there to be asked.
    """
    package = _package()
    names = named if package is None else vars(package)
    starts = PREFIX if package is not None else PREFIX.removeprefix("LLAMA_FTYPE_")
    here = tuple(written)
    own = sorted({n.removeprefix(starts) for n in names if n.startswith(starts)} - {*here})
    if quant not in own:
        raise UserError(
            f"--quant {quant} is unknown; choose auto, {', '.join(here)}, or one that "
            f"llama-cpp-python makes: {', '.join(own)}."
        )
    if package is None:
        raise UserError(
            f"--quant {quant} is made by llama.cpp itself; install llama-cpp-python (pip install "
            f'"moefuse[llama-cpp]", some ten minutes of building), or choose {_any_of(here)}.'
        )


def _any_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def quantize(source: Path, target: Path, quant: str) -> None:
    """Quantise the GGUF file ``source`` to ``target``, after ``check_available`` has passed.

    Raises ``UserError`` where llama.cpp fails.
    """
    package: Any = _package()
    options = package.llama_model_quantize_default_params()
    options.ftype = getattr(package, PREFIX + quant)
    options.nthread = 0
    failed = package.llama_model_quantize(
        str(source).encode(), str(target).encode(), package.ctypes.byref(options)
    )
    if failed:
        raise UserError(
            f"llama.cpp could not quantise to {quant}; its own words are above. Some kinds need "
            "an importance matrix, which is not made here."
        )
