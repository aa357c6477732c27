"""llama.cpp's own quantiser, through llama-cpp-python (extra ``llama-cpp``)."""

import importlib
from pathlib import Path
from typing import Any

from moefuse.errors import UserError

PREFIX = "LLAMA_FTYPE_MOSTLY_"


def _package(quant: str) -> Any:
    try:
        return importlib.import_module("llama_cpp")  # an extra that takes minutes to build
    except ImportError as error:
        raise UserError(
            f"--quant {quant} is made by llama.cpp itself; install llama-cpp-python (pip install "
            '"moefuse[llama-cpp]", some ten minutes of building), or choose F32, F16, BF16 or Q8_0.'
        ) from error


def check_available(quant: str) -> None:
    """Raise ``UserError`` unless llama.cpp is there and knows ``quant``."""
    package = _package(quant)
    if not hasattr(package, PREFIX + quant):
        known = sorted(n.removeprefix(PREFIX) for n in dir(package) if n.startswith(PREFIX))
        raise UserError(f"--quant {quant} is unknown; choose auto, F32 or {', '.join(known)}.")


def quantize(source: Path, target: Path, quant: str) -> None:
    """Quantise the GGUF file ``source`` to ``target``; raises ``UserError`` where that fails."""
    package = _package(quant)
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
