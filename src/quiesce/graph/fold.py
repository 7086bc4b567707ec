"""Batch-norm folding: y = γ·(W∗x + b − μ)/σ + β becomes one convolution or linear layer.

So do products with and additions of a constant for each channel, which frozen batch-norms and layer scales are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quiesce.graph.ops import WEIGHT_OPS, argument, groups_of, input_node, is_weight_op, weight_node
from quiesce.graph.rewrite import add_tensor, tidy

aten = torch.ops.aten
BATCH_NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit.no_stats}


@dataclass(frozen=True)
class LeftBatchNorm:
    """A batch-norm that stays in the graph in float, and why."""

    node: str
    reason: str


def fold(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[LeftBatchNorm]]:
    """Return a copy of ``gm`` with batch-norms folded into the layer in front of them, and the list of those left.

    A weight used by several layers stays one if nothing but such layers lies between its uses, as in a head that is
    called on every level of a pyramid, or the steps of a recurrence. Otherwise each layer is given a copy first: each
    can have another batch-norm behind it, and each is rounded for what follows it. Folding is computed in float64.
    """
    gm = copy.deepcopy(gm)
    _unshare_weights(gm)
    left = []
    for node in list(gm.graph.nodes):
        reason = _why_not(node) if node.target in BATCH_NORMS else ""
        if reason:
            left.append(LeftBatchNorm(node.name, reason))
        elif node.target in BATCH_NORMS:
            _fold_batch_norm(gm, node.args[0], node)
        elif (found := _channel_constant(node)) is not None:
            _fold_constant(gm, *found, node)
    return tidy(gm), left


def _why_not(batch_norm: fx.Node) -> str:
    layer: Any = batch_norm.args[0]
    if batch_norm.target is not aten.batch_norm.default or batch_norm.args[5]:
        return "it uses the statistics of each batch"
    if any(isinstance(a, fx.Node) and a.op != "get_attr" for a in batch_norm.args[1:5]):
        return "its parameters are computed from the input"
    if not is_weight_op(layer):
        return "no convolution or linear layer stands in front of it"
    if not _has_constants(layer):
        return f"the weight or bias of {layer.name} is computed from the input"
    if len(layer.users) > 1:
        return f"the output of {layer.name} is also used elsewhere"
    if WEIGHT_OPS[layer.target].spatial_dims == 0 and layer.meta["val"].ndim != 2:
        return f"{layer.name} does not have its channels on the axis that is normalized"
    return ""


def _has_constants(layer: fx.Node) -> bool:
    return all(n.op == "get_attr" for n in layer.all_input_nodes if n is not input_node(layer))


def _channel_constant(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The layer and the constant, one number a channel, that ``node`` adds to it or multiplies it with, if it does."""
    if node.target not in (aten.add.Tensor, aten.mul.Tensor) or node.kwargs:
        return None
    layer, constant = node.args if isinstance(node.args[0], fx.Node) and is_weight_op(node.args[0]) else node.args[::-1]
    if not (isinstance(layer, fx.Node) and isinstance(constant, fx.Node) and is_weight_op(layer)):
        return None
    if constant.op != "get_attr" or len(layer.users) > 1 or not _has_constants(layer):
        return None
    made, shape = layer.meta["val"], list(constant.meta["val"].shape)
    axis = made.ndim - 1 if WEIGHT_OPS[layer.target].spatial_dims == 0 else 1  # type: ignore[index]
    wanted = [made.shape[axis] if i == axis else 1 for i in range(made.ndim)]
    fits = [1] * (made.ndim - len(shape)) + shape == wanted and constant.meta["val"].dtype == made.dtype
    return (layer, constant) if fits else None


def _fold_constant(gm: fx.GraphModule, layer: fx.Node, constant: fx.Node, node: fx.Node) -> None:
    values = getattr(gm, str(constant.target)).double().flatten()
    if node.target is aten.add.Tensor:
        _absorb(gm, layer, node, torch.ones_like(values), values)
    else:
        _absorb(gm, layer, node, values, torch.zeros_like(values))


