"""The quantized graph as JSON, and back: see docs/checkpoint.md for the format.

Writing turns nodes, arguments and interface into plain data. Reading takes nothing for granted: whatever does not fit
is an exception, which the caller turns into a FileFormatError.
"""

from __future__ import annotations

import keyword
import math
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quiesce.errors import ModelError
from quiesce.export.operators import draws_random_numbers, operator_name, operators
from quiesce.export.packing import unpack
from quiesce.files import count_values
from quiesce.graph.capture import Interface, Leaf, TensorForm
from quiesce.quant.fake_quantize import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize, fake_quantizers
from quiesce.quant.grids import GRIDS
from quiesce.quant.spec import QuantizationSpec

MOST_VALUES = 500_000
"""Values in the JSON of a network: some 50,000 nodes, each of which takes kilobytes in memory."""
_PLAIN = (bool, int, float, str, type(None))
_ACTIVATIONS = {"activation" if grid == "uniform" else f"{grid} activation": grid for grid in GRIDS}
"""Kinds of activation quantizers. Each grid is one: a program that does not know it must not take it for another."""
_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "memory_format": {
        str(v).removeprefix("torch."): v
        for v in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
    },
    "layout": {"strided": torch.strided},
}


def check_amount(document: Any) -> None:
    """Raise ValueError if plain data nests too deeply, or is more than a network needs."""
    count = count_values(document)
    if count > MOST_VALUES:
        raise ValueError(f"{count:,} values, more than {MOST_VALUES:,}")


def encode_graph(graph: fx.GraphModule) -> dict[str, Any]:
    """Return ``quantizers``, ``nodes`` and ``outputs``.

    Raises:
        ModelError: an operator is not on the allow-list, or an argument has no JSON form.
    """
    quantizers = {name: _encode_quantizer(q) for name, q in fake_quantizers(graph).items()}
    nodes = [_encode_node(graph, n) for n in graph.graph.nodes if n.op != "output" and not _is_float_weight(n)]
    return {"quantizers": quantizers, "nodes": nodes, "outputs": [n.name for n in _outputs(graph.graph)]}


def float_tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that stay float: those that something else than a weight's quantizer reads."""
    nodes = [n for n in graph.graph.find_nodes(op="get_attr") if not _is_float_weight(n)]
    return {str(n.target): getattr(graph, str(n.target)) for n in nodes}


