"""``moefuse serve``: which engine, what is said, and what is refused before anything is loaded.

That vLLM and Transformers then serve is tested where vLLM is, in ``tests_engines``.
"""

import importlib.util
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import run_here

from moefuse import serve

Tiny = Callable[..., Path]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``only("vllm")``: of the engines' packages these alone are found."""

    def install(*names: str) -> None:
        found = lambda name: importlib.util.spec_from_loader(name, None) if name in names else None  # noqa: E731
        monkeypatch.setattr(serve, "find_spec", found)

    return install


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_vllm_is_taken_where_it_is(only: Callable[..., None]) -> None:
    only("vllm", *serve.TRANSFORMERS_NEEDS)
    assert serve.choose_engine() == "vllm"
    only(*serve.TRANSFORMERS_NEEDS)
    assert serve.choose_engine() == "transformers"


def test_nothing_to_serve_by(
    only: Callable[..., None], tiny_checkpoint: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    only("openai", "pydantic")

    ran = run_here(capfd, "serve", tiny_checkpoint())

    assert ran.status == 2
    assert ran.err == (
        'moefuse: Nothing is installed that could serve: pip install "moefuse[vllm]", or for '
        "'transformers serve' pip install \"transformers[serving]\" (fastapi, uvicorn missing).\n"
    )


def test_a_taken_port(
    only: Callable[..., None], tiny_checkpoint: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    only("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        ran = run_here(capfd, "serve", tiny_checkpoint(), "--port", str(port))

    assert ran.status == 2
    assert f"Nothing can listen at 127.0.0.1, port {port}: Address already in use;" in ran.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--port", "0"), "--port is 0; give a number from 1 to 65535."),
        (("--port", "65536"), "--port is 65536; give a number from 1 to 65535."),
        (("--host", "999.1.1.1"), "Nothing can listen at 999.1.1.1, port 8000: "),
    ],
)
def test_addresses_that_are_none(
    flags: tuple[str, ...],
    words: str,
    only: Callable[..., None],
    tiny_checkpoint: Tiny,
    capfd: pytest.CaptureFixture[str],
) -> None:
    only("vllm")
    ran = run_here(capfd, "serve", tiny_checkpoint(), *flags)

    assert ran.status == 2
    assert words in ran.err


def test_checkpoints_that_are_none(
    only: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    only("vllm")

    assert "does not exist" in run_here(capfd, "serve", tmp_path / "none").err
    assert run_here(capfd, "serve", tmp_path).status == 2


def test_flags_of_vllm_are_for_vllm(
    only: Callable[..., None], tiny_checkpoint: Tiny, capfd: pytest.CaptureFixture[str]
) -> None:
    only(*serve.TRANSFORMERS_NEEDS)

    ran = run_here(capfd, "serve", tiny_checkpoint(), "--", "--dtype", "float32")

    assert ran.status == 2
    assert "--dtype float32 is for vLLM, which is not installed here" in ran.err


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("localhost", "localhost"),
    ],
)
def test_the_address_that_is_told_can_be_reached(host: str, reached: str) -> None:
    told = serve.announcement("vllm", "out", "out", host, 8000)

    assert f"at http://{reached}:8000/v1 as soon" in told
    assert f"curl http://{reached}:8000/v1/completions" in told


def test_vllm_takes_this_process_s_place(
    only: Callable[..., None],
    tiny_checkpoint: Tiny,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    only("vllm")
    became: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(serve.os, "execv", lambda *call: became.append(call) or sys.exit(0))
    path = tiny_checkpoint()

    ran = run_here(capfd, "serve", path, "--port", str(port), "--", "--dtype", "float32")

    assert ran.status == 0
    assert f"curl http://127.0.0.1:{port}/v1/completions" in ran.err
    [(program, command)] = became
    assert program == command[0] == sys.executable
    assert str(path) in command
    rest = [path.name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    assert command[-8:] == ["--served-model-name", *rest]
