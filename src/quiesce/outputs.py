"""Folders for results: written aside and renamed, so that a half-written one is never seen."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from quiesce.errors import OutputError

EXPORT_NAME = "quantized"
"""Name without suffix that an exported file has unless it is given another."""
RESULT_FILES = frozenset(
    {"cell.json", "quantized.json", "quantized.safetensors", "recipe.toml", "report.html", "result.json"}
    | {f"{EXPORT_NAME}{suffix}" for suffix in (".onnx", ".xml", ".bin", ".pt2", ".pte")}
)
"""Names of all files that a run writes. ``force`` replaces a folder only if it holds nothing else."""
MARKERS = ("result.json", "quantized.json", "cell.json")


def check_free(path: Path, force: bool) -> None:
    """Check, before hours of work, that :func:`output_folder` could write to ``path``.

    Raises:
        OutputError: ``path`` is a file, the working folder or a mount point, can't be written, or holds other files.
    """
    path = Path(path).resolve()
    try:
        _check_place(path)
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise _cannot_write(path, error) from error
    if not names:
        return
    if not force:
        raise OutputError(f"folder {path} holds other results; choose another folder, or --force to replace them.")
    foreign = sorted(names - RESULT_FILES)
    if foreign or not names.intersection(MARKERS):
        shown = f" ({foreign[0]})" if foreign else ""
        raise OutputError(f"folder {path} holds more than earlier results{shown} and is not replaced; choose another.")


@contextmanager
def output_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` at the end, or is removed on any error.

    With ``force``, earlier results at ``path`` are replaced; see :func:`check_free` for what is refused.

    Raises:
        OutputError: the place is refused, or the system could not write (no space, no permission).
    """
    check_free(path, force)
    path = Path(path).resolve()
    new_parents = [p for p in path.parents if not p.exists()]
    temporary = _partial(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _publish(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        if _is_write_error(error):
            raise _cannot_write(path, error) from error
        if isinstance(error, OutputError):  # one from inside names a folder that is gone
            raise OutputError(str(error).replace(str(temporary), str(path))) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def check_new(path: Path, force: bool) -> None:
    """Check, before any work, that a file may be written to ``path``.

    Raises:
        OutputError: ``path`` is a folder, or there is a file and ``force`` is not set, or its folder is not there.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file in it.")
    if path.exists() and not force:
        raise OutputError(f"file {path} is there already; choose another name, or replace it with --force.")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"folder {path.resolve().parent} is not there; make it, or choose another place.")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that it is whole or not there, even when the power fails.

    Raises:
        OutputError: it can't be written; nothing is left behind.
    """
    path = Path(path)
    temporary = _partial(path)
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def take_lock(path: Path, busy: str) -> BinaryIO:
    """Lock the file ``path``, made if needed, for this process until it is closed; the system frees it at the latest.

    Raises:
        OutputError: another process holds it; ``busy`` is the message.
        OSError: the system can't lock there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise OutputError(busy) from error
        raise
    return file


def _partial(path: Path) -> Path:
    """Return where ``path`` is written aside: beside it, under a name of its own."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # of file systems that can't do it for folders
            raise
    finally:
        os.close(opened)


def _check_place(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; choose a folder for the results.")
    if path == Path.cwd() or path.is_mount():
        raise OutputError(
            f"{path} is the working folder or a mount point, which can't be replaced; choose one inside it."
        )
    existing = next(p for p in path.parents if p.exists())
    if not existing.is_dir():
        raise OutputError(f"{existing} is a file, so {path} can't be made; choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"folder {existing} can't be written to; choose another folder for the results.")


def _publish(temporary: Path, path: Path) -> None:
    for written in (*temporary.iterdir(), temporary):
        _sync(written)
    if not path.exists():
        temporary.rename(path)
        _sync(path.parent)
        return
    # Two renames, so that the earlier results are whole at every moment, under one name or the other.
    old = path.with_name(f"{temporary.name}-old")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_write_error(error: BaseException) -> bool:
    """Tell whether ``error`` is the system's: safetensors wraps it in an error of its own."""
    return isinstance(error, OSError) or (type(error).__name__ == "SafetensorError" and "os error" in str(error))


def _cannot_write(path: Path, error: BaseException) -> OutputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path} can't be written ({reason}); free space or choose another place.")
