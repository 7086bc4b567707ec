"""Lowers an ONNX network of opset 18 to opset 13, for runtimes of 2021 and later.

What newer versions of an operator added (types, attributes with defaults) falls away by itself where it is not used;
what moved or is new is rewritten here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quiesce.errors import ModelError
from quiesce.export.onnx_translation import OPSET as TRANSLATED
from quiesce.export.onnx_translation import new_initializer, new_node

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 13


def lower(model: ir.Model) -> None:
    """Rewrite ``model`` (opset 18, no functions) in place.

    Raises:
        ModelError: an operator, or an input or attribute of it, is not in opset 13.
    """
    for node in list(model.graph):
        _drop_defaults(node)
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _axes_to_attribute(node)
        elif node.op_type == "Shape":
            _slice_shape(model.graph, node)
        elif node.op_type == "HardSwish":
            _compose_hard_swish(model.graph, node)
        elif node.op_type == "LayerNormalization":
            _compose_layer_norm(model.graph, node)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # without sizes opset 13 splits evenly, too
        elif node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)  # tells a size of 0 from one that is copied: there is none
    for node in model.graph:
        _check(node)
        node.version = None
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET


def _axes_to_attribute(node: ir.Node) -> None:
    import onnx_ir as ir

    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    if axes is None:
        raise ModelError(f"opset 13 has no {node.op_type} over axes that are computed ({node.name}); leave out compat.")
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())


def _slice_shape(graph: ir.Graph, node: ir.Node) -> None:
    """``Shape(x, start, end)`` becomes a Slice of ``Shape(x)``."""
    import onnx_ir as ir

    start, end = (node.attributes.pop(name, None) for name in ("start", "end"))
    if start is None and end is None:
        return
    result = node.outputs[0]
    first = 0 if start is None else start.as_int()
    last = np.iinfo(np.int64).max if end is None else end.as_int()
    whole = new_node("Shape", [node.inputs[0]], f"{result.name}_whole")
    numbers = {"start": first, "end": last}
    ends = [new_initializer(graph, f"{result.name}_{name}", np.asarray([n], np.int64)) for name, n in numbers.items()]
    part = new_node("Slice", [whole.outputs[0], *ends], f"{result.name}_part")
    ir.convenience.replace_nodes_and_values(graph, node, [node], [whole, part], [result], [part.outputs[0]])


def _compose_hard_swish(graph: ir.Graph, node: ir.Node) -> None:
    """HardSwish(x) = x · HardSigmoid(x; 1/6, 1/2)."""
    import onnx_ir as ir

    result, x = node.outputs[0], node.inputs[0]
    gate = new_node("HardSigmoid", [x], f"{result.name}_gate", {"alpha": 1 / 6, "beta": 0.5})
    product = new_node("Mul", [x, gate.outputs[0]], f"{result.name}_product")
    ir.convenience.replace_nodes_and_values(graph, node, [node], [gate, product], [result], [product.outputs[0]])


def _compose_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(x − mean) / √(variance + ε) · scale + bias, over the last axes."""
    import onnx_ir as ir

    (x, scale, *rest), result = node.inputs, node.outputs[0]
    bias = rest[0] if rest else None
    first, epsilon = (node.attributes.get(name) for name in ("axis", "epsilon"))
    axes = list(range(-1 if first is None else first.as_int(), 0))
    if not axes or len(node.outputs) > 1:
        return  # axes counted from the front, or statistics as outputs: torch.onnx writes neither
    new: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        new.append(new_node(operator, list(inputs), f"{result.name}_composed_{len(new)}", attributes))
        return new[-1].outputs[0]

    least = np.asarray(1e-5 if epsilon is None else epsilon.as_float(), np.float32)
    centred = add("Sub", x, add("ReduceMean", x, axes=axes))
    variance = add("ReduceMean", add("Mul", centred, centred), axes=axes)
    deviation = add("Sqrt", add("Add", variance, new_initializer(graph, f"{result.name}_epsilon", least)))
    y = add("Mul", add("Div", centred, deviation), scale)
    y = y if bias is None else add("Add", y, bias)
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [result], [y])


def _drop_defaults(node: ir.Node) -> None:
    """Drop attributes that say what opset 13 does without them."""
    import onnx

    known = onnx.defs.get_schema(node.op_type, TRANSLATED, node.domain).attributes
    for name, attribute in list(node.attributes.items()):
        default = known[name].default_value
        if default.type and onnx.helper.get_attribute_value(default) in (attribute.value, _encoded(attribute.value)):
            del node.attributes[name]


def _encoded(value: object) -> object:
    return value.encode() if isinstance(value, str) else value


def _check(node: ir.Node) -> None:
    """Everything that the node uses must be known to its operator of opset 13."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError as error:
        raise ModelError(f"opset 13 has no operator {node.op_type} ({node.name}); leave out compat.") from error
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown or len(node.inputs) > schema.max_input:
        what = f"attribute {unknown[0]!r}" if unknown else f"{len(node.inputs)} inputs"
        raise ModelError(f"operator {node.op_type} of opset 13 ({node.name}) has no {what}; leave out compat.")
