"""Copies beside the work, for tensors that are not on the device: one thread reads what comes next, one writes results.

On a GPU each works on a stream of its own. Used in ``with`` blocks, which end the threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from quiesce.memory import Rows, Stored

MOST_WAITING = 2
"""Writes that wait at most: each holds its values on the device."""

Wanted = TypeVar("Wanted")
Found = TypeVar("Found")


def far(rows: Iterable[Rows]) -> bool:
    """True if any is not on the device as it is worked with."""
    return any(isinstance(r, Stored) and not r.near for r in rows)


class Ahead(Generic[Wanted, Found]):
    """What ``read`` returns, one after another; the next one is read while one is in use."""

    def __init__(
        self,
        read: Callable[[Wanted], Found],
        tensors: Callable[[Found], Iterable[Tensor]],
        device: torch.device,
        *,
        threaded: bool,
    ) -> None:
        """``tensors`` are those of what was read; without ``threaded`` nothing is read before it is asked for."""
        self._read, self._tensors, self._device = read, tensors, device
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._next: dict[Hashable, Future[tuple[Found, torch.cuda.Event | None]]] = {}
        self._stream = _stream(device) if threaded else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @property
    def threaded(self) -> bool:
        return self._pool is not None

    def wait(self) -> None:
        """Wait until what is read ahead is there."""
        for waiting in self._next.values():
            waiting.result()

    def of(self, key: Hashable, wanted: Wanted, following: tuple[Hashable, Wanted] | None = None) -> Found:
        """Return what is ``wanted``, of that ``key``; then read the ``following``."""
        if self._pool is None:
            return self._read(wanted)
        waiting = self._next.pop(key, None) or self._pool.submit(self._fetch, wanted)
        found, copied = waiting.result()
        self._next = {} if following is None else {following[0]: self._pool.submit(self._fetch, following[1])}
        if copied is not None:
            running = torch.cuda.current_stream(self._device)
            running.wait_event(copied)
            for tensor in self._tensors(found):
                tensor.record_stream(running)
        return found

    def _fetch(self, wanted: Wanted) -> tuple[Found, torch.cuda.Event | None]:
        if self._stream is None:
            return self._read(wanted), None
        with torch.cuda.stream(self._stream):
            found = self._read(wanted)
            copied = torch.cuda.Event()
            copied.record()
        return found, copied


class Behind:
    """Writes rows; what a GPU made and is kept elsewhere by a thread, while the next is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._pool = None if self._stream is None else ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for written in self._waiting:
                written.result()

    def write(self, rows: Rows, at: slice, values: Tensor) -> None:
        """Write ``rows[at] = values``, at the end of the block at the latest."""
        if self._pool is None or not isinstance(rows, Stored) or rows.data.device == self._device:
            rows[at] = values
            return
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft().result()
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(self._device))
        self._waiting.append(self._pool.submit(self._write, rows, at, values, made))

    def _write(self, rows: Stored, at: slice, values: Tensor, made: torch.cuda.Event) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(made)
            rows[at] = values
        values.record_stream(self._stream)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies on a GPU, behind all work so far."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
