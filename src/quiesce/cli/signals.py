"""Ctrl-C and SIGTERM: how a command ends in order, and says how to go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Stopped(BaseException):
    """The user, or the system, wants the program to end. Neither an Exception, nor what click catches."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise :class:`Stopped`, so that all is left in order."""

    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:  # a worker of a DataLoader: it just ends
            os._exit(128 + number)
        raise Stopped(number)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def ctrl_c_as_keyboard_interrupt() -> Iterator[None]:
    """Within the block, Ctrl-C raises what Python itself raises: Ray's compiled code fails at any other exception."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def interruptible(kept: Path) -> Iterator[None]:
    """Within the block, to be stopped says how to go on from the finished units in ``kept``."""
    from quiesce.reconstruct.journal import finished_units

    try:
        yield
    except Stopped as stopped:
        if count := finished_units(kept):
            again = "the same command (without --restart) goes on behind them"
            stopped.add_note(f"after {count} finished units, kept in {kept}; {again}")
        raise
