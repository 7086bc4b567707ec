"""Reading files of others as data: nothing in them is executed, and their size bounds the memory that they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quiesce.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXT = 16 * 2**20
"""Bytes of a JSON or TOML file, or of a safetensors header: parsed, they take some twenty times as much."""
MOST_LEVELS = 64
"""Levels that JSON may nest."""
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """A row of a safetensors header."""

    dtype: str
    """As safetensors calls it: F32, U8, …"""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BITS[self.dtype] // 8


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return what a file holds, ``most`` bytes at most.

    Raises:
        FileFormatError: it is missing, no regular file, larger, or the system can't read it.
    """
    try:
        if not path.is_file():  # opening a pipe would wait, and a device has no end
            raise FileFormatError(f"{path} can't be read (no such file); give one that a run has written.")
        size = path.stat().st_size
        if most is not None and size > most:
            raise FileFormatError(f"{path} has {size:,} bytes, and files of its kind at most {most:,}; get it again.")
        return path.read_bytes()
    except (OSError, ValueError, MemoryError) as error:
        raise FileFormatError(f"{path} can't be read ({error}); give one that a run has written.") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileFormatError: it can't be read, is not valid JSON, too large, or nested too deeply.
    """
    data = read_bytes(path, MOST_TEXT)
    try:
        return _parse(data)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is not valid JSON ({error}); it may be truncated, get it again or run again."
        ) from error


def count_values(value: Any) -> int:
    """Return how many values nested lists and dicts hold, these themselves among them.

    Raises:
        ValueError: they nest deeper than :data:`MOST_LEVELS`.
    """
    level, count = [value], 0
    for _ in range(MOST_LEVELS + 1):
        count += len(level)
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return count
        level = [v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"nested deeper than {MOST_LEVELS} levels")


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one: ``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def read_safetensors(path: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the bytes of a safetensors file and its table of tensors, which is checked against them.

    Raises:
        FileFormatError: the file can't be read, or the table and the bytes do not fit.
    """
    data = read_bytes(path)
    try:
        return data, _table(data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} can't be read as safetensors ({error}); it may be truncated, get it again."
        ) from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        FileFormatError: the file can't be read, or the table and the bytes do not fit.
    """
    return tensors_of(read_safetensors(path)[0], path)


def tensors_of(data: bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of what :func:`read_safetensors` has read from ``path``."""
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except Exception as error:  # the library's own, and torch's for dtypes and shapes that it lacks
        raise FileFormatError(f"{path} can't be read as safetensors ({error}); get it again.") from error
    return tensors


def _parse(data: bytes) -> Any:
    value = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_of_64_bits)
    count_values(value)
    return value


def _finite(text: str) -> float:
    """Python reads Infinity, NaN and 1e999, which JSON does not have and this package does not write."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number of JSON")
    return value


def _of_64_bits(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{text[:30]} has more than 64 bits")
    return value


def _table(data: bytes) -> dict[str, StoredTensor]:
    """Parse the header: its length (8 bytes, little-endian), JSON, and then the bytes of the tensors, without gaps."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MOST_TEXT):
        raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    header = _parse(data[8 : 8 + length])
    rows = {name: row for name, row in header.items() if name != "__metadata__"}
    table, end = {}, 0
    for name, row in sorted(rows.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        shape = tuple(row["shape"])
        if row["dtype"] not in _ITEM_BITS or not all(type(s) is int and 0 <= s < 2**63 for s in shape):
            raise ValueError(f"tensor {name} has dtype {row['dtype']!r} and shape {list(shape)}")
        table[name] = StoredTensor(row["dtype"], shape)
        start, end = end, end + table[name].bytes
        if row["data_offsets"] != [start, end]:
            raise ValueError(f"tensor {name} lies at {row['data_offsets']} instead of [{start}, {end}]")
    if end != len(data) - 8 - length:
        raise ValueError(f"{len(data) - 8 - length} bytes of tensors instead of {end}")
    return table
