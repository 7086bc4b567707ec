"""Partition: cut the graph into reconstruction units, a layer or a block each, for any captured network.

**Blocks.** A *cut* is a place in topological order where exactly one tensor is alive, and a *piece* is what lies
between two cuts: a residual block comes out as a piece by itself. Pieces are joined when they come from the same *block
module*: the innermost module, of a class that occurs more than once, with two or more weight layers, that begins and
ends at cuts wherever it occurs (squeeze-and-excitation does not, where its block has a skip connection). What belongs
to no block module is *loose*: short loose runs (a stem, a head) are one unit, longer ones a unit a layer. A loose run
in front of a first block without a skip connection belongs to that block, as in MobileNetV2, where nothing separates
the two. A class whose instances are too large (a whole dense stage) gives way to the repeated modules in it, whose
boundaries may then carry several tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import fx

from quiesce.graph.ops import is_weight_op
from quiesce.graph.place import module_stack, weight_layers
from quiesce.graph.unit import Unit, compute_nodes, weight_op_positions

CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
LOOSE_LAYERS = 3
"""Most weight layers of a loose run that stays one unit."""
LARGE_BLOCK = 10
"""A block module with more weight layers than this gives way to repeated modules inside it."""


def partition(gm: fx.GraphModule, granularity: str) -> list[Unit]:
    """Return the network's units in order; every weight operator is in exactly one, and every node too.

    Args:
        granularity: ``"layer"`` (one weight layer each, with what follows it) or ``"block"``.
    """
    nodes = compute_nodes(gm)
    names = {node: name for name, node in weight_layers(gm).items()}
    keys = _block_keys(nodes)
    blocks = _block_spans(nodes, keys)
    spans = blocks if granularity == "block" else [span for block in blocks for span in _split_layers(nodes, *block)]
    return _named_units(nodes, spans, names, set(keys))


def _split_layers(nodes: list[fx.Node], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """One stretch a weight layer: what follows a layer belongs to it, what stands in front of the first one too."""
    layers = [i for i in range(start, stop) if is_weight_op(nodes[i])]
    edges = [start, *layers[1:], stop]
    yield from pairwise(edges)


def _block_spans(nodes: list[fx.Node], keys: list[str]) -> list[tuple[int, int]]:
    cuts = _cuts(nodes)
    spans: list[tuple[int, int]] = []
    for (_, key), group in groupby(enumerate(keys), key=lambda item: (item[1] == "", item[1])):
        run = [i for i, _ in group]
        start, stop = run[0], run[-1] + 1
        spans += [(start, stop)] if key else _loose_spans(nodes, cuts, start, stop)
    return _join_stem(nodes, _attach_weightless(nodes, spans), keys)


def _cuts(nodes: list[fx.Node]) -> set[int]:
    """Positions p such that one tensor is alive between node p − 1 and node p; the two ends are cuts."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use: dict[fx.Node, int] = {}
    first: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for source in node.all_input_nodes:
            if source in position or source.op == "placeholder":
                last_use[source] = i
                first.setdefault(source, -1 if source.op == "placeholder" else position[source])
        if any(user.op == "output" for user in node.users):
            first.setdefault(node, i)
            last_use[node] = len(nodes)
    changes = [0] * (len(nodes) + 2)
    for tensor, made in first.items():
        changes[made + 1] += 1
        changes[last_use[tensor] + 1] -= 1
    cuts, alive = {0, len(nodes)}, 0
    for p in range(len(nodes)):
        alive += changes[p]
        if alive == 1:
            cuts.add(p)
    return cuts


@dataclass(frozen=True)
class _BlockModules:
    """Repeated modules with at least two weight layers, by path: the stretch each covers."""

    spans: dict[str, tuple[int, int]]
    layers: dict[str, int]
    at_cuts: frozenset[str]

    @classmethod
    def find(cls, nodes: list[fx.Node], cuts: set[int]) -> _BlockModules:
        kinds: dict[str, str] = {}
        spans: dict[str, tuple[int, int]] = {}
        layers: Counter[str] = Counter()
        members: Counter[str] = Counter()
        for i, node in enumerate(nodes):
            for path, kind in module_stack(node):
                kinds[path] = kind
                spans[path] = (spans.get(path, (i, i))[0], i + 1)
                members[path] += 1
                layers[path] += is_weight_op(node)
        # A module called in two places, or whose nodes are interleaved with others', is no stretch.
        whole = [p for p, (start, stop) in spans.items() if members[p] == stop - start]
        named = [p for p in whole if layers[p] >= 2 and kinds[p].rsplit(".", 1)[-1] not in CONTAINERS]
        repeated = Counter(kinds[p] for p in named)
        found = {p: spans[p] for p in named if repeated[kinds[p]] >= 2}
        open_kinds = {kinds[p] for p, (start, stop) in found.items() if start not in cuts or stop not in cuts}
        at_cuts = frozenset(p for p in found if kinds[p] not in open_kinds)
        return cls(found, dict(layers), at_cuts)

    def innermost(self, node: fx.Node) -> str:
        """The block module a node belongs to, or ``""``."""
        inside = [p for p, _ in module_stack(node) if p in self.spans]
        closed = [p for p in inside if p in self.at_cuts]
        if closed and self.layers[closed[-1]] <= LARGE_BLOCK:
            return closed[-1]
        open_inside = [p for p in inside if p not in self.at_cuts and len(p) > len(closed[-1] if closed else "")]
        if open_inside:
            return open_inside[0]
        return closed[-1] if closed else ""


