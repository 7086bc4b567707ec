"""What a file of a quantized network holds, layer by layer, and what it should take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quiesce.errors import FileFormatError
from quiesce.export.checkpoint import GRAPH_FILE, TENSOR_FILE, read_checkpoint
from quiesce.export.packing import packed_size
from quiesce.files import read_safetensors
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers


@dataclass(frozen=True)
class StoredLayer:
    """A quantized weight in a file."""

    layer: str
    shape: tuple[int, ...]
    bits: int
    """Bits of the integers by the recipe."""
    stored_bits: int
    """Bits that each takes in the file."""
    scales: int
    integer_bytes: int
    grid_bytes: int
    """Bytes of scales and zero points."""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """What the files of a network hold. Sizes are bytes."""

    path: str
    layers: tuple[StoredLayer, ...]
    activation_bytes: int
    """Scales and zero points of activations."""
    float_bytes: int
    """Biases, and whatever else stays float."""
    file_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Integers at the recipe's bits, scales, zero points, and what stays float."""
        return sum(packed_size(row.weights, row.bits) for row in self.layers) + self._other_bytes

    @property
    def float32_bytes(self) -> int:
        """What the float network takes at 4 bytes a weight."""
        return 4 * self._weights + self.float_bytes

    @property
    def int8_bytes(self) -> int:
        """What the same network takes at 8 bits a weight."""
        return self._weights + self._other_bytes

    @property
    def totals(self) -> dict[str, float]:
        """Sums, and the file in relation to what is needed, to float32 and to 8 bits."""
        return {
            "weights": self._weights,
            "file_bytes": self.file_bytes,
            "needed_bytes": self.needed_bytes,
            "float32_bytes": self.float32_bytes,
            "int8_bytes": self.int8_bytes,
            "file_to_needed": self.file_bytes / max(self.needed_bytes, 1),
            "smaller_than_float32": self.float32_bytes / self.file_bytes,
            "smaller_than_int8": self.int8_bytes / self.file_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "totals": self.totals}

    @property
    def _weights(self) -> int:
        return sum(row.weights for row in self.layers)

    @property
    def _other_bytes(self) -> int:
        return sum(row.grid_bytes for row in self.layers) + self.activation_bytes + self.float_bytes


def inspect(path: Path) -> Inventory:
    """Return what ``path`` holds: a folder that a run has written, or one of its files.

    Raises:
        FileFormatError: it is missing, damaged, or of a kind that is not known.
    """
    reader = _READERS.get("" if path.is_dir() else path.suffix)
    if reader is None:
        kinds = ", ".join(kind for kind in _READERS if kind)
        raise FileFormatError(f"{path} can't be inspected; give a folder that a run has written, or a file {kinds}.")
    return reader(path)


def _saved_network(path: Path) -> Inventory:
    folder = path if path.is_dir() else path.parent
    graph = read_checkpoint(folder).graph
    _, table = read_safetensors(folder / TENSOR_FILE)
    sizes = {name: tensor.bytes for name, tensor in table.items()}
    layers, grids = [], 0
    for name, quantizer in fake_quantizers(graph).items():
        grid_bytes = sizes.pop(f"{name}.scale") + sizes.pop(f"{name}.zero_point", 0)
        if not isinstance(quantizer, WeightFakeQuantize):
            grids += grid_bytes
            continue
        bits, integer_bytes = quantizer.spec.bits, sizes.pop(f"{name}.quantized")
        shape, scales = tuple(quantizer.quantized.shape), quantizer.scale.numel()
        layers.append(StoredLayer(_layer(name), shape, bits, bits, scales, integer_bytes, grid_bytes))
    file_bytes = sum((folder / name).stat().st_size for name in (GRAPH_FILE, TENSOR_FILE))
    return Inventory(str(folder), tuple(layers), grids, sum(sizes.values()), file_bytes)


def _layer(quantizer: str) -> str:
    return quantizer.removesuffix("_quantizer").removesuffix("_weight")


_READERS: dict[str, Callable[[Path], Inventory]] = {
    "": _saved_network,
    ".json": _saved_network,
    ".safetensors": _saved_network,
}
"""By suffix; a folder has none."""
