"""Placement: decide which tensors are quantized and how (annotate), then put the fake-quantizers there (insert).

Every quantized tensor has exactly one fake-quantizer, right behind the node that produces it and seen by all its users.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import fx

from quiesce.errors import ModelError, RecipeError, nearest_name
from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import (
    WEIGHT_OPS,
    input_node,
    is_relu,
    is_weight_op,
    operands,
    origin,
    upper_bound,
    weight_node,
)
from quiesce.graph.rewrite import free_name, tidy
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import LayerOverride, Recipe

Annotation = QuantizationSpec
"""What a tensor-producing node is to be quantized to."""


def weight_layers(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the weight operators in topological order, by the name of the module (or weight) they come from."""
    layers: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if is_weight_op(node):
            name = _layer_name(node)
            layers[name if name not in layers else f"{name}:{node.name}"] = node
    return layers


def annotate(gm: fx.GraphModule, backend: Backend, recipe: Recipe) -> dict[fx.Node, Annotation]:
    """Return what each tensor is to be quantized to: weights (get_attr nodes) and activations (all others).

    A tensor that feeds several layers, or a weight of several, takes the largest bits that any of them asks for. What a
    backend quantizes beyond the inputs of layers takes the bits of activations, and the bits of both ends where the
    network returns it.

    Raises:
        ModelError: there is no weight layer, or the weight of one is computed from the input or in half precision.
        RecipeError: an override fits no layer.
    """
    layers = {name: node for name, node in weight_layers(gm).items() if node.target in backend.weight_ops}
    if not layers:
        raise ModelError("the network has no convolution or linear layer; there is nothing to quantize.")
    overrides = _overrides(list(layers), recipe.layers)
    annotations: dict[fx.Node, Annotation] = {}
    for index, (name, layer) in enumerate(layers.items()):
        weight = weight_node(layer)
        if weight.op != "get_attr":
            raise ModelError(
                f"the weight of {name} ({layer.name}) is computed from the input; such layers can't be quantized."
            )
        dtype = weight.meta["val"].dtype
        if dtype not in (torch.float32, torch.float64):
            raise ModelError(f"the weight of {name} is {dtype}, too coarse to round; give the network in float32.")
        edge = index in (0, len(layers) - 1)
        weight_bits, input_bits = _layer_bits(recipe, index, edge, overrides.get(name))
        ch_axis = WEIGHT_OPS[layer.target].ch_axis if recipe.weights.per_channel else None  # type: ignore[index]
        if weight in annotations:
            weight_bits = max(weight_bits, annotations[weight].bits)
        annotations[weight] = Annotation(weight_bits, recipe.weights.symmetric, ch_axis)
        if input_bits is not None:
            _annotate_activation(annotations, origin(input_node(layer), backend.pass_ops), input_bits, recipe)
    if recipe.activations.bits is not None:
        for tensor in _further_tensors(gm, backend):
            if tensor not in annotations:
                returned = any(user.op == "output" for user in tensor.users)
                bits = recipe.activations.first_last_bits if returned else recipe.activations.bits
                _annotate_activation(annotations, tensor, bits, recipe)
    return annotations


def insert(gm: fx.GraphModule, annotations: dict[fx.Node, Annotation]) -> fx.GraphModule:
    """Return a copy of ``gm`` with a fake-quantizer behind each annotated node."""
    originals = list(gm.graph.nodes)
    gm = copy.deepcopy(gm)
    device_like = next(gm.buffers())
    for original, node in zip(originals, list(gm.graph.nodes), strict=True):
        annotation = annotations.get(original)
        if annotation is None:
            continue
        target = free_name(gm, f"{node.name}_quantizer")
        if node.op == "get_attr":
            weight = getattr(gm, str(node.target))
            gm.add_module(target, WeightFakeQuantize(annotation, weight.shape, weight))
        else:
            gm.add_module(
                target, ActivationFakeQuantize(annotation, device_like.new_empty((), dtype=node.meta["val"].dtype))
            )
        with gm.graph.inserting_after(node):
            quantizer = gm.graph.call_module(target, (node,))
        quantizer.meta = dict(node.meta)
        node.replace_all_uses_with(quantizer, delete_user_cb=lambda user, q=quantizer: user is not q)
    return tidy(gm)


