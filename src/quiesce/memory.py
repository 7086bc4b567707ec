"""Memory: how much a run may hold on its device, and tensors [images, ...] that live there, on the host or in a file.

What lives on the device in the dtype that is worked in is a plain tensor; anything else is a :class:`Stored`, which is
read and written by the same expressions: ``rows[first:stop]``, ``rows[index]``, ``rows[first:stop] = values``.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quiesce.errors import MemoryLimitError, RecipeError

ALLOCATION_FAILED = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
)
"""What errors of failed allocations say that are plain ``RuntimeError``s."""
PLACES = ("device", "host", "file")
SPARE = 0.1
"""Share of the free memory that a budget nobody stated leaves free."""
UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Stored:
    """A tensor [images, ...] that is kept elsewhere, or as another dtype, than it is worked with."""

    def __init__(
        self,
        data: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format = torch.preserve_format,
    ) -> None:
        """``data`` is what is kept; what is read of it comes on ``device``, as ``dtype`` and in ``layout``."""
        self.data = data
        self.device = device
        self.dtype = dtype
        self.layout = layout

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def near(self) -> bool:
        """True for what is on the device as it is worked with, but for its layout."""
        return self.data.device == self.device and self.layout is not torch.preserve_format

    def __len__(self) -> int:
        return len(self.data)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Return rows on the working device: a copy, except for a slice of what lies there as it is worked with."""
        # From pinned memory a GPU copies several times faster, and while it computes.
        pinned = self.device.type == "cuda" and self.data.device.type == "cpu"
        if isinstance(index, slice):
            rows = _pinned(self.data[index]) if pinned else self.data[index]
        else:
            rows = _selected(self.data, index, pinned)
        return rows.to(self.device, non_blocking=True).to(self.dtype, memory_format=self.layout)

    def __setitem__(self, index: slice, values: Tensor) -> None:
        values = values.to(self.data.dtype)
        if values.device.type == "cuda" and self.data.device.type == "cpu":
            values = _pinned(values)
        self.data[index] = values.to(self.data.device)

    def behind(self, first: int) -> Stored:
        """Return the rows from ``first`` on, sharing memory."""
        return Stored(self.data[first:], self.device, self.dtype, self.layout)


Rows = Tensor | Stored
"""A tensor [images, ...], wherever it is."""


def take(rows: Rows, index: Tensor) -> Tensor:
    """Return ``rows[index]`` for indices [n] of images, several times faster: whole rows are copied."""
    return rows[index] if isinstance(rows, Stored) else _selected(rows, index)


def behind(rows: Rows, first: int) -> Rows:
    """Return the rows from ``first`` on, sharing memory."""
    return rows.behind(first) if isinstance(rows, Stored) else rows[first:]


def _selected(rows: Tensor, index: Tensor, pinned: bool = False) -> Tensor:
    index = index.to(rows.device)
    size = math.prod(rows.shape[1:])
    strides = _row_strides(rows) if len(rows) and size else None
    if strides is None or rows.stride() != (size, *strides):  # rows with gaps, or interleaved
        return rows[index]
    flat = torch.empty(len(index), size, dtype=rows.dtype, device=rows.device, pin_memory=pinned)
    torch.index_select(rows.as_strided((len(rows), size), (size, 1)), 0, index, out=flat)
    return flat.as_strided((len(flat), *rows.shape[1:]), (size, *strides))


def _pinned(values: Tensor) -> Tensor:
    """Return a copy in host memory that a GPU can read and write by itself."""
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values)


def rows_like(like: Tensor, images: int, data: Tensor | None = None) -> Tensor:
    """Return ``images`` uninitialized rows such as those of ``like``, each in the layout that they have.

    They are in ``data``, as many values, if it is given.
    """
    size = math.prod(like.shape[1:])
    data = torch.empty(images * size, dtype=like.dtype, device=like.device) if data is None else data
    return data.as_strided((images, *like.shape[1:]), (size, *_row_strides(like)))


