"""Quiesce's own files: the quantized graph as JSON, its tensors as safetensors. Nothing in them is executed.

``quantized.json`` lists the graph's nodes: ATen operators of an allow-list, their arguments, and the fake-quantizers.
``quantized.safetensors`` holds integers, scales, zero points, and what stays float; float weights that were quantized
are not stored. See docs/checkpoint.md.
"""

from __future__ import annotations

import json
import keyword
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quiesce.errors import FileFormatError, ModelError, QuiesceError
from quiesce.export.operators import draws_random_numbers, operator_name, operators
from quiesce.graph.capture import Interface, Leaf, TensorForm, interface_of
from quiesce.outputs import output_folder
from quiesce.quant.fake_quantize import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize, fake_quantizers
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import Recipe
from quiesce.result import Result, read_json

FORMAT, VERSION = "quiesce quantized network", 1
GRAPH_FILE, TENSOR_FILE, RESULT_FILE, RECIPE_FILE = (
    "quantized.json",
    "quantized.safetensors",
    "result.json",
    "recipe.toml",
)
_CONSTANTS: dict[str, dict[str, Any]] = {
    "dtype": {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "memory_format": {
        str(v).removeprefix("torch."): v
        for v in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
    },
    "layout": {"strided": torch.strided},
}


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
            network takes or returns, has no JSON form.
    """
    for node in graph.graph.nodes:
        if node.op == "call_function":
            operator_name(node)
            _encode(node, [node.args, node.kwargs])
    _encode_tree(interface_of(graph).inputs)
    _encode_tree(interface_of(graph).outputs)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write all files into ``folder``, which must be new or empty; it appears whole or not at all."""
    tensors = _stored_tensors(checkpoint.graph)
    document = {
        "format": FORMAT,
        "version": VERSION,
        **_encode_graph(checkpoint.graph),
        "tensors": {name: _form(tensor) for name, tensor in tensors.items()},
        "interface": _encode_interface(interface_of(checkpoint.graph)),
        "preprocessing": checkpoint.preprocessing,
        "recipe": checkpoint.recipe.to_dict(),
    }
    with output_folder(folder, force=False) as new:
        # Through bytes: save_file makes files that only their owner may read.
        (new / TENSOR_FILE).write_bytes(save(tensors))
        (new / GRAPH_FILE).write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
        (new / RECIPE_FILE).write_text(checkpoint.recipe.to_toml(), encoding="utf-8")
        checkpoint.result.write(new / RESULT_FILE)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what :func:`write_checkpoint` wrote.

    Raises:
        FileFormatError: a file is missing, truncated, of another version, or not one of ours.
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
    tensors = _read_tensors(folder / TENSOR_FILE)
    result = Result.read(folder / RESULT_FILE)
    try:
        _check_tensors(document["tensors"], tensors)
        graph = _decode_graph(document, tensors)
        graph.meta["interface"] = _decode_interface(document["interface"], graph)
        recipe = Recipe.from_dict(document["recipe"])
        return Checkpoint(graph, result, recipe, document["preprocessing"])
    except FileFormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, QuiesceError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"{path} is damaged ({reason}); get the file again or run again.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path} can't be read ({error}); it may be missing or truncated, get it again."
        ) from error


