"""OpenVINO's own files (.xml and .bin), converted from ONNX by the openvino package."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import fx

from quiesce.errors import ModelError
from quiesce.export.export import Export, require
from quiesce.export.onnx import Form, onnx_network
from quiesce.outputs import check_new
from quiesce.recipe import Recipe

NARROWEST = 4
"""Bits of the narrowest integers that openvino 2026.4 reads from ONNX."""
RUNTIME_OPTIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Read by the plugin with the network. By default it quantizes inputs of linear layers with packed weights again."""


def export_openvino(
    graph: fx.GraphModule,
    recipe: Recipe,
    path: Path,
    *,
    preprocessing: dict[str, Any] | None = None,
    compat: bool = False,
    symmetric: bool = False,
    force: bool = False,
) -> Export:
    """Write the quantized network to ``path`` (.xml) and the file of the same name with .bin.

    Args:
        graph: a quantized network on any device; not changed.
        recipe: of the network; goes into the model's rt_info, under ``quiesce``.
        preprocessing: what its images need, as plain data; goes there too.
        compat: store all weights in 8 bits; otherwise 2 to 4 bits take 4.
        symmetric: store all weights with zero points of 0.
        force: replace files that are there.

    Raises:
        ModelError: an extra package is missing, or the network can't be translated.
        OutputError: a file is taken or can't be written.
    """
    path = Path(path)
    if path.suffix != ".xml":
        raise ModelError(f"OpenVINO reads a network from a .xml file; {path.name} has another suffix.")
    binary = path.with_suffix(".bin")
    check_new(path, force)
    check_new(binary, force)
    require(("openvino",), "openvino")
    import openvino

    form = Form(compat=compat, symmetric=symmetric, narrowest=NARROWEST, float_bias=True)
    network = onnx_network(graph, recipe, form, preprocessing)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
        source, new = Path(folder) / "network.onnx", Path(folder) / path.name
        source.write_bytes(network.serialized)
        try:
            model = openvino.convert_model(source)
            for key, value in network.metadata.items():
                model.set_rt_info(value, key.split("."))
            for key, value in RUNTIME_OPTIONS.items():
                model.set_rt_info(value, ["runtime_options", key])
            openvino.save_model(model, new, compress_to_fp16=False)
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise ModelError(f"openvino {openvino.__version__} can't convert the network ({reason}).") from error
        size = new.stat().st_size + new.with_suffix(".bin").stat().st_size
        # The .xml names what the .bin holds: it appears last.
        new.with_suffix(".bin").replace(binary)
        new.replace(path)
    return Export(path, "OpenVINO IR", size, network.notes)