def _further_tensors(gm: fx.GraphModule, backend: Backend) -> Iterator[fx.Node]:
    """Yield what the backend quantizes besides the inputs of layers."""
    for node in gm.graph.nodes:
        if node.target in backend.input_ops:
            yield from (origin(tensor, backend.pass_ops) for tensor in operands(node))
        if node.target in backend.skip_ops:
            yield from (origin(tensor, backend.pass_ops) for tensor in _skips(operands(node)))
        if node.target in backend.output_ops:
            (reader, *others) = node.users
            yield reader if not others and is_relu(reader) else node


def _skips(branches: list[fx.Node]) -> list[fx.Node]:
    """Leave out the last of ``branches`` that comes straight from a weight operator, and from there to here only."""
    made = [n for n in branches if is_weight_op(n) and len(n.users) == 1]
    return [n for n in branches if n is not max(made, default=None)]


def end_grids_at_bounds(gm: fx.GraphModule) -> None:
    """Keep learned scales behind a ReLU6 from ending above 6: a kernel on integers cuts off where its grid ends."""
    for node in gm.graph.nodes:
        quantizer = getattr(gm, str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, ActivationFakeQuantize) and is_relu(node.args[0]):
            quantizer.largest = upper_bound(node.args[0])


def _layer_bits(recipe: Recipe, index: int, edge: bool, override: LayerOverride | None) -> tuple[int, int | None]:
    """Bits of a layer's weight and of its input: 8 at both ends, the second layer's input by its own setting."""
    weights, activations = recipe.weights, recipe.activations
    weight_bits = weights.first_last_bits if edge else weights.bits
    input_bits = activations.bits
    if input_bits is not None:
        if edge:
            input_bits = activations.first_last_bits
        elif index == 1 and activations.second_layer_bits is not None:
            input_bits = activations.second_layer_bits
    if override is not None:
        weight_bits = override.weight_bits or weight_bits
        input_bits = override.activation_bits or input_bits
    return weight_bits, input_bits


def _annotate_activation(annotations: dict[fx.Node, Annotation], node: fx.Node, bits: int, recipe: Recipe) -> None:
    known = annotations.get(node)
    bits = bits if known is None else max(bits, known.bits)
    annotations[node] = Annotation(bits, recipe.activations.symmetric)


def _overrides(names: list[str], overrides: tuple[LayerOverride, ...]) -> dict[str, LayerOverride]:
    """Return each layer's override; of several patterns that fit a layer, the last one to give a number holds.

    A pattern for a module that is called several times (``conv``, ``conv:conv2d_1``) fits every call.
    """
    found: dict[str, LayerOverride] = {}
    for override in overrides:
        fitting = [n for n in names if any(fnmatchcase(m, override.pattern) for m in (n, n.partition(":")[0]))]
        if not fitting:
            raise RecipeError(
                f"layers: pattern {override.pattern!r} fits no weight layer.{nearest_name(override.pattern, names)}"
            )
        for name in fitting:
            before = found.get(name, override)
            found[name] = replace(
                override,
                weight_bits=override.weight_bits or before.weight_bits,
                activation_bits=override.activation_bits or before.activation_bits,
            )
    return found


def _layer_name(node: fx.Node) -> str:
    """The module a layer belongs to: that of its weight if it lies in the module called, else the module called.

    They differ for a weight that two modules share, which has one path.
    """
    weight = weight_node(node)
    origin = weight.all_input_nodes[0] if weight.op == "call_module" and weight.all_input_nodes else weight
    path = str(origin.meta.get("path", ""))
    owner = path.removesuffix(".weight") if path.endswith(".weight") else ""
    called = next((p for p, _ in reversed(module_stack(node))), "")
    if owner and (not called or f"{owner}.".startswith(f"{called}.")):
        return owner
    return called or path or node.name


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """Return (path, class) of the modules whose forward made this node, outermost first, the root left out."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(path, str(kind)) for path, kind in stack.values() if path]
