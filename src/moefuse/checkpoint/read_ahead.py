"""Reading ahead: the next layer comes from the disk while this one works.

One thread reads the byte ranges that are wanted next, in small pieces through the operating
system's page cache, and throws away what it read: what stays is that the cache holds it. Copying
(and dequantising) out of the cache then takes memory's speed. Nothing of the next layer lies in
this process, so peak memory stays that of one layer.

The bigger alternative, whole tensors in a bounded queue, would either hold a second layer or, kept
small, leave the disk idle for most of the time that a layer works; ``posix_fadvise(WILLNEED)``
reads as fast, but does not say when it is done, so that nobody could tell how long a job waits for
its disk. Measured on a file of 2.1 GB that was not in the cache: 1.4 to 1.8 GB/s by this thread's
reads, 8.5 GB/s once it is there, whoever put it there.

How far it reads ahead is bounded by half of the memory that the machine has to spare, because what
the cache drops again before it is used was read for nothing.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

PIECE_BYTES = 4_000_000
SPARE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes of one tensor: ``size`` of them from ``begin`` in the file ``path``."""

    name: str
    path: Path
    begin: int
    size: int


class ReadAhead:
    """Reads ahead what :meth:`start` is given, one list of ranges at a time."""

    def __init__(self) -> None:
        self._reading: _Reading | None = None
        self.waited_seconds = 0.0
        """How long callers of :meth:`wait_for` have waited for the disk so far."""

    def start(self, ranges: list[Range]) -> None:
        """Begin to read ``ranges`` in their order, instead of what was begun before.

        Does nothing where all of them are being read already. Raises what stopped the thread.
        """
        if self._reading is not None:
            if self._reading.expects(entry.name for entry in ranges):
                return
            self._reading.stop()
        self._reading = _Reading(ranges)

    def wait_for(self, names: list[str]) -> None:
        """Wait until the tensors ``names``, as far as they are read ahead, are in the cache.

        Raises ``OSError`` where they could not be read.
        """
        if self._reading is not None:
            begin = time.monotonic()
            self._reading.wait_for(names)
            self.waited_seconds += time.monotonic() - begin


class _Reading:
    """One list of ranges and the thread that reads it.

    The thread is a daemon and looks after every piece whether it is still wanted, so it never keeps
    a program from ending.
    """

    def __init__(self, ranges: list[Range]) -> None:
        self._ranges = ranges
        self._place = {entry.name: at for at, entry in enumerate(ranges)}
        self._expected = set(self._place)
        self._changed = threading.Condition()
        self._done = 0
        """How many ranges have been read."""
        self._asked = 0
        """Ranges before this one are waited for, or have been: they are read whatever the room."""
        self._ahead_bytes = 0
        """Bytes read of ranges from ``_asked`` on."""
        self._room = int(psutil.virtual_memory().available * SPARE_SHARE)
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def expects(self, names: Iterable[str]) -> bool:
        """Say whether all of ``names`` are yet to be asked for."""
        return self._expected.issuperset(names)

    def wait_for(self, names: list[str]) -> None:
        """Wait until those of ``names`` that are in the list have been read."""
        self._expected.difference_update(names)
        last = max((self._place[name] for name in names if name in self._place), default=-1)
        with self._changed:
            if last >= self._asked:
                self._asked = last + 1
                # What lies before it counts as used: the caller asks in the order of the list.
                self._ahead_bytes = sum(entry.size for entry in self._ranges[last + 1 : self._done])
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._done > last or self._error is not None)
            if self._done <= last:
                self._raise()

    def stop(self) -> None:
        """End the thread after its current piece; raises what stopped it before."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            self._expected.clear()  # who asks again reads again
            raise error

    def _run(self) -> None:
        try:
            for at, entry in enumerate(self._ranges):
                if not self._has_room(at, entry) or not self._read(entry):
                    return
                with self._changed:
                    self._done = at + 1
                    self._ahead_bytes += entry.size if at >= self._asked else 0
                    self._changed.notify_all()
        except BaseException as error:  # raised again in the caller's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self, at: int, entry: Range) -> bool:
        """Wait until a range may be read; False when it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopped
                    or at < self._asked
                    or self._ahead_bytes + entry.size <= self._room
                )
            )
            return not self._stopped

    def _read(self, entry: Range) -> bool:
        """Read a range into nothing; False when it is not wanted any more."""
        buffer = memoryview(bytearray(min(PIECE_BYTES, entry.size)))
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            left = entry.size
            while left:
                if self._stopped:
                    return False
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise OSError(f"{entry.path} became shorter while it was read")
                left -= count
        return True
