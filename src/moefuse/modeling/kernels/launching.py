"""Launches of Triton's kernels, which may be recorded to be repeated.

While ``recorded`` computes something, every launch and every ``temporary`` is written down in the
``Recording`` that it makes; ``repeating`` says what is recorded and when it holds.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

PIECE = 256
"""Bytes that the place of every temporary is a multiple of, as the allocator's are."""
FLOAT = torch.float32.itemsize
_recorder = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel, of which type checkers know nothing."""
    made = kernel[grid](*arguments, **constants)
    book = getattr(_recorder, "book", None)
    if book is not None:
        book.launches.append((kernel, made, grid, arguments, constants))


def temporary(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor on the device of ``like``, which nobody needs after the call."""
    made = like.new_empty(shape, dtype=dtype or like.dtype)
    book = getattr(_recorder, "book", None)
    if book is not None:
        book.temporaries.append(made)
    return made


def beside_launches() -> None:
    """Say that something besides launches computes, so that repeating these is not enough."""
    book = getattr(_recorder, "book", None)
    if book is not None:
        book.whole = False


@dataclass(frozen=True)
class _Place:
    """Where an argument lies: which of the call's buffers, bytes from its begin, what it holds."""

    argument: int
    buffer: int
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view_of(self, buffers: list[Tensor]) -> Tensor:
        """Return that part of the buffer, as only the interpreter needs it."""
        size = prod(self.shape) * self.dtype.itemsize
        raw = buffers[self.buffer].view(-1).view(torch.uint8)
        return raw[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Launch:
    """One launch: what runs, and its arguments but for those that every call has anew."""

    run: Callable[..., None]
    compiled: bool
    arguments: list[Any]
    places: list[_Place]


@dataclass(frozen=True)
class Recording:
    """Launches that make an output of the form of ``given[0]`` from the tensors ``given``.

    ``floats`` is how many of them have room for all temporaries, ``kept`` what is only kept alive.
    Compiled kernels are told addresses: Triton would ask every tensor for its own and the driver
    for every address, and look up which kernel its arguments call for.
    """

    launches: list[_Launch]
    floats: int
    kept: list[Tensor]

    def repeat(self, *given: Tensor) -> Tensor:
        """Launch all with other tensors ``given``, of the shapes and dtypes that were recorded."""
        out = torch.empty_like(given[0])
        buffers = [*given, out, given[0].new_empty(self.floats, dtype=torch.float32)]
        addresses = [buffer.data_ptr() for buffer in buffers]
        stream = {"stream": _stream(out)} if self.launches[0].compiled else {}
        for one in self.launches:
            arguments = one.arguments.copy()
            for place in one.places:
                arguments[place.argument] = (
                    addresses[place.buffer] + place.offset
                    if one.compiled
                    else place.view_of(buffers)
                )
            one.run(*arguments, **stream)
        return out


def _stream(tensor: Tensor) -> int:
    return triton.runtime.driver.active.get_current_stream(tensor.device.index)  # type: ignore[reportAttributeAccessIssue]


class _Book:
    """What is written down while something is computed."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.temporaries: list[Tensor] = []
        self.whole = True

    def recording(self, buffers: list[Tensor], weights: list[Tensor]) -> Recording:
        """Return the recording for a call's ``buffers``, whose layer has ``weights``."""
        starts = {buffer.data_ptr(): (number, 0) for number, buffer in enumerate(buffers)}
        size = 0
        for tensor in self.temporaries:
            starts[tensor.data_ptr()] = (len(buffers), size)
            size += -(-tensor.nbytes // PIECE) * PIECE
        launches = [_launch(*written, starts) for written in self.launches]
        changing = {*starts, *(weight.data_ptr() for weight in weights)}
        kept = [
            argument
            for _, _, _, arguments, _ in self.launches
            for argument in arguments
            if isinstance(argument, Tensor) and argument.data_ptr() not in changing
        ]
        return Recording(launches, -(-size // FLOAT), kept)


def _launch(
    kernel: Any, made: Any, grid: tuple[int, ...], arguments: tuple[Any, ...],
    constants: dict[str, Any], starts: dict[int, tuple[int, int]],
) -> _Launch:  # fmt: skip
    compiled = made is not None
    given = list(arguments)
    if compiled:
        given += [constants[name] for name in kernel.arg_names[len(arguments) :]]
    places = []
    for number, argument in enumerate(given):
        if not isinstance(argument, Tensor):
            continue
        address = argument.data_ptr()
        if address in starts:
            places.append(_Place(number, *starts[address], argument.shape, argument.dtype))
        if compiled or address in starts:
            given[number] = address
    run = made[(*grid, 1, 1)[:3]] if compiled else partial(kernel[grid], **constants)
    return _Launch(run, compiled, given, places)


def recorded(
    compute: Callable[[], Tensor], given: tuple[Tensor, ...], weights: list[Tensor]
) -> tuple[Tensor, Recording | None]:
    """Return what ``compute`` does from ``given``, and the recording of it if launches are all.

    ``given`` lie in one piece. A recording keeps tensors that it reads alive, tables of addresses
    say, but not ``weights``.
    """
    book = _Book()
    _recorder.book = book
    try:
        out = compute()
    finally:
        _recorder.book = None
    if not book.whole or not book.launches:
        return out, None
    return out, book.recording([*given, out], weights)
