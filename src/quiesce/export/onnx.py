"""ONNX: torch.onnx writes the operators, every fake-quantizer becomes QuantizeLinear and DequantizeLinear.

Weights are stored as integers in the narrowest container that holds them (INT2 and INT4 packed), per channel,
asymmetric where the recipe is. Activations pass QuantizeLinear to 8-bit integers; what keeps them to fewer bits, and
what keeps a runtime from computing something else than the simulation, is in docs/deploy.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from quiesce.errors import ModelError
from quiesce.export.containers import StoredWeight, store_weight
from quiesce.export.export import Export, check_uniform, integers_name, require, tensor_name
from quiesce.export.onnx_translation import DOMAIN, new_initializer, new_node, translate
from quiesce.export.opset13 import OPSET as COMPAT_OPSET
from quiesce.export.opset13 import lower
from quiesce.graph.backends import BACKENDS
from quiesce.outputs import check_new, write_bytes
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, fake_quantizers
from quiesce.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSIONS = {13: 8, 21: 10, 25: 13}
"""The oldest file format that has what the opset needs."""
_LONGEST_PROTOBUF = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """How the integers are stored."""

    compat: bool = False
    """Opset 13, whose narrowest integers have 8 bits."""
    symmetric: bool = False
    """All weights with zero points of 0: the same values, in wider containers where these are needed."""
    narrowest: int = 2
    """Bits of the narrowest container that the reader knows."""
    float_bias: bool = False
    """True for a reader that adds biases in float; ONNX Runtime has to be made to (see :func:`onnx_network`)."""


@dataclass(frozen=True)
class OnnxNetwork:
    """A network as the bytes of an ONNX file."""

    serialized: bytes
    opset: int
    notes: tuple[str, ...]
    metadata: dict[str, str]


def export_onnx(
    graph: fx.GraphModule,
    recipe: Recipe,
    path: Path,
    *,
    preprocessing: dict[str, Any] | None = None,
    compat: bool = False,
    symmetric: bool = False,
    force: bool = False,
) -> Export:
    """Write the quantized network to ``path``; it is opened in ONNX Runtime before it appears there.

    Args:
        graph: a quantized network on any device; not changed.
        recipe: of the network; goes into the file's metadata.
        preprocessing: what its images need, as plain data; goes there too.
        compat: opset 13 with 8-bit containers, for runtimes that know no 4- or 2-bit integers.
        symmetric: store all weights with zero points of 0, the same values in wider containers.
        force: replace a file that is there.

    Raises:
        ModelError: an extra package is missing, or the network has an operator or dtype that ONNX (or opset 13) lacks,
            or ONNX Runtime refuses the file.
        OutputError: ``path`` is taken or can't be written.
    """
    check_new(path, force)
    network = onnx_network(graph, recipe, Form(compat=compat, symmetric=symmetric), preprocessing)
    _open_in_onnxruntime(network.serialized, "" if compat else " Another form of it may: compat = true.")
    write_bytes(path, network.serialized)
    return Export(path, f"ONNX, opset {network.opset}", len(network.serialized), network.notes)


def onnx_network(
    graph: fx.GraphModule, recipe: Recipe, form: Form, preprocessing: dict[str, Any] | None = None
) -> OnnxNetwork:
    """Return the quantized network as an ONNX file.

    ONNX Runtime turns float biases in front of a QuantizeLinear into integers of scale s_x · s_w, looking through ReLU
    and Clip. Where the simulation's biases are not on that grid, with the weights as they are stored, a Min at the
    upper end of the range stands in front of each QuantizeLinear and keeps it from that. It changes no value.
    """
    require(("onnx", "onnxscript", "onnxruntime"), "onnx")
    check_uniform(graph, "ONNX and OpenVINO files")
    from onnx_ir import to_proto
    from onnxscript import version_converter

    backend = BACKENDS[recipe.backend]
    weights = _stored_weights(graph, form, fill=backend.integer_bias and form.compat)
    two_bits = any(w.width == 2 for w in weights.values())
    integer_kernels = backend.integer_bias and all(w.width == 8 for w in weights.values())
    bounded = backend.onnx_for_onnxruntime and not form.float_bias and not integer_kernels
    opset = COMPAT_OPSET if form.compat else (25 if two_bits else 21)
    model = translate(graph)
    if not form.compat:
        version_converter.convert_version(model, opset)
    _Writer(model, graph, weights, bounded).replace_markers()
    if form.compat:
        lower(model)
    notes = _notes(graph, weights, bounded)
    about = {"recipe": recipe.to_toml(), "seed": str(recipe.seed), "preprocessing": json.dumps(preprocessing)}
    described = _described(about, weights, notes)
    _finish(model, described)
    model.ir_version = IR_VERSIONS[opset]
    serialized = to_proto(model).SerializeToString()
    if len(serialized) > _LONGEST_PROTOBUF:
        raise ModelError(f"the ONNX file would have {len(serialized):,} bytes; one file can't have more than 2 GB.")
    return OnnxNetwork(serialized, opset, notes, described)


def _stored_weights(graph: fx.GraphModule, form: Form, fill: bool) -> dict[str, StoredWeight]:
    narrowest, widest = (8, 8) if form.compat else (form.narrowest, 16)
    found = {}
    for name, quantizer in fake_quantizers(graph).items():
        if quantizer.scale.dtype != torch.float32:
            raise ModelError(f"quantizer {name} has {quantizer.scale.dtype} scales; ONNX files hold float32 networks.")
        if isinstance(quantizer, WeightFakeQuantize):
            shown = tensor_name(name)
            found[name] = store_weight(
                shown, quantizer, narrowest=narrowest, widest=widest, symmetric=form.symmetric, fill=fill
            )
    return found


class _Writer:
    """Replaces the markers of a translated network by QuantizeLinear and DequantizeLinear."""

    def __init__(
        self, model: ir.Model, graph: fx.GraphModule, weights: dict[str, StoredWeight], always_bounded: bool
    ) -> None:
        self.graph = model.graph
        self.quantizers = fake_quantizers(graph)
        self.weights = weights
        self.always_bounded = always_bounded

    def replace_markers(self) -> None:
        for node in [n for n in self.graph if n.domain == DOMAIN]:
            name = node.attributes["quantizer"].as_string()
            if name in self.weights:
                self._replace_weight(node, name)
            else:
                self._replace_activation(node, name)

    def _replace_weight(self, marker: ir.Node, name: str) -> None:
        weight, replaced = self.weights[name], [marker]
        users = list(marker.outputs[0].consumers())
        if len(users) == 1 and users[0].op_type == "Transpose":
            # Of a linear layer on more than two dimensions: turned here instead of at every run.
            weight = weight.permuted(list(users[0].attributes["perm"].as_ints()))
            replaced.append(users[0])
        tensor = tensor_name(name)
        integers = self._initializer(tensor, weight.integers, weight.container)
        scale = self._initializer(f"{tensor}_scale", weight.scale)
        zero_point = self._initializer(f"{tensor}_zero_point", weight.zero_point, weight.container)
        axis = {} if weight.ch_axis is None else {"axis": weight.ch_axis}
        result = new_node("DequantizeLinear", [integers, scale, zero_point], f"{tensor}_dq", axis)
        self._replace(replaced, [result])

    def _replace_activation(self, marker: ir.Node, name: str) -> None:
        quantizer = self.quantizers[name]
        assert isinstance(quantizer, ActivationFakeQuantize)
        spec, tensor, nodes = quantizer.spec, tensor_name(name), []
        scale, zero = quantizer.scale.detach().cpu().numpy(), int(quantizer.zero_point)
        x = marker.inputs[0]
        if spec.bits < 8 or self.always_bounded:
            bound = self._initializer(f"{tensor}_high", scale * np.float32(spec.quant_max - zero))
            nodes.append(new_node("Min", [x, bound], f"{tensor}_min"))
        if spec.bits < 8 and spec.symmetric:  # an unsigned container ends at 0 by itself
            bound = self._initializer(f"{tensor}_low", scale * np.float32(spec.quant_min - zero))
            nodes.append(new_node("Max", [nodes[-1].outputs[0], bound], f"{tensor}_max"))
        container = "INT8" if spec.symmetric else "UINT8"
        parameters = [
            self._initializer(f"{tensor}_scale", scale),
            self._initializer(f"{tensor}_zero_point", np.asarray(zero), container),
        ]
        x = nodes[-1].outputs[0] if nodes else x
        nodes.append(new_node("QuantizeLinear", [x, *parameters], integers_name(name)))
        nodes.append(new_node("DequantizeLinear", [nodes[-1].outputs[0], *parameters], f"{tensor}_dq"))
        self._replace([marker], nodes)

    def _initializer(self, name: str, numbers: NDArray[Any], container: str = "FLOAT") -> ir.Value:
        import onnx_ir as ir

        return new_initializer(self.graph, name, numbers.astype(ir.DataType[container].numpy()))

    def _replace(self, old: list[ir.Node], new: list[ir.Node]) -> None:
        import onnx_ir as ir

        ir.convenience.replace_nodes_and_values(self.graph, old[0], old, new, old[-1].outputs, new[-1].outputs)


def _notes(graph: fx.GraphModule, weights: dict[str, StoredWeight], bounded: bool) -> tuple[str, ...]:
    """Say what in the file is not as narrow or as plain as the recipe, and why."""
    stored: dict[tuple[int, int, str], list[str]] = {}
    for name, weight in weights.items():
        stored.setdefault((weight.bits, weight.width, weight.container), []).append(tensor_name(name))
    notes = []
    for (bits, width, container), names in stored.items():
        if width != bits:
            alike = [group for group in stored if group[0] == bits]
            which = f"all {len(names)} weights of {bits} bits" if len(alike) == 1 else ", ".join(names)
            notes.append(f"{which}: stored as {container}, the narrowest container asked for that holds the integers")
    specs = [q.spec for q in fake_quantizers(graph).values() if isinstance(q, ActivationFakeQuantize)]
    for bits in sorted({s.bits for s in specs if s.bits < 8}):
        notes.append(
            f"activations of {bits} bits are 8-bit integers behind an explicit bound: ONNX Runtime refuses narrower "
            "ones behind Clip and in front of convolutions"
        )
    if bounded and any(s.bits == 8 for s in specs):
        notes.append(
            "activations of 8 bits pass Min at their upper bound: without it ONNX Runtime would round biases to the "
            "integer grid, or run 2-bit weights on kernels that do not know them"
        )
    return tuple(notes)


def _described(about: dict[str, str], weights: dict[str, StoredWeight], notes: tuple[str, ...]) -> dict[str, str]:
    bits = {tensor_name(name): weight.bits for name, weight in weights.items()}
    about = about | {
        "version": metadata.version("quiesce"),
        "bits": json.dumps(bits, separators=(",", ":")),
        "notes": "\n".join(notes),
    }
    return {f"{DOMAIN}.{key}": value for key, value in about.items()}


def _finish(model: ir.Model, about: dict[str, str]) -> None:
    """Name batch and producer, and drop what the translation left about itself."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)  # the markers' float weights, too
    ClearMetadataAndDocStringPass()(model)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape(["batch" if isinstance(n, ir.SymbolicDim) else n for n in value.shape])
    outputs = set(model.graph.outputs)
    for value in [v for node in model.graph for v in node.outputs if v not in outputs]:
        value.shape = value.type = None  # a runtime infers them
    model.producer_name, model.producer_version = "quiesce", about[f"{DOMAIN}.version"]
    model.graph.name = "quantized"
    model.metadata_props.update(about)


def _open_in_onnxruntime(serialized: bytes, remedy: str) -> None:
    """Open the file as its readers will.

    Raises:
        ModelError: it is not valid ONNX, or ONNX Runtime can't load it.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnx.checker.check_model(serialized)
        onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the ONNX file does not load in ONNX Runtime {onnxruntime.__version__} ({reason}); nothing was written."
            f"{remedy}"
        ) from error
