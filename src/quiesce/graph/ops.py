"""The ATen operators the graph passes know by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightOp:
    """An operator with a weight: where its input, weight and bias stand, and which weight axis is output channels."""

    name: str
    ch_axis: int
    spatial_dims: int
    """0 for linear."""
    transposed: bool = False
    groups_position: int | None = None
    input: int = 0
    weight: int = 1
    bias: int = 2


WEIGHT_OPS = {
    aten.linear.default: WeightOp("linear", 0, 0),
    aten.conv1d.default: WeightOp("conv1d", 0, 1, groups_position=6),
    aten.conv2d.default: WeightOp("conv2d", 0, 2, groups_position=6),
    aten.conv3d.default: WeightOp("conv3d", 0, 3, groups_position=6),
    aten.conv1d.padding: WeightOp("conv1d", 0, 1, groups_position=6),
    aten.conv2d.padding: WeightOp("conv2d", 0, 2, groups_position=6),
    aten.conv3d.padding: WeightOp("conv3d", 0, 3, groups_position=6),
    aten.conv_transpose1d.default: WeightOp("conv_transpose1d", 1, 1, True, groups_position=6),
    aten.conv_transpose2d.input: WeightOp("conv_transpose2d", 1, 2, True, groups_position=6),
    aten.conv_transpose3d.input: WeightOp("conv_transpose3d", 1, 3, True, groups_position=6),
}

AVERAGE_POOLS = frozenset(
    {
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.mean.dim,
    }
)
"""Average pools, a mean over all spatial axes among them (see :func:`operands`)."""

MATMUL_OPS = {
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.addmm.default: (1, 2),
}
"""Products of two tensors, and where these stand."""

PASS_OPS = frozenset(
    {
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.slice.Tensor,
        aten.clone.default,
    }
)
"""Operators whose values are all values of their first argument."""

NEVER_QUANTIZED: dict[Any, str] = {
    packet: kind
    for kind, packets in {
        "recurrent layers": (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu),
        "recurrent cells": (aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell),
        "embeddings": (aten.embedding, aten.embedding_bag, aten._embedding_bag),
        "products of this form with constants": (aten.bilinear, aten.einsum, aten.matmul, aten.bmm, aten.baddbmm),
    }.items()
    for packet in packets
}
"""Operators that are no weight ops and yet may have weights, and what to call them."""


@dataclass(frozen=True)
class Hyperparameters:
    """What a weight op is besides its kernel size and channels."""

    name: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    depthwise: bool
    groups: int
    """1 for depthwise convolutions too, whose groups only repeat their channels."""


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """Return an argument given by position or by name, or its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def hyperparameters(node: fx.Node, weight_shape: torch.Size) -> Hyperparameters:
    """Read a weight op's hyper-parameters off its node."""
    op = WEIGHT_OPS[node.target]  # type: ignore[index]
    if op.spatial_dims == 0:
        return Hyperparameters(op.name, (), (), False, 1)
    stride = _per_dim(argument(node, 3, "stride", 1), op.spatial_dims)
    dilation = _per_dim(argument(node, 7 if op.transposed else 5, "dilation", 1), op.spatial_dims)
    groups = groups_of(node)
    depthwise = groups > 1 and weight_shape[1] == 1
    return Hyperparameters(op.name, stride, dilation, depthwise, 1 if depthwise else groups)


def has_depthwise(graph: fx.GraphModule) -> bool:
    """Return whether a layer of ``graph`` is a depthwise convolution."""
    layers = [n for n in graph.graph.nodes if is_weight_op(n)]
    return any(hyperparameters(n, weight_node(n).meta["val"].shape).depthwise for n in layers)


def groups_of(node: fx.Node) -> int:
    """Return a convolution's number of groups, 1 for linear."""
    position = WEIGHT_OPS[node.target].groups_position  # type: ignore[index]
    groups = 1 if position is None else argument(node, position, "groups", 1)
    assert isinstance(groups, int)
    return groups


