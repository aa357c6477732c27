"""Layers as tasks of a Ray cluster; the one file that imports Ray.

A task makes one layer of one stage and leaves its files in the work directory, which all machines
share. Ray begins a task anew when its process or machine dies. The command itself reads the text,
calibrates, and writes the student: these go through the layers in order.
"""

import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch

from moefuse import artifacts
from moefuse.calibration.collect import Batch
from moefuse.checkpoint.headers import local_directory
from moefuse.checkpoint.reader import CheckpointReader
from moefuse.config import LaunchConfig, parse_bytes
from moefuse.console import say, track
from moefuse.errors import UserError
from moefuse.pipeline import CHECKED, Job

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise UserError(
        '--launch ray needs Ray, which is an extra: pip install "moefuse[ray]", on every machine.'
    ) from error

CONNECT_SECONDS = 5.0
COMPARED = ("moefuse", "torch", "transformers")
"""Packages whose versions decide what bytes a layer gets, or whether it is made at all."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Student:
    """What a job is made from on every machine: the command's own arguments."""

    checkpoint: str | Path
    values: Mapping[str, Any]
    revision: str | None
    trust_remote_code: bool

    def rooted(self) -> "Student":
        """Return the same for a process that runs in another directory."""
        place = local_directory(self.checkpoint)
        return self if place is None else replace(self, checkpoint=place.absolute())


@contextmanager
def cluster(student: Student, options: LaunchConfig) -> "Iterator[RayLayers]":
    """Connect to a Ray cluster, or start one of this machine, for as long as the block lasts.

    A connection that is there already is used and left. Raises ``UserError`` where none is made.
    """
    layers = RayLayers(student.rooted(), options)
    if ray.is_initialized():
        yield layers
        return
    _check_reachable(options.ray_address)
    # Nothing is told to anybody unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=options.ray_address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        place = options.ray_address or "of this machine"
        raise UserError(f"The Ray cluster {place} cannot be reached: {reason}.") from error
    try:
        yield layers
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise ``UserError`` where nothing listens: Ray itself tries for minutes and then exits."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"No Ray cluster answers at --ray-address {address} ({error}); give the address that "
            "'ray start --head' printed."
        ) from error


class RayLayers:
    """Makes a job's layers as tasks; an ``Elsewhere``."""

    def __init__(self, student: Student, options: LaunchConfig) -> None:
        self.student, self.options = student, options

    def check(self, job: Job) -> None:
        """Refuse machines that do not see what this one sees; raises ``UserError``."""
        if job.device.startswith("cuda:"):
            raise UserError(f"--device is {job.device}, but Ray chooses GPUs; give --device cuda.")
        if job.on_own_inputs and job.distillation.steps:
            say(
                "Layers are distilled one after another, in this process, above the students of "
                "lower ones; with --inputs teacher they are distilled as tasks."
            )
        needs = self._needs(job)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _has(node, needs)]
        if not nodes:
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
            say(f"No machine of the Ray cluster has {wanted}; tasks wait until one joins.")
        self._compare(job.work.absolute(), nodes)

    def _compare(self, work: Path, nodes: list[str]) -> None:
        """Refuse machines with other software, or another checkpoint or work directory."""
        mark = work / f"{CHECKED}-shared-{uuid4().hex}.json"
        look = ray.remote(num_cpus=0)(_look)
        artifacts.write_json(mark, {})
        try:
            own = _look(self.student, mark)
            tasks = {}
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                task = look.options(scheduling_strategy=there).remote(self.student, mark)
                tasks[task] = f"Looking at the machine {node}"
            for _, seen in self._results(tasks):
                _check_alike(seen, own, work)
        finally:
            mark.unlink()

    def make(self, job: Job, name: str, layers: list[int]) -> None:
        """Have layers of a stage made as tasks and wait for all of them; raises ``UserError``."""
        stage = job.layer_stage(name)
        if job.device == "cuda":
            torch.cuda.empty_cache()  # A task may have the GPU that this process calibrated on.
        needs = self._needs(job)
        threads = int(needs["CPU"])
        order = _Order(
            self.student, job.work.absolute(), job.device, threads, name, stage.directory.name
        )
        batches = ray.put(job.batches)
        task = self._task(needs)
        tasks = {
            task.options(name=f"{name} layer {layer}").remote(order, batches, layer): (
                f"'{name}' of layer {layer}"
            )
            for layer in layers
        }
        for what, maker in track(self._results(tasks), f"Ray: {name}", total=len(tasks)):
            say(f"{what} was made by {maker}")
        # A network file system may show what others wrote only once the directory is listed.
        artifacts.remove_leftovers(stage.directory)
        missing = [layer for layer in layers if not stage.path(layer).exists()]
        if missing:
            raise UserError(
                f"The tasks of layers {missing} ended, but {stage.directory} does not show their "
                "files; --work must lie on one file system that all machines mount."
            )

    def _task(self, needs: Mapping[str, float]) -> Any:
        terms: dict[str, Any] = {
            "num_cpus": needs["CPU"],
            "num_gpus": needs.get("GPU", 0),
            "memory": needs["memory"],
            "max_retries": self.options.ray_retries,
            # A network file system may fail for a moment. A UserError is no OSError.
            "retry_exceptions": [OSError],
        }
        return ray.remote(**terms)(_make)

    def _needs(self, job: Job) -> dict[str, float]:
        """Return what a task takes of a machine, by Ray's names: CPUs, GPUs, memory in bytes."""
        given = self.options.ray_memory
        with job.suited_threads():
            threads = self.options.ray_cpus or torch.get_num_threads()
        memory = parse_bytes(given, "--ray-memory") if given else job.estimate.memory_bytes
        needs: dict[str, float] = {"CPU": threads, "memory": memory}
        return needs | {"GPU": 1} if job.device == "cuda" else needs

    def _results(self, tasks: Mapping[Any, Key]) -> Iterator[tuple[Key, Any]]:
        """Yield what each task is for and its result, as they end; then none is left running.

        Raises ``UserError`` for what the user can mend, and for a task that died too often.
        """
        running = list(tasks)
        try:
            while running:
                (ended,), running = ray.wait(running, num_returns=1)
                yield tasks[ended], self._result(ended, tasks[ended])
        finally:
            for task in running:
                ray.cancel(task, force=True)

    def _result(self, task: Any, what: object) -> Any:
        try:
            return ray.get(task)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        except RayError as error:
            times = self.options.ray_retries + 1
            raise UserError(
                f"The process or machine of {what} died, {times} of {times} times "
                f"({type(error).__name__}); finished layers are kept: give the same command again, "
                "with more --ray-memory if a machine ran out of it."
            ) from error