def _row_strides(rows: Tensor) -> tuple[int, ...]:
    """Strides of one row without gaps, its dimensions in memory in the order they have in ``rows``."""
    return torch.empty_like(rows[0], device="meta").stride()


@dataclass
class Memory:
    """The memory that one run may take, and what it holds: a tensor goes to the first place that has room for it.

    Whatever is in a file is the system's to keep in memory or not.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: int | None = None
    """Bytes that may be held on the device, all things together; None sets no limit."""
    host: int | None = None
    """Bytes that may be held in host memory where the device is another one; None sets no limit."""
    stated: bool = False
    """The budget is a promise: less is worked on at a time where it would be broken. Else it only says what is free."""
    narrow: bool = False
    """Keep float32 as bfloat16."""
    reserved: int = 0
    """Bytes of the budget that are kept for computing."""
    held: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    """Bytes in each place now."""
    most: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    """The most bytes that were in each place at a time."""

    def room(self, like: Tensor, images: int) -> Rows:
        """Return room for ``images`` rows such as those of ``like``, uninitialized, each in the layout that they have.

        Raises:
            MemoryLimitError: the disk is full.
        """
        dtype = self.kept_as(like.dtype)
        size = math.prod(like.shape[1:])
        place = self.place(images * size * dtype.itemsize)
        try:
            data = self._allocated(place, images * size, dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            place = "file"  # there was less than the system said
            data = self._allocated(place, images * size, dtype)
        data = rows_like(like, images, data)
        plain = place == "device" and dtype == like.dtype
        rows = data if plain else Stored(data, self.device, like.dtype)
        self._count(rows, place, images * size * dtype.itemsize)
        return rows

    def _allocated(self, place: str, values: int, dtype: torch.dtype) -> Tensor:
        if place == "file":
            return mapped((values,), dtype)
        return torch.empty(values, dtype=dtype, device=self.device if place == "device" else torch.device("cpu"))

    def kept_as(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.narrow and dtype is torch.float32 else dtype

    def place(self, size: int) -> str:
        """Where ``size`` more bytes would go."""
        if self.budget is None or self.held["device"] + self.reserved + size <= self.budget:
            return "device"
        if self.device.type != "cpu" and (self.host is None or self.held["host"] + size <= self.host):
            return "host"
        return "file"

    def at_a_time(self, images: int, each: int, fixed: int, together: int = 1) -> int:
        """Return how many of ``images`` to work on at a time, at ``each`` and ``fixed`` bytes: halved until they fit.

        They are halved for a stated budget only, and to ``together`` at the least.
        """
        free = self.budget - self.held["device"] if self.stated and self.budget is not None else math.inf
        while fixed + images * each > free and images > together:
            images = halved(images, together)
        return images

    def reserve(self, size: int, least: int) -> None:
        """Keep ``size`` bytes of the device free for computing, or what is left of it, which must be ``least``.

        Raises:
            MemoryLimitError: less than ``least`` is left of a stated budget.
        """
        self.reserved = size
        if self.stated and self.budget is not None and self.held["device"] + least > self.budget:
            raise MemoryLimitError(
                f"a memory budget of {format_bytes(self.budget)} is too small for this network and its images; the "
                f"least is {format_bytes(1.01 * (self.held['device'] + least))}, give that or more."
            )

    def trim(self) -> None:
        """Give unused memory back to the system: graphs hold tensors in cycles, and the C library keeps much."""
        if self.stated:
            gc.collect()
        if self.stated and self.device.type == "cpu" and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
            if trim is not None:
                trim(0)

    def hold(self, place: str, size: int) -> None:
        """Note that ``size`` bytes more (or less) are in ``place``."""
        self.held[place] += size
        self.most[place] = max(self.most[place], self.held[place])

    def _count(self, rows: Rows, place: str, size: int) -> None:
        self.hold(place, size)
        weakref.finalize(rows, self.hold, place, -size).atexit = False


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when an allocation fails."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_FAILED)
    )


def halved(images: int, together: int) -> int:
    """Return half of ``images``, a multiple of ``together``, and that at least."""
    return max(together, images // 2 // together * together)


def mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor in a file without a name, which is gone with the tensor, or however the process ends.

    Raises:
        MemoryLimitError: the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(*shape, dtype=dtype)
    folder = scratch_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # Room is taken now: a disk that is full while mapped memory is written would end the process.
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise MemoryLimitError(
            f"a temporary file of {format_bytes(size)} in {folder} can't be made ({error.strerror}); free some disk, "
            "set TMPDIR to a folder with room, or give a larger memory budget."
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def scratch_folder() -> str:
    """Return the folder for temporary files, another than the system's own if that one is memory itself (tmpfs)."""
    folders = [tempfile.gettempdir(), "/var/tmp"]
    return next((f for f in folders if Path(f).is_dir() and not _in_memory(f)), folders[0])