def _per_dim(value: Any, dims: int) -> tuple[int, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(int(v) for v in values) * (dims if len(values) == 1 else 1)


def is_weight_op(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in WEIGHT_OPS


def never_quantized(node: fx.Node) -> str:
    """Return what a node of :data:`NEVER_QUANTIZED` is called if it has a constant operand, else ""."""
    constant = any(n.op == "get_attr" and is_real(n) for n in node.all_input_nodes)
    return NEVER_QUANTIZED.get(getattr(node.target, "overloadpacket", None), "") if constant else ""


def input_node(node: fx.Node) -> fx.Node:
    """The tensor that an operator is applied to: its first argument."""
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def weight_node(node: fx.Node) -> fx.Node:
    """The weight of a weight op (a get_attr node, or its fake-quantizer)."""
    found = argument(node, WEIGHT_OPS[node.target].weight, "weight", None)  # type: ignore[index]
    assert isinstance(found, fx.Node)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that an addition, product, concat or pool computes on.

    There are none when one of them is a number or a constant, or for a mean that is not over all spatial axes: no
    runtime computes these on integers.
    """
    if node.target is aten.mean.dim and not _is_spatial(node):
        return []
    found: list[Any] = list(node.args[:2] if node.target in (aten.add.Tensor, aten.mul.Tensor) else node.args[:1])
    found = list(found[0]) if isinstance(found[0], list | tuple) else found
    computed = all(isinstance(n, fx.Node) and n.op != "get_attr" and is_real(n) for n in found)
    return list(dict.fromkeys(found)) if computed else []


def matmul_operands(node: fx.Node) -> list[fx.Node]:
    """Return the two tensors that a product, an einsum of two tensors too, multiplies.

    There are none when one of them is a constant of the network, or what is made of its inputs' sizes alone, such as
    positions.
    """
    if node.target is aten.einsum.default:
        found: Any = list(argument(node, 1, "tensors", ()))
    else:
        found = [node.args[i] for i in MATMUL_OPS[node.target]]  # type: ignore[index]
    computed = len(found) == 2 and all(is_real(n) and _has_values_of_inputs(n) for n in found)
    return list(dict.fromkeys(found)) if computed else []


def _has_values_of_inputs(node: fx.Node) -> bool:
    """True if the network's inputs are among what a tensor is computed from, by more than their sizes."""
    seen, waiting = {node}, [node]
    while waiting:
        tensor = waiting.pop()
        if tensor.op == "placeholder":
            return True
        sources = {n for n in tensor.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt | int)} - seen
        seen |= sources
        waiting += sources
    return False


def _is_spatial(mean: fx.Node) -> bool:
    ndim = input_node(mean).meta["val"].ndim
    dims: Any = argument(mean, 1, "dim", None) or []
    return ndim > 2 and {d % ndim for d in dims} == set(range(2, ndim))


def is_real(node: fx.Node) -> bool:
    """True for a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_relu(node: fx.Node) -> bool:
    """True for activation functions that cut values off at 0 and perhaps at a higher bound: ReLU, ReLU6."""
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        return bool(argument(node, 1, "min_val" if node.target is aten.hardtanh.default else "min", -1) == 0)
    return node.target in (aten.relu.default, aten.relu6.default)


def upper_bound(relu: fx.Node) -> float:
    """Return the greatest value that a node of :func:`is_relu` gives: 6 of a ReLU6, infinity of a ReLU."""
    if relu.target is aten.relu6.default:
        return 6.0
    if relu.target is aten.hardtanh.default:
        return float(argument(relu, 2, "max_val", 1.0))
    high = argument(relu, 2, "max", None) if relu.target is aten.clamp.default else None
    return math.inf if high is None else float(high)


def pads_zeros(node: fx.Node) -> bool:
    if node.target is aten.pad.default:
        return argument(node, 2, "mode", "constant") == "constant" and not argument(node, 3, "value", None)
    return node.target is aten.constant_pad_nd.default and not argument(node, 2, "value", 0)


def origin(node: fx.Node, pass_ops: frozenset[Any]) -> fx.Node:
    """Follow a weight operator's input back through ``pass_ops`` to the node that computes its values.

    A padding with zeros right in front of the weight operator is passed too, when there are any such operators: zero is
    on every grid.
    """
    if pass_ops and pads_zeros(node):
        node = input_node(node)
    while node.target in pass_ops:
        node = input_node(node)
    return node
