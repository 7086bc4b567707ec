"""Reconstruction units: contiguous stretches of the graph in topological order, run on their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from quiesce.graph.ops import is_weight_op


@dataclass(frozen=True)
class Unit:
    """The stretch ``[start, stop)`` of :func:`compute_nodes`, optimized as one."""

    name: str
    start: int
    stop: int
    layers: tuple[str, ...]
    """Names of its weight layers, in order."""


def joined(units: Sequence[Unit]) -> Unit:
    """Return the unit that neighbouring ``units``, one at least, make together."""
    layers = tuple(layer for unit in units for layer in unit.layers)
    return Unit(" + ".join(unit.name for unit in units), units[0].start, units[-1].stop, layers)


def reach(unit: Unit, parts: Sequence[Unit], overlap: int) -> Unit:
    """Return ``unit`` joined with the ``overlap`` ones of ``parts`` behind it, or as many as there are."""
    return joined([unit, *[part for part in parts if part.start >= unit.stop][:overlap]])


@dataclass(frozen=True)
class Boundary:
    """The tensors alive at the two ends of a stretch, by node name."""

    inputs: tuple[str, ...]
    """Made before the stretch and read in it."""
    outputs: tuple[str, ...]
    """Made in the stretch and read after it (or by the network's output)."""


def compute_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes that depend on the network's input, in topological order: what units are stretches of."""
    dependent: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op in {"call_function", "call_module"} and any(
            n.op == "placeholder" or n in dependent for n in node.all_input_nodes
        ):
            dependent[node] = None
    return list(dependent)


def boundary(nodes: list[fx.Node], start: int, stop: int) -> Boundary:
    """Return the interface of the stretch ``[start, stop)`` of ``nodes``."""
    inside = nodes[start:stop]
    members = set(inside)
    known = set(nodes)
    inputs: dict[str, None] = {}
    for node in inside:
        for source in node.all_input_nodes:
            if source not in members and (source in known or source.op == "placeholder"):
                inputs[source.name] = None
    outputs = [n.name for n in inside if any(user not in members for user in n.users)]
    return Boundary(tuple(inputs), tuple(outputs))


def extract(gm: fx.GraphModule, nodes: list[fx.Node], start: int, stop: int) -> fx.GraphModule:
    """Return the stretch ``[start, stop)`` as a module from its boundary's inputs to its outputs.

    Tensors and fake-quantizers are shared with ``gm``, not copied; only the stretch's own are held.
    """
    ends = boundary(nodes, start, stop)
    graph = fx.Graph()
    mapped: dict[str, fx.Node] = {name: graph.placeholder(name) for name in ends.inputs}

    def copy(node: fx.Node) -> fx.Node:
        if node.name not in mapped:
            # Constants and weight quantizers are made in front of their first reader.
            for source in node.all_input_nodes:
                copy(source)
            mapped[node.name] = graph.node_copy(node, lambda n: mapped[n.name])
        return mapped[node.name]

    for node in nodes[start:stop]:
        copy(node)
    graph.output(tuple(mapped[name] for name in ends.outputs))
    return fx.GraphModule(gm, graph)


def weight_op_positions(nodes: list[fx.Node]) -> list[int]:
    return [i for i, n in enumerate(nodes) if is_weight_op(n)]


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