def _fold_batch_norm(gm: fx.GraphModule, layer: fx.Node, batch_norm: fx.Node) -> None:
    gain, offset, mean, variance = (
        getattr(gm, str(a.target)) if isinstance(a, fx.Node) else None for a in batch_norm.args[1:5]
    )
    assert mean is not None and variance is not None
    factor = torch.rsqrt(variance.double() + batch_norm.args[7])
    factor = factor if gain is None else factor * gain.double()
    _absorb(gm, layer, batch_norm, factor, (0 if offset is None else offset.double()) - mean.double() * factor)


def _absorb(gm: fx.GraphModule, layer: fx.Node, node: fx.Node, factor: Tensor, offset: Tensor) -> None:
    """Make ``layer`` compute what ``node`` makes of it, ``factor`` · layer + ``offset`` [channels]; drop the node."""
    op = WEIGHT_OPS[layer.target]  # type: ignore[index]
    weight_at = layer.args[op.weight]
    bias_at = argument(layer, op.bias, "bias", None)
    assert isinstance(weight_at, fx.Node)
    weight = getattr(gm, str(weight_at.target))
    new_bias = (
        offset if not isinstance(bias_at, fx.Node) else getattr(gm, str(bias_at.target)).double() * factor + offset
    )
    new_weight = _scale_channels(weight.double(), factor, op.ch_axis, groups_of(layer))
    setattr(gm, str(weight_at.target), new_weight.to(weight.dtype))
    name = add_tensor(gm, f"{weight_at.name}_bias", new_bias.to(weight.dtype))
    with gm.graph.inserting_before(layer):
        bias_node = gm.graph.get_attr(name)
    layer.args = (*layer.args[: op.bias], bias_node, *layer.args[op.bias + 1 :])
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k != "bias"}
    layer.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(layer)
    gm.graph.erase_node(node)


def _scale_channels(weight: Tensor, factor: Tensor, ch_axis: int, groups: int) -> Tensor:
    """Multiply output channels; a transposed convolution keeps them as [in, out / groups], group by group of inputs."""
    if ch_axis == 0:
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    inputs, per_group = weight.shape[:2]
    grouped = weight.view(groups, inputs // groups, per_group, *weight.shape[2:])
    return (grouped * factor.view(groups, 1, per_group, *[1] * (weight.ndim - 2))).view(weight.shape)


def _unshare_weights(gm: fx.GraphModule) -> None:
    """Give each weight operator a bias of its own, and a weight of its own unless it is to be shared."""
    taken: set[str] = set()
    shared = _shared_weights(gm)
    for layer in [n for n in gm.graph.nodes if is_weight_op(n)]:
        for constant in [n for n in layer.all_input_nodes if n.op == "get_attr" and n not in shared]:
            if str(constant.target) not in taken and len(constant.users) == 1:
                taken.add(str(constant.target))
                continue
            name = add_tensor(gm, f"{constant.target}_{layer.name}", getattr(gm, str(constant.target)).clone())
            with gm.graph.inserting_before(layer):
                own = gm.graph.get_attr(name)
            own.meta = dict(constant.meta)
            layer.replace_input_with(constant, own)


def _shared_weights(gm: fx.GraphModule) -> set[fx.Node]:
    """Weights that several layers of one kind use, and nothing else, none of which will have something folded in.

    They are learned together, in one unit, so the layers between them have to be such layers too.
    """
    layers = [n for n in gm.graph.nodes if is_weight_op(n)]
    folded = {n.args[0] for n in gm.graph.nodes if n.target in BATCH_NORMS and not _why_not(n)}
    folded |= {found[0] for n in gm.graph.nodes if (found := _channel_constant(n)) is not None}
    uses: dict[fx.Node, list[int]] = {}
    for position, layer in enumerate(layers):
        uses.setdefault(weight_node(layer), []).append(position)
    shared = {
        weight: places
        for weight, places in uses.items()
        if weight.op == "get_attr"
        and set(weight.users) == {layers[p] for p in places}
        and len({layers[p].target for p in places}) == 1
        and len(places) > 1
        and not folded.intersection(weight.users)
    }
    while True:
        inside = {p for places in shared.values() for p in places}
        apart = [w for w, places in shared.items() if not inside.issuperset(range(places[0], places[-1]))]
        if not apart:
            return set(shared)
        for weight in apart:
            del shared[weight]
