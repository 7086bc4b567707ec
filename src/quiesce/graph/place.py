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
    PASS_OPS,
    WEIGHT_OPS,
    aten,
    input_node,
    is_relu,
    is_weight_op,
    matmul_operands,
    never_quantized,
    operands,
    origin,
    upper_bound,
    weight_node,
)
from quiesce.graph.rewrite import free_name, tidy
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import LayerOverride, Recipe

TYPE = "type:"
"""What patterns begin with that are of layers' types instead of their names."""
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

    Layers of :func:`float_layers` are left alone, and so are their inputs where nothing else asks for these. The first
    and the last layer are those of the network, left float or not: leaving one float changes no other one's bits.

    Raises:
        ModelError: there is no weight layer that can be quantized.
        RecipeError: an override fits no layer, or leaves float one of several layers that share a weight.
    """
    layers, left = weight_layers(gm), float_layers(gm, backend, recipe)
    if not layers:
        raise ModelError("the network has no convolution or linear layer; there is nothing to quantize.")
    if len(left) == len(layers):
        name, reason = next(iter(left.items()))
        raise ModelError(f"every weight layer is left float, such as {name} ({reason}); there is nothing to quantize.")
    overrides = _overrides(layers, recipe.layers)
    annotations: dict[fx.Node, Annotation] = {}
    for index, (name, layer) in enumerate(layers.items()):
        if name in left:
            continue
        weight = weight_node(layer)
        edge = index in (0, len(layers) - 1)
        weight_bits, input_bits = _layer_bits(recipe, index, edge, overrides.get(name))
        ch_axis = WEIGHT_OPS[layer.target].ch_axis if recipe.weights.per_channel else None  # type: ignore[index]
        if weight in annotations:
            weight_bits = max(weight_bits, annotations[weight].bits)
        annotations[weight] = Annotation(weight_bits, recipe.weights.symmetric, ch_axis)
        if input_bits is not None:
            _annotate_activation(annotations, origin(input_node(layer), backend.pass_ops), input_bits, recipe)
    if recipe.activations.bits is not None:
        for tensor in _further_tensors(gm, backend, {layers[name] for name in left}):
            if tensor not in annotations:
                returned = any(user.op == "output" for user in tensor.users)
                bits = recipe.activations.first_last_bits if returned else recipe.activations.bits
                _annotate_activation(annotations, tensor, bits, recipe)
    return annotations


def float_layers(gm: fx.GraphModule, backend: Backend, recipe: Recipe) -> dict[str, str]:
    """Return the weight layers that stay float, in topological order, with the reason of each.

    Raises:
        RecipeError: an override fits no layer, or leaves float one of several layers that share a weight.
    """
    layers = weight_layers(gm)
    overrides = _overrides(layers, recipe.layers)
    reasons = {name: _why_float(layer, overrides.get(name), backend) for name, layer in layers.items()}
    for group in weight_groups(layers):
        first, *others = sorted(group, key=lambda name: not reasons[name])
        if others and reasons[first] and not reasons[others[-1]]:
            raise RecipeError(
                f"layers: {first} is left float, and {others[-1]}, which has the same weight, is not; "
                "leave both float, or neither."
            )
    return {name: reason for name, reason in reasons.items() if reason}


def never_quantized_layers(gm: fx.GraphModule) -> dict[str, str]:
    """Return what has weights and is no weight operator, in topological order, with the reason why it stays float."""
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        if kind := never_quantized(node):
            name = next((path for path, _ in reversed(module_stack(node))), node.name)
            found[name if name not in found else f"{name}:{node.name}"] = f"{kind} are not quantized"
    return found


def weight_groups(layers: dict[str, fx.Node]) -> list[list[str]]:
    """Return the names of ``layers``, those that share a weight together, in topological order."""
    groups: dict[fx.Node, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(weight_node(layer), []).append(name)
    return list(groups.values())


def layers_at_common_bits(gm: fx.GraphModule, recipe: Recipe) -> list[str]:
    """Return the quantized weight layers whose bits are ``weights.bits``: neither end, and none with an override.

    Nor those that share a weight with such a layer. ``gm`` holds fake-quantizers.
    """
    layers = weight_layers(gm)
    given = {name for name, o in _overrides(layers, recipe.layers).items() if o.weight_bits is not None}
    given |= {*list(layers)[:1], *list(layers)[-1:]}
    groups = [group for group in weight_groups(layers) if weight_quantizer(gm, layers[group[0]]) is not None]
    return [name for group in groups if not given.intersection(group) for name in group]


def weight_quantizer(gm: fx.GraphModule, layer: fx.Node) -> WeightFakeQuantize | None:
    """Return what quantizes the weight of the weight operator ``layer``; None if the layer is left float."""
    weight = weight_node(layer)
    quantizer = getattr(gm, str(weight.target)) if weight.op == "call_module" else None
    return quantizer if isinstance(quantizer, WeightFakeQuantize) else None


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


def _further_tensors(gm: fx.GraphModule, backend: Backend, left: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield what the backend quantizes besides the inputs of layers; outputs of layers ``left`` float stay float."""
    for node in gm.graph.nodes:
        if node.target in backend.input_ops:
            yield from (origin(tensor, backend.pass_ops) for tensor in operands(node))
        if node.target in backend.matmul_ops:
            yield from (origin(tensor, backend.pass_ops) for tensor in matmul_operands(node))
        if node.target in backend.skip_ops:
            yield from (origin(tensor, backend.pass_ops) for tensor in _skips(operands(node)))
        if node.target in backend.output_ops and node not in left:
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


