"""The ATen operators the graph passes know by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

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


def input_node(node: fx.Node) -> fx.Node:
    """The tensor a weight op is applied to."""
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def weight_node(node: fx.Node) -> fx.Node:
    """The weight of a weight op (a get_attr node, or its fake-quantizer)."""
    found = argument(node, WEIGHT_OPS[node.target].weight, "weight", None)  # type: ignore[index]
    assert isinstance(found, fx.Node)
    return found