def _stored_tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What is kept: float tensors that something else than a quantizer reads, and the quantizers' own."""
    kept = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and any(user.op != "call_module" for user in node.users):
            kept[str(node.target)] = getattr(graph, str(node.target))
    for name, quantizer in fake_quantizers(graph).items():
        for key, tensor in quantizer.named_buffers(recurse=False):
            kept[f"{name}.{key}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _check_tensors(forms: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files must be of one network: the graph knows every tensor's name, dtype and shape."""
    found = {name: _form(tensor) for name, tensor in tensors.items()}
    for name in [*forms, *found]:
        if forms.get(name) != found.get(name):
            raise ValueError(f"tensor {name} is {found.get(name)} in {TENSOR_FILE}, not {forms.get(name)}")


def _encode_graph(graph: fx.GraphModule) -> dict[str, Any]:
    quantizers = {
        name: {
            "kind": "weight" if isinstance(q, WeightFakeQuantize) else "activation",
            "bits": q.spec.bits,
            "symmetric": q.spec.symmetric,
            "ch_axis": q.spec.ch_axis,
        }
        for name, q in fake_quantizers(graph).items()
    }
    nodes, outputs = [], []
    for node in graph.graph.nodes:
        if node.op == "output":
            outputs = [n.name for n in node.args[0]]
        elif node.op != "get_attr" or any(user.op != "call_module" for user in node.users):
            nodes.append(_encode_node(graph, node))
    return {"quantizers": quantizers, "nodes": nodes, "outputs": outputs}


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
    arguments = {"args": _encode(node, list(node.args)), "kwargs": _encode(node, node.kwargs)}
    return {"op": "call", "name": node.name, "target": operator_name(node), **arguments}


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


def _decode_graph(document: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    for name, row in document["quantizers"].items():
        root.add_module(_identifier(name), _decode_quantizer(name, row, tensors))
    nodes: dict[str, fx.Node] = {}
    for row in document["nodes"]:
        nodes[row["name"]] = _decode_node(row, root, graph, nodes, tensors)
    graph.output(tuple(nodes[name] for name in document["outputs"]))
    graph.lint()
    return fx.GraphModule(root, graph)


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
            args, kwargs = _decode(row["args"], nodes), _decode(row["kwargs"], nodes)
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


def _decode_quantizer(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> FakeQuantize:
    spec = QuantizationSpec(int(row["bits"]), bool(row["symmetric"]), row["ch_axis"])
    if not 2 <= spec.bits <= 8:
        raise ValueError(f"quantizer {name} has {spec.bits} bits")
    scale, zero_point = tensors[f"{name}.scale"], tensors[f"{name}.zero_point"]
    if row["kind"] == "activation":
        activation = ActivationFakeQuantize(spec, scale)
        activation.scale, activation.zero_point = _shaped(scale, ()), _shaped(zero_point, ())
        return activation
    integers = tensors[f"{name}.quantized"]
    weight = WeightFakeQuantize(spec, integers.shape, scale)
    if integers.dtype != spec.dtype:
        raise ValueError(f"quantizer {name} has integers of {integers.dtype} instead of {spec.dtype}")
    if integers.numel() and not spec.quant_min <= int(integers.min()) <= int(integers.max()) <= spec.quant_max:
        raise ValueError(f"quantizer {name} has integers that {spec.bits} bits do not hold")
    shape = tuple(weight.scale.shape)
    weight.quantized, weight.scale, weight.zero_point = integers, _shaped(scale, shape), _shaped(zero_point, shape)
    return weight


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"a scale or zero point has shape {list(tensor.shape)} instead of {list(shape)}")
    return tensor


def _identifier(name: Any) -> str:
    """A name that is put into generated code must be a plain identifier."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is not a valid name")
    return name


def _encode_interface(interface: Interface) -> dict[str, Any]:
    forms = [{"dtype": str(f.dtype).removeprefix("torch."), "shape": list(f.shape)} for f in interface.forms]
    return {"inputs": _encode_tree(interface.inputs), "outputs": _encode_tree(interface.outputs), "forms": forms}


def _decode_interface(row: dict[str, Any], graph: fx.GraphModule) -> Interface:
    """Read the interface, whose tensors must be those that the graph takes and returns."""
    inputs, outputs = _decode_tree(row["inputs"]), _decode_tree(row["outputs"])
    args, kwargs = inputs
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not all(isinstance(k, str) for k in kwargs):
        raise ValueError("the inputs are not positional and named arguments")
    taken, returned = ([n.index for n in pytree.tree_leaves(t) if isinstance(n, Leaf)] for t in (inputs, outputs))
    count = len(graph.graph.find_nodes(op="placeholder"))
    if sorted(taken) != list(range(count)):
        raise ValueError(f"the arguments hold tensors {taken}, and the graph takes {count}")
    if not set(returned).issubset(range(len(graph.graph.output_node().args[0]))):  # type: ignore[arg-type]
        raise ValueError(f"the result holds tensors {returned}, which the graph does not return")
    forms = tuple(_decode_form(form) for form in row["forms"])
    if len(forms) != count:
        raise ValueError(f"{len(forms)} forms of {count} inputs")
    return Interface(inputs, outputs, forms)


def _decode_form(row: dict[str, Any]) -> TensorForm:
    shape = tuple(row["shape"])
    if not all(s is None or (type(s) is int and 0 <= s < 2**63) for s in shape):
        raise ValueError(f"{list(shape)} is not the shape of an input")
    return TensorForm(_CONSTANTS["dtype"][row["dtype"]], shape)


def _encode_tree(tree: Any) -> Any:
    """Nested arguments or results as JSON: containers are named, indices of tensors are ``{"tensor": i}``.

    A mapping of any kind comes back as a dict, as its class may not be there where the file is read.
    """
    if isinstance(tree, Leaf):
        return {"tensor": tree.index}
    if isinstance(tree, tuple):
        if type(tree) is not tuple:
            raise ModelError(
                f"the network takes or returns a {type(tree).__name__}, which can't be saved; use tuple, list or dict."
            )
        return {"tuple": [_encode_tree(t) for t in tree]}
    if isinstance(tree, list):
        return {"list": [_encode_tree(t) for t in tree]}
    if isinstance(tree, dict):
        return {"dict": [[key, _encode_tree(t)] for key, t in tree.items()]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise ModelError(
        f"the network takes or returns a {type(tree).__name__}, which can't be saved; use tuple, list or dict."
    )


def _decode_tree(tree: Any) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return Leaf(int(content))
        case "value":
            return content
        case "tuple":
            return tuple(_decode_tree(t) for t in content)
        case "list":
            return [_decode_tree(t) for t in content]
        case "dict":
            return {key: _decode_tree(t) for key, t in content}
    raise ValueError(f"structure {kind!r} is unknown")
