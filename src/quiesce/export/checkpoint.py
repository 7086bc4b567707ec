"""Quiesce's own files: the quantized graph as JSON, its tensors as safetensors. Nothing in them is executed.

``quantized.json`` lists the graph's nodes: ATen operators of an allow-list, their arguments, and the fake-quantizers.
``quantized.safetensors`` holds integers, packed at their bits, scales, zero points, and what stays float; float weights
that were quantized are not stored. See docs/checkpoint.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx

from quiesce.errors import FileFormatError, ModelError
from quiesce.export.document import (
    check_amount,
    decode_graph,
    decode_interface,
    encode_graph,
    encode_interface,
    float_tensors,
)
from quiesce.export.packing import pack
from quiesce.files import read_json, read_safetensors, tensors_of
from quiesce.graph.capture import interface_of
from quiesce.outputs import output_folder
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers
from quiesce.recipe import Recipe
from quiesce.result import Result

FORMAT, VERSION = "quiesce quantized network", 2
GRAPH_FILE, TENSOR_FILE, RESULT_FILE, RECIPE_FILE = (
    "quantized.json",
    "quantized.safetensors",
    "result.json",
    "recipe.toml",
)


@dataclass(frozen=True)
class Checkpoint:
    """A quantized network with all that is stored beside it."""

    graph: fx.GraphModule
    result: Result
    recipe: Recipe
    preprocessing: dict[str, Any] | None


def check_storable(graph: fx.GraphModule) -> None:
    """Check, before hours of work, that the network can be written.

    Raises:
        ModelError: an operator is not on the allow-list (export/operators.txt), or an argument, or a container that the
            network takes or returns, has no JSON form; or there is too much of them.
    """
    try:
        check_amount({**encode_graph(graph), "interface": encode_interface(interface_of(graph))})
    except ValueError as error:
        raise ModelError(f"the network can't be saved ({error}); quantize a part of it.") from error


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write all files into ``folder``, which must be new or empty; it appears whole or not at all."""
    tensors = save(stored_tensors(checkpoint.graph))
    document = {
        "format": FORMAT,
        "version": VERSION,
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
        **encode_graph(checkpoint.graph),
        "interface": encode_interface(interface_of(checkpoint.graph)),
        "preprocessing": checkpoint.preprocessing,
        "recipe": checkpoint.recipe.to_dict(),
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    with output_folder(folder, force=False) as new:
        # Through bytes: save_file makes files that only their owner may read.
        (new / TENSOR_FILE).write_bytes(tensors)
        (new / GRAPH_FILE).write_text(text + "\n", encoding="utf-8")
        (new / RECIPE_FILE).write_text(checkpoint.recipe.to_toml(), encoding="utf-8")
        checkpoint.result.write(new / RESULT_FILE)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what :func:`write_checkpoint` wrote; the tensors are on the CPU.

    Raises:
        FileFormatError: a file is missing, truncated, of another version, or not one of ours.
    """
    document = read_document(folder)
    tensors = _read_tensors(document, folder)
    result = Result.read(folder / RESULT_FILE)
    try:
        graph = decode_graph(document, tensors)
        graph.meta["interface"] = decode_interface(document["interface"], graph)
        recipe = Recipe.from_dict(document["recipe"])
        return Checkpoint(graph, result, recipe, _plain_data(document["preprocessing"]))
    except Exception as error:  # the document may hold anything, and each library has its own kinds of errors
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{folder / GRAPH_FILE} is damaged ({reason}); get it again or run again.") from error


def read_document(folder: Path) -> dict[str, Any]:
    """Return ``quantized.json``, of which only format and version are checked.

    Raises:
        FileFormatError: it is missing, truncated, of another version, or not one of ours.
    """
    path = folder / GRAPH_FILE
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FileFormatError(
            f"{path} is not a quantized network of this program; give a folder that a run has written."
        )
    if document.get("version") != VERSION:
        raise FileFormatError(
            f"{path} has version {document.get('version')!r}, and this program reads {VERSION}; use a matching one."
        )
    return document


def stored_tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return what is written of the graph: tensors that stay float, and integers, scales and zero points."""
    kept = float_tensors(graph)
    for name, quantizer in fake_quantizers(graph).items():
        kept[f"{name}.scale"] = quantizer.scale
        if not quantizer.spec.symmetric:
            kept[f"{name}.zero_point"] = quantizer.zero_point.to(torch.uint8)
        if isinstance(quantizer, WeightFakeQuantize):
            kept[f"{name}.quantized"] = pack(quantizer.quantized, quantizer.spec.bits)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def _read_tensors(document: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Both files must be of one network, so the graph knows what the other one holds."""
    path = folder / TENSOR_FILE
    data, _ = read_safetensors(path)
    found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if document.get("tensors") != found:
        raise FileFormatError(f"{path} is not the one that {GRAPH_FILE} was written with; get both again.")
    return tensors_of(data, path)


def _plain_data(value: Any) -> dict[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"the preprocessing is {value!r}")
    return value