def _has(node: Mapping[str, Any], needs: Mapping[str, float]) -> bool:
    return all(node["Resources"].get(name, 0) >= amount for name, amount in needs.items())


def _check_alike(seen: "_Seen", own: "_Seen", work: Path) -> None:
    """Raise ``UserError`` where another machine's tasks would not make what this one would."""
    if not seen.work:
        raise UserError(
            f"{seen.machine} does not see the work directory {work} of {own.machine}; --work must "
            "lie on a file system that all machines of the Ray cluster mount in the same place."
        )
    for name, here, there in zip(COMPARED, own.versions, seen.versions, strict=True):
        if here != there:
            raise UserError(
                f"{seen.machine} has {name} {there} and {own.machine} has {here}; install the "
                "same on all machines of the Ray cluster."
            )
    if seen.fingerprint != own.fingerprint:
        raise UserError(
            f"{seen.machine} sees another checkpoint than {own.machine} under the same name; put "
            "one where all machines of the Ray cluster see it."
        )


# What follows runs in tasks.


@dataclass(frozen=True)
class _Seen:
    """What one machine has: versions of ``COMPARED``, the work directory, which checkpoint."""

    machine: str
    versions: tuple[str, ...]
    work: bool
    fingerprint: str


@dataclass(frozen=True)
class _Order:
    """What the tasks of one stage have in common."""

    student: Student
    work: Path
    device: str
    threads: int
    stage: str
    directory: str

    def job(self) -> Job:
        """Make the job that the command has made; raises ``UserError``."""
        return Job(
            self.student.checkpoint,
            self.work,
            {**self.student.values, "device": self.device},
            revision=self.student.revision,
            trust_remote_code=self.student.trust_remote_code,
        )


def _look(student: Student, mark: Path) -> _Seen:
    with _saying_where():
        reader = CheckpointReader.open(
            student.checkpoint,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
        )
    versions = tuple(version(name) for name in COMPARED)
    return _Seen(platform.node(), versions, mark.exists(), reader.fingerprint())


def _make(order: _Order, batches: list[Batch], layer: int) -> str:
    """Make one layer of a stage and return who did."""
    torch.set_num_threads(order.threads)
    with _saying_where():
        job = order.job()
        job.batches = batches  # So that no other machine needs the text.
        if job.layer_stage(order.stage).directory.name != order.directory:
            raise UserError(
                f"{order.stage} belongs in {order.directory} for the command, but not here; "
                "have the same checkpoint, moefuse and devices on all machines."
            )
        job.make_apart(order.stage, layer)
    return f"process {os.getpid()} on {platform.node()}"


@contextmanager
def _saying_where() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"On {platform.node()}: {error}") from error
