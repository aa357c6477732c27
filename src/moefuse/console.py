"""Progress that people can watch and logs can keep.

On a terminal a bar with rate and time left; elsewhere one plain line now and then. Everything goes
to standard error, so that standard output stays free for results (``--json``).
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_SECONDS = 5.0

Item = TypeVar("Item")

errors = Console(stderr=True, highlight=False)


class _RateColumn(ProgressColumn):
    """Finished steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def say(message: str) -> None:
    """Print one line about what is being done to standard error."""
    errors.print(message, markup=False, soft_wrap=True)


class Meter:
    """The same for work that calls back instead of being looped over; use it in a ``with``."""

    def __init__(self, description: str, total: int, *, done: int = 0) -> None:
        """Show how much of ``total`` is done; ``done`` of it was before, and makes no rate."""
        self.description, self.total, self.done = description, total, done
        self.before = done
        self.start = self.said = time.monotonic()
        self.progress = Progress(*_columns(), console=errors) if sys.stderr.isatty() else None

    def __enter__(self) -> "Meter":
        if self.progress is not None:
            self.progress.start()
            self.task = self.progress.add_task(self.description, total=self.total)
            self.progress.update(self.task, completed=self.done)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def reach(self, done: int, told: str = "") -> None:
        """Show that ``done`` of the total is done, and what there is to tell about it."""
        self.done = done
        description = f"{self.description} {told}".rstrip()
        if self.progress is not None:
            self.progress.update(self.task, completed=done, description=description)
            return
        now = time.monotonic()
        if done == self.total or now - self.said >= PLAIN_SECONDS:
            rate = (done - self.before) / max(now - self.start, 1e-9)
            left = (self.total - done) / max(rate, 1e-9)
            say(f"{description}: {done}/{self.total}, {rate:.1f}/s, {left:.0f} s left")
            self.said = now


def track(items: Iterable[Item], description: str, *, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` while showing how far the work is.

    ``total`` is the number of items, needed only when ``items`` has no length.
    """
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        yield from _bar(items, description, count)
    else:
        yield from _lines(items, description, count)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def _bar(items: Iterable[Item], description: str, count: int) -> Iterator[Item]:
    with Progress(*_columns(), console=errors) as progress:
        yield from progress.track(items, total=count, description=description)


def _lines(items: Iterable[Item], description: str, count: int) -> Iterator[Item]:
    start = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == count or now - said >= PLAIN_SECONDS:
            rate = done / max(now - start, 1e-9)
            left = (count - done) / rate
            say(f"{description}: {done}/{count}, {rate:.1f}/s, {left:.0f} s left")
            said = now
