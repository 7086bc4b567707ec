"""What a file of a quantized network holds, layer by layer, and what it should take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quiesce.errors import FileFormatError
from quiesce.export.checkpoint import GRAPH_FILE, TENSOR_FILE, read_checkpoint
from quiesce.export.export import require, tensor_name
from quiesce.export.packing import packed_size
from quiesce.files import read_bytes, read_safetensors
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


def _onnx_file(path: Path) -> Inventory:
    require(("onnx",), "onnx")
    model = _read_onnx(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {name: _stored_bytes(path, tensor) for name, tensor in tensors.items()}
    bits = _stated_bits(path, model)
    layers, grids = [], 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 2:
            continue
        grid_bytes = sum(sizes.pop(name, 0) for name in node.input[1:])
        if node.input[0] not in sizes:
            grids += grid_bytes
            continue
        tensor, scale = tensors[node.input[0]], tensors.get(node.input[1])
        stored = _width(path, tensor.data_type)
        layers.append(
            StoredLayer(
                layer=_layer(tensor.name),
                shape=tuple(tensor.dims),
                bits=bits.get(tensor.name, stored),
                stored_bits=stored,
                scales=0 if scale is None else math.prod(scale.dims),
                integer_bytes=sizes.pop(tensor.name),
                grid_bytes=grid_bytes,
            )
        )
    return Inventory(str(path), tuple(layers), grids, sum(sizes.values()), path.stat().st_size)


def _read_onnx(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    data = read_bytes(path)
    try:
        model = onnx.load_from_string(data)  # other files that it may name are not followed
    except (DecodeError, ValueError) as error:
        raise FileFormatError(f"{path} is not an ONNX file, or a damaged one ({error}); export it again.") from error
    if not model.graph.node:
        raise FileFormatError(f"{path} is not an ONNX file, or a damaged one: it holds no network; export it again.")
    return model


def _stored_bytes(path: Path, tensor: Any) -> int:
    """Bytes of a tensor's content, which has to be there for as many values as its shape says."""
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    values = math.prod(tensor.dims)
    if min(tensor.dims, default=0) < 0:
        raise FileFormatError(f"{path} is damaged: tensor {tensor.name!r} has the shape {list(tensor.dims)}.")
    if tensor.data_location == TensorProto.EXTERNAL:
        raise FileFormatError(
            f"{path} keeps tensor {tensor.name!r} in another file; inspect takes files that are whole."
        )
    if not tensor.raw_data:
        return int(tensor.ByteSize())
    try:
        bits = _width(path, tensor.data_type) if tensor.data_type in _integer_types() else 0
        expected = packed_size(values, bits or 8 * tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged: tensor {tensor.name!r} has no known type.") from error
    if len(tensor.raw_data) != expected:
        raise FileFormatError(
            f"{path} is damaged: tensor {tensor.name!r} has {len(tensor.raw_data):,} bytes for a shape of "
            f"{list(tensor.dims)}, which takes {expected:,}."
        )
    return expected


def _stated_bits(path: Path, model: Any) -> dict[str, int]:
    """Bits of each weight, which files of this program name: a container may be wider."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "quiesce.bits"), "{}")
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not all(type(b) is int and 2 <= b <= 8 for b in found.values()):
            raise ValueError("not a table of bits")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} has metadata quiesce.bits that can't be read ({error}).") from error
    return found


def _width(path: Path, data_type: int) -> int:
    name = _integer_types().get(data_type)
    if name is None:
        raise FileFormatError(f"{path} dequantizes a tensor of ONNX type {data_type}, which is no integer.")
    return int(name.partition("INT")[2])


def _integer_types() -> dict[int, str]:
    import onnx

    return {number: name for name, number in onnx.TensorProto.DataType.items() if name.startswith(("INT", "UINT"))}


def _layer(quantizer: str) -> str:
    return tensor_name(quantizer).removesuffix("_weight")


_READERS: dict[str, Callable[[Path], Inventory]] = {
    "": _saved_network,
    ".json": _saved_network,
    ".safetensors": _saved_network,
    ".onnx": _onnx_file,
}
"""By suffix; a folder has none."""
