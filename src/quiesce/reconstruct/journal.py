"""Progress of a run on disk: its finished units, so that the same run, begun again, goes on behind them.

A run is deterministic, so only what takes long is kept: what optimization made of each unit, in the order in which
units are optimized, those included that the guard takes back. All else is computed again. The folder holds

- ``run.json``: all that decides the numbers of the run;
- ``NNNN-DIGEST.safetensors``, one a unit: the tensors of its fake-quantizers and, as metadata, its record. DIGEST is
  the SHA-256 of the file. The metadata repeats that of the entry in front, or of the run: entries are a chain;
- ``lock``, which a process holds locked while it works on the folder.

A file gets its name when it is whole and on the disk, so an entry is there or it is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quiesce.errors import FileFormatError, OutputError
from quiesce.files import flat, read_json, tensors_of
from quiesce.outputs import take_lock, write_bytes, write_text
from quiesce.quant.fake_quantize import restore, snapshot
from quiesce.result import UnitRecord

_log = logging.getLogger(__name__)

_RUN, _LOCK = "run.json", "lock"
_ENTRY = re.compile(r"\d{4,}-([0-9a-f]{64})\.safetensors")
_ROWS_AT_ONCE = 64
"""Rows of a tensor that are copied at once to compute its digest."""
_MOST_DIFFERENCES = 6
"""Differences between two runs that a message lists."""

Run = Mapping[str, Any]
"""What decides the numbers of a run, as nested plain data."""
Extent = dict[str, Any]
"""What is optimized at once, as plain data: the unit's name, its stretch of the network, steps, and how it starts."""


