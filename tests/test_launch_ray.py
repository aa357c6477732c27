"""Layers as tasks of a Ray cluster: the same bytes, also where a worker is killed."""

import dataclasses
import os
import platform
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running import SIZE, SMALL, Ran, contents, run_here, write_jsonl, write_text
from tiny import save_tiny

ray = pytest.importorskip("ray", reason="Ray, the extra 'ray', is not installed here")
ON_RAY = ("--launch", "ray", "--ray-memory", "1GB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    save_tiny(folder / "teacher")
    write_text(folder / "text.txt")
    write_jsonl(folder / "held.jsonl")
    return folder


@pytest.fixture(scope="module")
def _two_workers() -> Iterator[None]:
    ray.init(
        address="local",  # never what else runs on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        object_store_memory=100_000_000,
    )
    yield
    ray.shutdown()


LONG = ("--steps", "300")


def command(folder: Path, place: str, *more: str | Path) -> tuple[str | Path, ...]:
    (folder / place).mkdir(exist_ok=True)
    data = ("--data", folder / "text.txt", "--held-out", folder / "held.jsonl")
    own = (folder / place / "student", "--work", folder / place / "work")
    return ("fuse", folder / "teacher", *own, *SIZE, *SMALL, *data, *more)


def makers(ran: Ran, stage: str) -> dict[int, int]:
    """Return which process made which layer of a stage, by what the command said."""
    found = re.findall(rf"'{stage}' of layer (\d+) was made by process (\d+) on", ran.err)
    assert len(found) == len(dict(found)), "a layer was made twice"
    return {int(layer): int(process) for layer, process in found}


def _title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class Killer(threading.Thread):
    """Kills the process that distils a layer, once, when it is in the midst of it."""

    def __init__(self, work: Path, layer: int) -> None:
        super().__init__()
        self.work, self.layer = work, layer
        self.killed: int | None = None
        self.others: set[tuple[str, int]] = set()

    def run(self) -> None:
        end = time.monotonic() + 120
        while self.killed is None and time.monotonic() < end:
            time.sleep(0.005)
            if not any(self.work.glob(f"distilled-*/layer-{self.layer:03d}.safetensors-*")):
                continue
            running = {
                (title[0], process.pid)
                for process in psutil.Process().children(recursive=True)
                if (title := _title(process)) and title[0].startswith("ray::distill layer")
            }
            for title, process in running:
                if title.split()[-1] == str(self.layer):
                    os.kill(process, signal.SIGKILL)
                    self.killed = process
                    self.others = running - {(title, process)}


@pytest.mark.usefixtures("_two_workers")
def test_same_bytes(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here(capfd, *command(folder, "here")).status == 0

    ran = run_here(capfd, *command(folder, "there", *ON_RAY))

    assert ran.status == 0, ran.err
    assert contents(folder / "there" / "student") == contents(folder / "here" / "student")
    for stage in ("group", "factor", "distill"):
        assert makers(ran, stage).keys() == {1, 2}
        assert os.getpid() not in makers(ran, stage).values()
    assert not any((folder / "there" / "work").rglob("*.partial"))
    assert not any((folder / "there" / "work").glob("checked-shared*"))


@pytest.mark.usefixtures("_two_workers")
def test_a_killed_worker_costs_its_layer_alone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(capfd, *command(folder, "undisturbed", *LONG)).status == 0
    work = folder / "disturbed" / "work"

    killer = Killer(work, layer=2)
    killer.start()
    ran = run_here(capfd, *command(folder, "disturbed", *ON_RAY, *LONG))
    killer.join()

    assert ran.status == 0, ran.err
    assert killer.killed is not None
    made = makers(ran, "distill")
    assert made[2] != killer.killed
    assert killer.others <= {("ray::distill layer 1", made[1])}
    assert contents(folder / "disturbed" / "student") == contents(
        folder / "undisturbed" / "student"
    )
    assert not any(work.rglob("*.partial"))


@pytest.mark.usefixtures("_two_workers")
def test_own_neurons(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neurons are weighed and distilled as tasks; above each other they are distilled here."""
    data = ("--data", folder / "text.txt", "--held-out-tokens", "0")
    for inputs in ("teacher", "student"):
        settings = (*SMALL, *data, "--expert-bits", "3", "--inputs", inputs)
        for place, launch in (("one", ()), ("many", ON_RAY)):
            out = folder / f"{place}-{inputs}" / "student"
            out.parent.mkdir()
            ran = run_here(capfd, "fuse", folder / "teacher", out, *settings, *launch)
            assert ran.status == 0, ran.err
        assert makers(ran, "group").keys() == makers(ran, "factor").keys() == {1, 2}
        assert makers(ran, "distill").keys() == ({1, 2} if inputs == "teacher" else set())
        assert ("distilled one after another" in ran.err) == (inputs == "student")
        assert contents(folder / f"many-{inputs}") == contents(folder / f"one-{inputs}")


@pytest.mark.usefixtures("_two_workers")
def test_a_mistake_in_a_task_is_one_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moefuse.pipeline import Job

    # In this process alone: tasks then find no calibration.
    monkeypatch.setattr(Job, "calibrate", lambda _: None)

    ran = run_here(capfd, *command(folder, "mistaken", *ON_RAY))

    assert ran.status == 2
    assert ran.err.splitlines()[-1].startswith(f"moefuse: On {platform.node()}: ")
    assert "has no artifacts of 'calibrate'" in ran.err


def test_an_address_where_nothing_listens() -> None:
    from moefuse.errors import UserError
    from moefuse.launch.ray import _check_reachable

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        _check_reachable(f"127.0.0.1:{port}")
        _check_reachable(f"ray://127.0.0.1:{port}")
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        with pytest.raises(UserError, match=f"No Ray cluster answers at --ray-address {address}"):
            _check_reachable(address)
    for elsewhere in (None, "auto", "local"):
        _check_reachable(elsewhere)


def test_machines_that_differ_are_refused() -> None:
    from moefuse.errors import UserError
    from moefuse.launch.ray import _check_alike, _Seen

    own = _Seen("head", ("0.1.0", "2.13.0", "5.19.0"), work=True, fingerprint="a")
    _check_alike(dataclasses.replace(own, machine="node-7"), own, Path("/shared/work"))
    for change, words in (
        ({"work": False}, "node-7 does not see the work directory /shared/work of head"),
        ({"versions": ("0.1.0", "2.12.0", "5.19.0")}, "node-7 has torch 2.12.0 and head has 2.13"),
        ({"fingerprint": "b"}, "node-7 sees another checkpoint than head"),
    ):
        seen = dataclasses.replace(own, machine="node-7", **change)
        with pytest.raises(UserError, match=words):
            _check_alike(seen, own, Path("/shared/work"))


# The last of all: it leaves Ray without a worker that has imported everything.
@pytest.mark.usefixtures("_two_workers")
def test_a_layer_that_always_dies_keeps_the_others(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = folder / "given-up" / "work"
    killer = Killer(work, layer=2)
    killer.start()
    ran = run_here(capfd, *command(folder, "given-up", *ON_RAY, *LONG, "--ray-retries", "0"))
    killer.join()

    assert ran.status == 2
    assert "The process or machine of 'distill' of layer 2 died, 1 of 1 times" in ran.err
    before = {path: path.stat().st_mtime_ns for path in work.glob("*/layer-*.safetensors")}
    assert len(before) in (2, 3)  # the factors of both layers and maybe one that is distilled

    # Going on without Ray.
    assert run_here(capfd, *command(folder, "given-up", *LONG)).status == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not any(work.rglob("*.partial"))