def decode_graph(document: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Return the graph of :func:`encode_graph`, which must use each of ``tensors``, on the CPU."""
    check_amount(document)
    root, graph = nn.Module(), fx.Graph()
    for name, row in document["quantizers"].items():
        root.add_module(_identifier(name), _decode_quantizer(name, row, tensors))
    nodes: dict[str, fx.Node] = {}
    for row in document["nodes"]:
        nodes[row["name"]] = _decode_node(row, root, graph, nodes, tensors)
    graph.output(tuple(nodes[name] for name in document["outputs"]))
    graph.lint()
    gm = fx.GraphModule(root, graph)
    unused = tensors.keys() - _stored_names(gm)
    if unused:
        raise ValueError(f"no node or quantizer reads tensor {min(unused)}")
    return gm


def encode_interface(interface: Interface) -> dict[str, Any]:
    """Return how arguments and result nest, and the forms of the input tensors.

    Raises:
        ModelError: the network takes or returns a container that has no JSON form.
    """
    forms = [{"dtype": _name(form.dtype), "shape": list(form.shape)} for form in interface.forms]
    return {"inputs": _encode_tree(interface.inputs), "outputs": _encode_tree(interface.outputs), "forms": forms}


def decode_interface(row: dict[str, Any], graph: fx.GraphModule) -> Interface:
    """Return the interface, whose tensors must be those that the graph takes and returns."""
    inputs, outputs = _decode_tree(row["inputs"]), _decode_tree(row["outputs"])
    args, kwargs = inputs
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
        raise ValueError("the inputs are not positional and named arguments")
    taken, returned = ([n.index for n in pytree.tree_leaves(t) if isinstance(n, Leaf)] for t in (inputs, outputs))
    count = len(graph.graph.find_nodes(op="placeholder"))
    if sorted(taken) != list(range(count)):
        raise ValueError(f"the arguments hold tensors {taken}, and the graph takes {count}")
    if not set(returned).issubset(range(len(_outputs(graph.graph)))):
        raise ValueError(f"the result holds tensors {returned}, which the graph does not return")
    forms = tuple(_decode_form(form) for form in row["forms"])
    if len(forms) != count:
        raise ValueError(f"{len(forms)} forms of {count} inputs")
    return Interface(inputs, outputs, forms)


def _name(constant: Any) -> str:
    return str(constant).removeprefix("torch.")


def _outputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    outputs: Any = graph.output_node().args[0]
    return tuple(outputs)


def _is_float_weight(node: fx.Node) -> bool:
    """True for a float weight that only its quantizer reads: the integers stand for it."""
    return node.op == "get_attr" and all(user.op == "call_module" for user in node.users)


def _stored_names(gm: fx.GraphModule) -> set[str]:
    names = set(float_tensors(gm))
    for name, quantizer in fake_quantizers(gm).items():
        names |= {f"{name}.scale"} if quantizer.spec.symmetric else {f"{name}.scale", f"{name}.zero_point"}
        names |= {f"{name}.quantized"} if isinstance(quantizer, WeightFakeQuantize) else set()
    return names


def _encode_quantizer(quantizer: FakeQuantize) -> dict[str, Any]:
    spec = quantizer.spec
    grid = {"bits": spec.bits, "symmetric": spec.symmetric}
    if isinstance(quantizer, WeightFakeQuantize):
        return {"kind": "weight", **grid, "ch_axis": spec.ch_axis, "shape": list(quantizer.quantized.shape)}
    kind = next(kind for kind, of_kind in _ACTIVATIONS.items() if of_kind == spec.grid)
    return {"kind": kind, **grid}


def _decode_quantizer(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> FakeQuantize:
    bits, symmetric = row["bits"], row["symmetric"]
    if type(bits) is not int or not 2 <= bits <= 8 or type(symmetric) is not bool:
        raise ValueError(f"quantizer {name} has {bits!r} bits and is symmetric: {symmetric!r}")
    if row["kind"] in _ACTIVATIONS:
        spec = QuantizationSpec(bits, symmetric, grid=_ACTIVATIONS[row["kind"]])
        if spec.grid != "uniform" and symmetric:
            raise ValueError(f"quantizer {name} has a {spec.grid} grid, which is not symmetric")
        scale, zero_point = _decode_grid(name, spec, (), tensors)
        activation = ActivationFakeQuantize(spec, scale)
        activation.scale, activation.zero_point = scale, zero_point
        return activation
    if row["kind"] != "weight":
        raise ValueError(f"quantizer {name} is of kind {row['kind']!r}")
    shape, axis = _decode_shape(row["shape"]), row["ch_axis"]
    if axis is not None and (type(axis) is not int or not 0 <= axis < len(shape)):
        raise ValueError(f"quantizer {name} has one scale per entry of axis {axis!r}")
    spec = QuantizationSpec(bits, symmetric, axis)
    scale, zero_point = _decode_grid(name, spec, () if axis is None else (shape[axis],), tensors)
    integers = unpack(tensors[f"{name}.quantized"], bits, shape, signed=symmetric)
    weight = WeightFakeQuantize(spec, shape, scale)
    weight.quantized, weight.scale, weight.zero_point = integers, scale, zero_point
    return weight


def _decode_grid(
    name: str, spec: QuantizationSpec, shape: tuple[int, ...], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, the latter as floats too, as the arithmetic takes it; symmetric grids store none."""
    scale = tensors[f"{name}.scale"]
    if tuple(scale.shape) != shape or not scale.is_floating_point():
        raise ValueError(f"scale of {name} is {scale.dtype} {list(scale.shape)}, not floats {list(shape)}")
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = tensors[f"{name}.zero_point"]
    if tuple(zero_point.shape) != shape or zero_point.dtype != spec.dtype:
        raise ValueError(f"zero point of {name} is {zero_point.dtype} {list(zero_point.shape)}, not {list(shape)}")
    if bool((zero_point > spec.quant_max).any()):
        raise ValueError(f"zero point of {name} is larger than {spec.bits} bits hold")
    return scale, zero_point.to(scale.dtype)


def _decode_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(type(s) is int and 0 <= s < 2**63 for s in shape):
        raise ValueError(f"{shape!r} is not a shape")
    return tuple(shape)


def _encode_node(graph: fx.GraphModule, node: fx.Node) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"op": "input", "name": node.name}
    if node.op == "get_attr":
        return {"op": "tensor", "name": node.name, "tensor": node.target}
    if node.op == "call_module":
        encoded = {"op": "quantize", "name": node.name, "quantizer": node.target}
        if isinstance(getattr(graph, str(node.target)), ActivationFakeQuantize):
            encoded["input"] = node.all_input_nodes[0].name
        return encoded
    row = {"op": "call", "name": node.name, "target": operator_name(node), "args": _encode(node, node.args)}
    return row | ({"kwargs": _encode(node, node.kwargs)} if node.kwargs else {})