class Journal:
    """The finished units of a run: first all of them are taken over, then new ones are committed.

    Made by :func:`open_journal`, which holds the folder's lock.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.seconds = 0.0
        """What the units that were taken over took, when they were optimized."""
        self._passed = 0
        """Units that were taken over or committed so far."""
        self._chain = [_digest(_canonical(run))]
        """Digests of the run and of its intact entries."""
        check_same_run(folder, run)
        _write_run(folder, run)
        self._find_intact()

    def take_over(self, module: nn.Module, extent: Extent) -> UnitRecord | None:
        """Give ``module`` the state of the next finished unit, and return its record; None if there is no more."""
        number = self._passed
        if number == len(self._chain) - 1:
            return None
        try:
            entry = _read(self._path(number), self._chain[number])
            if entry.extent != extent or _forms(entry.tensors) != _forms(snapshot(module)):
                raise FileFormatError(f"it is of {entry.extent}, and {extent} is next")
        except FileFormatError as error:
            self._forget(number, str(error))
            return None
        restore(module, entry.tensors)
        self._passed += 1
        self.seconds += entry.record.seconds
        return replace(entry.record, resumed=True)

    def commit(self, module: nn.Module, extent: Extent, record: UnitRecord) -> None:
        """Write down what optimization made of ``module``.

        Raises:
            OutputError: it can't be written; the units committed before are kept.
        """
        from safetensors.torch import save

        about = {"extent": extent, "record": asdict(record), "previous": self._chain[-1]}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in snapshot(module).items()}
        content = save(tensors, {"entry": json.dumps(about, allow_nan=False)})
        digest = _digest(content)
        try:
            write_bytes(self.folder / f"{self._passed:04}-{digest}.safetensors", content)
        except OutputError as error:
            raise OutputError(f"{error} {self._passed} finished units are kept: begin again to go on.") from error
        self._passed += 1
        self._chain.append(digest)

    def _find_intact(self) -> None:
        for number, path in enumerate(_entries(self.folder)):
            try:
                _read(path, self._chain[-1])
            except FileFormatError as error:
                self._forget(number, str(error))
                break
            self._chain.append(_digest_in_name(path))
        if len(self._chain) > 1:
            _log.info("continuing after %d finished units (%s)", len(self._chain) - 1, self.folder)

    def _forget(self, number: int, reason: str) -> None:
        """Remove the entry ``number`` and all behind it."""
        _log.warning("finished unit %d can't be used (%s); it and later ones are done again", number + 1, reason)
        del self._chain[number + 1 :]
        for path in set(_entries(self.folder)) - {self._path(i) for i in range(number)}:
            _remove(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04}-{self._chain[number + 1]}.safetensors"


@contextmanager
def open_journal(folder: Path, run: Run) -> Iterator[Journal]:
    """Hold ``folder``, which is made if needed, and yield the journal of ``run`` in it.

    Raises:
        OutputError: another process works on it, it is of another run, or can't be written.
    """
    with _locked(folder):
        for temporary in folder.glob(".*.partial-*"):
            _remove(temporary)
        yield Journal(folder, run)


def check_same_run(folder: Path, run: Run) -> None:
    """Check that progress in ``folder``, if there is any, agrees with ``run`` in all the sections that it has.

    Raises:
        OutputError: it does not; the message names the settings and both values.
    """
    earlier = _read_run(folder)
    if earlier is None:
        return
    old, new = (_flat({key: each.get(key) for key in run}) for each in (earlier, run))
    found = [_difference(key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)]
    if found:
        more = f"; {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
        raise OutputError(
            f"{folder} holds the progress of another run ({'; '.join(found[:_MOST_DIFFERENCES])}{more}); "
            "go on with the settings and data of that one, or remove the folder (--restart) to begin anew."
        )


def finished_units(folder: Path) -> int:
    """Return how many units of a run are finished."""
    return len(_entries(folder))


def discard(folder: Path) -> None:
    """Remove the progress in ``folder``, and the folder unless it holds other files.

    Raises:
        OutputError: another process works on it, or it can't be removed.
    """
    if not folder.is_dir():
        return
    with _locked(folder):
        for path in (folder / _RUN, *folder.glob(".*.partial-*"), *_entries(folder), folder / _LOCK):
            _remove(path)
    with suppress(OSError):
        folder.rmdir()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: their dtypes, shapes and values, wherever and however they are stored."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in torch.split(tensor.detach(), _ROWS_AT_ONCE) if tensor.ndim else (tensor.detach(),):
            sha.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"


def digest_of_text(text: str) -> str:
    return f"sha256:{_digest(text.encode())}"


@dataclass(frozen=True)
class _Entry:
    extent: Extent
    record: UnitRecord
    tensors: dict[str, Tensor]


def _read(path: Path, previous: str) -> _Entry:
    """Read an entry that is intact and follows the one with digest ``previous``, or raise a FileFormatError."""
    try:
        content = path.read_bytes()
    except OSError as error:  # not damaged, perhaps: nothing is removed
        raise _unusable(path.parent, error) from error
    if _digest(content) != _digest_in_name(path):
        raise FileFormatError(f"{path.name} is not what was written")
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["entry"])
    if about["previous"] != previous:
        raise FileFormatError(f"{path.name} does not follow what is in front of it")
    return _Entry(about["extent"], UnitRecord(**about["record"]), tensors_of(content, path))


def _entries(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*.safetensors") if _ENTRY.fullmatch(path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _digest_in_name(path: Path) -> str:
    return path.stem.partition("-")[2]


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _write_run(folder: Path, run: Run) -> None:
    write_text(folder / _RUN, json.dumps({"run": run, "sha256": _digest(_canonical(run))}, indent=2) + "\n")


def _read_run(folder: Path) -> Run | None:
    """Return what :func:`_write_run` wrote; None if it is not there or damaged, as entries tell their run, too."""
    try:
        content = read_json(folder / _RUN)
        run: Run = content["run"]
        return run if content["sha256"] == _digest(_canonical(run)) else None
    except (FileFormatError, KeyError, TypeError):
        return None


def _canonical(run: Run) -> bytes:
    return json.dumps(run, sort_keys=True, allow_nan=False).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _flat(run: Run) -> dict[str, Any]:
    return {key: json.loads(json.dumps(value)) for key, value in flat(run).items()}


def _difference(key: str, old: Any, new: Any) -> str:
    name = key.removeprefix("recipe.")
    if any(isinstance(value, str) and value.startswith("sha256:") for value in (old, new)):
        return f"{name} changed"
    return f"{name}: {json.dumps(old, ensure_ascii=False)} -> {json.dumps(new, ensure_ascii=False)}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone."""
    busy = f"another process works with the progress in {folder}; wait for it, or write to another folder."
    try:
        lock = take_lock(folder / _LOCK, busy)
    except OSError as error:
        raise _unusable(folder, error) from error
    with lock:
        yield


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _unusable(path.parent, error) from error


def _unusable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"progress can't be kept in {folder} ({error.strerror}); repair it or choose another place.")