def _in_memory(folder: str) -> bool:
    try:
        rows = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    path = Path(folder).resolve()
    mounts = {Path(row[1]): row[2] for row in rows if path.is_relative_to(row[1])}
    return mounts.get(max(mounts, key=lambda p: len(p.parts)), "") in ("tmpfs", "ramfs") if mounts else False


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` such as ``4GB`` or ``512MiB`` means (1 kB is 1,000 bytes, 1 KiB 1,024).

    Raises:
        RecipeError: it means none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    factor = {name.lower(): size for name, size in UNITS.items()}.get(found[2].lower()) if found else None
    if found is None or factor is None or (size := int(float(found[1]) * factor)) < 1:
        raise RecipeError(f"the memory budget {text!r} is no size; give a number with {', '.join(UNITS)}, such as 4GB.")
    return size


def format_bytes(size: float) -> str:
    """Return ``size`` to three digits: ``1.23 GB``."""
    name, factor = next(((n, f) for n, f in reversed(list(UNITS.items())[:4]) if size >= f), ("kB", 1000))
    return f"{float(f'{size / factor:.3g}'):g} {name}"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process could still take on ``device``; None if the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    known = [free for free in (_available(), _left_of_cgroup()) if free is not None]
    return min(known, default=None)


def _available() -> int | None:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _left_of_cgroup(system: Path = Path("/")) -> int | None:
    """What the limits of the process's control group (version 2 or 1) and of those around it leave; cache is free."""
    left = []
    for line in _text(system / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file")
        root = system / "sys/fs/cgroup"
        if number != "0":
            if "memory" not in controllers.split(","):
                continue
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root /= "memory"
        inner = root / path.lstrip("/")
        for group in (inner, *(p for p in inner.parents if p.is_relative_to(root))):
            limit, used = _text(group / names[0]).strip(), _text(group / names[1]).strip()
            if limit.isdigit() and used.isdigit():
                cache = re.search(rf"^{names[2]} (\d+)", _text(group / "memory.stat"), re.MULTILINE)
                left.append(max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0)))
    return min(left, default=None)


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


class Peak:
    """Within a ``with`` block, measures how much more memory was taken at a time than at its start.

    On a GPU it is what torch allocated there. On the CPU it is the process's anonymous memory (pages that no file
    holds), read every few milliseconds; ``bytes`` stays None where the system does not tell it.
    """

    PERIOD = 0.005

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._done = threading.Event()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif (start := _anonymous()) is not None:
            self._start, self.bytes = start, 0
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self.bytes is not None:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        waiting = True
        while waiting:
            waiting = not self._done.wait(self.PERIOD)
            self.bytes = max(self.bytes or 0, (_anonymous() or 0) - self._start)


def _anonymous() -> int | None:
    found = re.search(r"^RssAnon:\s*(\d+) kB", _text("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