def _decode_node(
    row: dict[str, Any], root: nn.Module, graph: fx.Graph, nodes: dict[str, fx.Node], tensors: dict[str, Tensor]
) -> fx.Node:
    name = _identifier(row["name"])
    if name in nodes:
        raise ValueError(f"two nodes are called {name}")
    match row["op"]:
        case "input":
            return graph.create_node("placeholder", name, (), name=name)
        case "tensor":
            root.register_buffer(_identifier(row["tensor"]), tensors[row["tensor"]])
            return graph.create_node("get_attr", row["tensor"], name=name)
        case "quantize":
            quantizer = root.get_submodule(_identifier(row["quantizer"]))
            args = () if isinstance(quantizer, WeightFakeQuantize) else (nodes[row["input"]],)
            return graph.create_node("call_module", row["quantizer"], args, name=name)
        case "call":
            target = operators().get(row["target"])
            if target is None:
                raise ValueError(f"operator {row['target']!r} is not allowed")
            args, kwargs = _decode(row["args"], nodes), _decode(row.get("kwargs", {"dict": {}}), nodes)
            if draws_random_numbers(target, args, kwargs):
                raise ValueError(f"{row['target']} draws random numbers")
            return graph.create_node("call_function", target, tuple(args), _known_names(target, kwargs), name=name)
    raise ValueError(f"node kind {row['op']!r} is unknown")


def _known_names(target: Any, kwargs: Any) -> dict[str, Any]:
    """Keyword arguments, whose names become code too, must be those of the operator."""
    known = {a.name for a in target._schema.arguments} if hasattr(target, "_schema") else set()
    if not isinstance(kwargs, dict) or not known.issuperset(kwargs):
        raise ValueError(f"{kwargs!r} are not arguments of {target}")
    return kwargs


def _identifier(name: Any) -> str:
    """A name that is put into generated code must be a plain identifier."""
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is not a valid name")
    return name


def _encode(node: fx.Node, value: Any) -> Any:
    """JSON form of an argument; what JSON lacks is an object with one telling key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_encode(node, v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: _encode(node, v) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": "of the network"}
    for kind, known in _CONSTANTS.items():
        for name, constant in known.items():
            if type(value) is type(constant) and value == constant:
                return {kind: name}
    raise ModelError(
        f"node {node.name} ({node.target}) has an argument of type {type(value).__name__}, which can't be saved."
    )


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        return {k: _decode(v, nodes) for k, v in content.items()}
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device("cpu")
    return _CONSTANTS[kind][content]


def _encode_tree(tree: Any) -> Any:
    """Nested arguments or results as JSON: containers are named, indices of tensors are ``{"tensor": i}``.

    A mapping or dataclass of any kind comes back as a dict, and a named tuple as a tuple, as the class may not be there
    where the file is read.
    """
    if isinstance(tree, Leaf):
        return {"tensor": tree.index}
    if is_dataclass(tree):
        tree = {field.name: getattr(tree, field.name) for field in fields(tree)}
    if isinstance(tree, tuple):
        return {"tuple": [_encode_tree(t) for t in tree]}
    if isinstance(tree, list):
        return {"list": [_encode_tree(t) for t in tree]}
    if isinstance(tree, dict) and all(isinstance(key, _PLAIN) for key in tree):
        return {"dict": [[key, _encode_tree(t)] for key, t in tree.items()]}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}
    if isinstance(tree, _PLAIN):
        return {"value": tree}
    raise ModelError(
        f"the network takes or returns a {type(tree).__name__}, which can't be saved; "
        "use a tuple, list, dict or dataclass."
    )


def _decode_tree(tree: Any) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "tensor" if type(content) is int:
            return Leaf(content)
        case "value" if isinstance(content, _PLAIN):
            return content
        case "float":
            return float(content)
        case "tuple":
            return tuple(_decode_tree(t) for t in content)
        case "list":
            return [_decode_tree(t) for t in content]
        case "dict":
            return {key: _decode_tree(t) for key, t in content}
    raise ValueError(f"structure {kind!r} is unknown, or holds something else than it says")


def _decode_form(row: dict[str, Any]) -> TensorForm:
    shape: list[int | None] = row["shape"]
    _decode_shape([0 if s is None else s for s in shape])
    return TensorForm(_CONSTANTS["dtype"][row["dtype"]], tuple(shape))
