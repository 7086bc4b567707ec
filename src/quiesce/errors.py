"""One exception family: every error a user can cause is a :class:`QuiesceError`.

A message is one sentence that says what was wrong, where (layer, file, setting, shape), and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuiesceError(Exception):
    """Base class of all errors raised on purpose by this package."""


class RecipeError(QuiesceError):
    """A setting is unknown, out of range, or contradicts another one."""


class ModelError(QuiesceError):
    """The network can't be found, loaded, captured, or quantized."""


class DataError(QuiesceError):
    """Calibration or evaluation data is missing, malformed, or does not fit the network."""


class FileFormatError(QuiesceError):
    """A file is truncated, foreign, of another version, or not what it says."""


class OutputError(QuiesceError):
    """Results can't be written where asked."""


class ClusterError(QuiesceError):
    """Ray or other processes can't be started or reached, differ in what must be alike, or lack what a cell needs."""


class MemoryLimitError(QuiesceError):
    """The memory, or the disk in its place, that a run may take does not suffice."""


MOST_NAMES = 12
"""Names that a message lists when none is close to what was given."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the closest of ``known``, or the list of names if none is close."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    shown = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
    return f" Known: {shown}."
