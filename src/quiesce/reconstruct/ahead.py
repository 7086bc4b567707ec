"""Fetching ahead: while a step runs, a thread gathers the batch of the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Fetched = tuple[list[Tensor], torch.cuda.Event | None]


class Ahead:
    """``fetch(number)`` for one number after another, each made while the one before is in use; close it after use.

    On a GPU, copies run beside the step, on a stream of their own.
    """

    def __init__(self, fetch: Callable[[int], Sequence[Tensor]], count: int, device: torch.device) -> None:
        self._fetch = fetch
        self._count = count
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = ThreadPoolExecutor(1, "batches")
        self._pending: dict[int, Future[Fetched]] = {}

    def __getitem__(self, number: int) -> list[Tensor]:
        """Return what ``fetch`` gives for ``number``; numbers in order are fetched ahead, others when asked for."""
        future = self._pending.pop(number, None) or self._pool.submit(self._made, number)
        tensors, copied = future.result()
        self._pending = {n: self._pool.submit(self._made, n) for n in [number + 1] if n < self._count}
        if copied is not None:
            running = torch.cuda.current_stream(self._device)
            running.wait_event(copied)
            for tensor in tensors:
                tensor.record_stream(running)
        return tensors

    def _made(self, number: int) -> Fetched:
        if self._stream is None:
            return list(self._fetch(number)), None
        with torch.cuda.stream(self._stream):
            # Rows on the device may still be written by what runs there.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            tensors = list(self._fetch(number))
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return tensors, copied

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