def _why_float(layer: fx.Node, override: LayerOverride | None, backend: Backend) -> str:
    weight = weight_node(layer)
    if override is not None and override.leave_float:
        return f"the recipe asks for it ({override.pattern})"
    if weight.op != "get_attr":
        return "its weight is computed from the input"
    if weight.meta["val"].dtype not in (torch.float32, torch.float64):
        return f"its weight is {weight.meta['val'].dtype}, too coarse to round; give the network in float32"
    return "" if layer.target in backend.weight_ops else f"backend {backend.name} does not quantize such a layer"


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
    grid = _grid(node, recipe)
    annotations[node] = Annotation(bits, recipe.activations.symmetric and grid == "uniform", grid=grid)


def _grid(node: fx.Node, recipe: Recipe) -> str:
    """Return the grid that fits how the node's values are spread."""
    while node.target in PASS_OPS or node.target is aten.masked_fill.Scalar:  # of rows that a mask hides
        node = input_node(node)
    if node.target is aten.softmax.int:
        return recipe.activations.softmax
    return recipe.activations.gelu if node.target is aten.gelu.default else "uniform"


def _overrides(layers: dict[str, fx.Node], overrides: tuple[LayerOverride, ...]) -> dict[str, LayerOverride]:
    """Return each layer's override; of several that fit a layer, the last one to give a number holds.

    Whether the layer is left float is what the last one of all says. A pattern for a module that is called several
    times (``conv``, ``conv:conv2d_1``) fits every call.
    """
    found: dict[str, LayerOverride] = {}
    for override in overrides:
        names = {name: _names_of(name, layer, override.pattern) for name, layer in layers.items()}
        fitting = [n for n, known in names.items() if any(fnmatchcase(k, override.pattern) for k in known)]
        if not fitting:
            known = list(dict.fromkeys(k for group in names.values() for k in group))
            raise RecipeError(
                f"layers: pattern {override.pattern!r} fits no weight layer.{nearest_name(override.pattern, known)}"
            )
        for name in fitting:
            before = found.get(name, override)
            found[name] = (
                override
                if override.leave_float
                else replace(
                    override,
                    weight_bits=override.weight_bits or before.weight_bits,
                    activation_bits=override.activation_bits or before.activation_bits,
                )
            )
    return found


def _names_of(name: str, layer: fx.Node, pattern: str) -> list[str]:
    """What ``pattern`` is compared with: a layer's types if it begins with ``type:``, else its names."""
    if not pattern.startswith(TYPE):
        return [name, name.partition(":")[0]]
    classes = [kind.rpartition(".")[2] for _, kind in reversed(module_stack(layer))]
    return [f"{TYPE}{kind}" for kind in (WEIGHT_OPS[layer.target].name, *classes)]  # type: ignore[index]


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
