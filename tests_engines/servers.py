"""Starting a server in a process of its own, and stopping it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from openai import OpenAI

# Far more than it takes where nothing else runs; a machine may be shared by others.
SECONDS_TO_START, SECONDS_TO_STOP = 900, 300
BIN = Path(sys.executable).parent


@dataclass
class Server:
    """A running server: its process, its address and its log."""

    process: subprocess.Popen
    address: str
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def stop(self, how: signal.Signals) -> int:
        """Send a signal; return the exit status when the process and all its children are gone."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        self.process.send_signal(how)
        status = self.process.wait(SECONDS_TO_STOP)
        _, alive = psutil.wait_procs(family[1:], SECONDS_TO_STOP)
        assert not alive, alive
        return status


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Server]:
    """Run ``command`` with a free ``--port`` and wait until it answers."""
    port = free_port()
    # "--" ends moefuse's own flags, so the port comes before.
    place = command.index("--") if "--" in command else len(command)
    command = [*command[:place], "--port", str(port), *command[place:]]
    command[0] = str(BIN / command[0])
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            _end(server)


def _end(server: Server) -> None:
    """Stop a server; whatever still runs of it when that has taken too long is killed."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    try:
        server.stop(signal.SIGTERM)
    finally:
        for process in family:
            if process.is_running():
                process.kill()
        server.process.kill()


def _wait(server: Server) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text()[-6000:]
        try:
            if httpx.get(f"{server.address}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise AssertionError(server.log.read_text()[-6000:])