def _block_keys(nodes: list[fx.Node]) -> list[str]:
    """The block module of each node; a piece between two cuts has one, that of its weight layers if they agree."""
    cuts = _cuts(nodes)
    blocks = _BlockModules.find(nodes, cuts)
    keys = [blocks.innermost(node) for node in nodes]
    edges = sorted(cuts)
    for start, stop in pairwise(edges):
        own = {keys[i] for i in range(start, stop)}
        of_layers = {keys[i] for i in range(start, stop) if is_weight_op(nodes[i])}
        if len(own) > 1 and len(of_layers) == 1:
            keys[start:stop] = list(of_layers) * (stop - start)
    return keys


def _loose_spans(nodes: list[fx.Node], cuts: set[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Spans of a run that belongs to no block module: one if it is short, else a layer or a branching piece each."""
    edges = sorted({start, stop} | {c for c in cuts if start < c < stop})
    spans: list[tuple[int, int]] = []
    chain: list[tuple[int, int]] = []
    for piece in pairwise(edges):
        if _layers_in(nodes, *piece) > 1:
            spans += [*_chain_spans(nodes, chain), piece]
            chain = []
        else:
            chain.append(piece)
    return spans + _chain_spans(nodes, chain)


def _chain_spans(nodes: list[fx.Node], chain: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if not chain:
        return []
    start, stop = chain[0][0], chain[-1][1]
    if _layers_in(nodes, start, stop) <= LOOSE_LAYERS:
        return [(start, stop)]
    return list(_split_layers(nodes, start, stop))


def _attach_weightless(nodes: list[fx.Node], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give stretches without a weight layer to the stretch before them, or to the one behind at the very front."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and (_layers_in(nodes, start, stop) == 0 or _layers_in(nodes, *joined[-1]) == 0):
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _join_stem(nodes: list[fx.Node], spans: list[tuple[int, int]], keys: list[str]) -> list[tuple[int, int]]:
    """Join a loose stem of one layer to the first block when that block has no skip connection."""
    if len(spans) < 3:
        return spans
    (start, middle), (_, stop) = spans[0], spans[1]
    stem_is_loose = keys[weight_op_positions(nodes)[0]] == ""
    block_is_chain = bool(keys[middle]) and _is_chain(nodes, middle, stop)
    if stem_is_loose and block_is_chain and _layers_in(nodes, start, middle) == 1:
        return [(start, stop), *spans[2:]]
    return spans


def _is_chain(nodes: list[fx.Node], start: int, stop: int) -> bool:
    """True when every node of the stretch reads one tensor that depends on the input, and nothing is read twice."""
    inside = set(nodes[start:stop])
    members = set(nodes)
    return all(len([n for n in node.all_input_nodes if n in members]) == 1 for node in inside) and all(
        len([u for u in node.users if u in inside]) <= 1 for node in inside
    )


def _layers_in(nodes: list[fx.Node], start: int, stop: int) -> int:
    return sum(is_weight_op(n) for n in nodes[start:stop])


def _named_units(
    nodes: list[fx.Node], spans: list[tuple[int, int]], names: dict[fx.Node, str], blocks: set[str]
) -> list[Unit]:
    every = list(names.values())
    units = []
    for start, stop in spans:
        own = tuple(names[n] for n in nodes[start:stop] if n in names)
        units.append(Unit(_unit_name(own, every, blocks), start, stop, own))
    return units


def _unit_name(own: tuple[str, ...], every: list[str], blocks: set[str]) -> str:
    """The block modules, else the largest modules, that hold these layers and no others, joined by ``+``."""
    others = set(every) - set(own)

    def grow(layer: str) -> str:
        parts = layer.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts))]
        exclusive = [p for p in prefixes if not any(o == p or o.startswith(p + ".") for o in others)]
        inner = [p for p in exclusive if p in blocks]
        return inner[0] if inner else (exclusive[0] if exclusive else layer)

    return "+".join(dict.fromkeys(grow(layer) for layer in own))
