"""Progress of long work, as a callback ``(stage, done, total)`` that a user interface may show."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done, and optimization steps done and planned; the plan may grow on the way."""


class Progress:
    """Counts optimization steps and passes them on."""

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback
        self.stage = ""
        self.done = 0
        self.total = 0
        self.later = 0
        """Steps to come behind all that is planned: a pass plans no more than itself."""

    def plan(self, steps: int) -> None:
        """Add ``steps`` to what is planned (fewer when negative)."""
        self.total += steps

    def enter(self, stage: str) -> None:
        self.stage = stage
        self._report()

    def tick(self) -> None:
        self.done += 1
        self._report()

    def _report(self) -> None:
        if self._callback is not None:
            self._callback(self.stage, self.done, max(self.done, self.total + self.later))
