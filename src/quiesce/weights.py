"""State dicts from files of others: names and tensors as data, in no more memory than the file is large.

A ``.pt`` file is a pickle beside raw bytes. ``torch.load(weights_only=True)`` executes nothing that the file brings
along, but follows what it says of sizes. So the pickle may only name what a state dict needs; tensors of the zip format
are first loaded as shapes without memory, and then filled from bytes that the file has.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quiesce.errors import FileFormatError
from quiesce.files import load_safetensors, read_bytes

_NEEDED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter Parameter|torch Size|torch device|torch(\.storage)? \w+Storage|torch [a-z]+\d*"
)
"""Modules and names that pickles of state dicts refer to. Others of torch's list take a size, as bytearray does."""
MOST_PICKLE = 4 * 2**20
"""Bytes of the pickles in a file; that of a thousand tensors has 150 KB."""
_LEGACY_PICKLES = 5
"""Pickles in front of the tensors' bytes in files of torch before 1.6: magic number, version, system, state, keys."""


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a ``.safetensors`` file, or in one that ``torch.save`` wrote, on the CPU.

    A checkpoint that holds it as ``state_dict`` or ``model`` will do.

    Raises:
        FileFormatError: the file can't be read, or holds no state dict.
    """
    try:
        state = load_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(bytearray(read_bytes(path)))
        for name, tensor in (state or {}).items():
            _check_plain(name, tensor)
    except FileFormatError:
        raise
    except Exception as error:  # torch has many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"weight file {path} can't be read ({reason}); save model.state_dict() again, "
            "as .safetensors or by torch.save."
        ) from error
    if state is None:
        raise FileFormatError(f"weight file {path} holds no state dict (names to tensors); save model.state_dict().")
    return state


def _read_pickled(data: bytearray) -> dict[str, Tensor] | None:
    state = _state(_read_zip(data) if data.startswith(b"PK") else _read_legacy(data))
    return None if state is None else {name: _filled(tensor, data) for name, tensor in state.items()}


def _state(content: Any) -> dict[str, Tensor] | None:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        return None
    named = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    return dict(content) if named else None


def _read_zip(data: bytearray) -> Any:
    """Load tensors of ``torch.save`` as shapes without memory; torch notes where the bytes of each begin."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        if any(r.compress_type != zipfile.ZIP_STORED for r in records) or sum(r.file_size for r in records) > len(data):
            raise ValueError("its records are compressed or overlap, which torch.save does not do")
        for record in records:
            if record.filename.endswith(".pkl"):
                if record.file_size > MOST_PICKLE:
                    raise ValueError(f"{record.filename} has {record.file_size:,} bytes")
                _check_names(io.BytesIO(archive.read(record)))
    return torch.load(io.BytesIO(data), map_location="meta", weights_only=True)


def _read_legacy(data: bytearray) -> Any:
    """Load what torch before 1.6 saved; it checks sizes against the file when it fills the tensors."""
    pickles = io.BytesIO(data[:MOST_PICKLE])
    for _ in range(_LEGACY_PICKLES):
        _check_names(pickles)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _check_names(pickle: io.BytesIO) -> None:
    """Look at a pickle's instructions, without following them, for the names that it refers to."""
    for instruction, argument, _ in pickletools.genops(pickle):
        if "GLOBAL" in instruction.name and not _NEEDED.fullmatch(str(argument)):
            raise ValueError(f"it refers to {argument}, which no state dict does")


def _check_plain(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        raise ValueError(f"{name} is {tensor.layout}, {tensor.dtype}, on {tensor.device}")


def _filled(tensor: Tensor, data: bytearray) -> Tensor:
    """Return a tensor without memory with what ``data`` has for it; a tensor with memory is passed on."""
    if tensor.device.type != "meta":
        return tensor.detach()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    origin: Any = tensor.untyped_storage()._checkpoint_offset
    start = origin + tensor.storage_offset() * tensor.element_size()
    if start < 0 or start + count * tensor.element_size() > len(data):
        raise ValueError(f"a tensor ends behind the file, at byte {start + count * tensor.element_size():,}")
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    values = torch.frombuffer(data, dtype=tensor.dtype, count=count, offset=start)
    return values.as_strided(tensor.shape, tensor.stride())
