"""Partition: cut the graph into reconstruction units, a layer or a block each, for any captured network.

**Blocks.** A *cut* is a place in topological order where exactly one tensor is alive, and a *piece* is what lies
between two cuts: a residual block comes out as a piece by itself. Pieces are joined when they come from the same *block
module*: the innermost module, of a class that occurs more than once, with two or more weight layers, that begins and
ends at cuts wherever it occurs (squeeze-and-excitation does not, where its block has a skip connection). What belongs
to no block module is *loose*: short loose runs (a stem, a head) are one unit, longer ones a unit a layer. A loose run
in front of a first block without a skip connection belongs to that block, as in MobileNetV2, where nothing separates
the two. A class whose instances are too large (a whole dense stage) gives way to the repeated modules in it, whose
boundaries may then carry several tensors.

**Boundaries** are crossed by batches of images, so every tensor alive there has its images first. Where a layer's or a
block's own boundary is crossed by something else (a size, a sequence-first tensor inside attention), the nearest place
between the same two layers is taken; without one the two are one unit. Layers that share a weight are in one unit, as
it is learned once.

A large run without cuts, such as a feature pyramid with the heads behind it, is split into its modules. So is a block
that holds more than a quarter of the network's layers, such as a whole stage with several branches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor, fx

from quiesce.graph.ops import is_weight_op, weight_node
from quiesce.graph.place import module_stack, weight_layers
from quiesce.graph.unit import Unit, compute_nodes, weight_op_positions

CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")
LOOSE_LAYERS = 3
"""Most weight layers of a loose run that stays one unit."""
LARGE_BLOCK = 10
"""A block module with more weight layers than this gives way to repeated modules inside it, and a run of no block
module, with more than this and no cut in it, to the modules inside it."""

LARGEST_SHARE, ALWAYS_SMALL = 0.25, 8
"""A block holds at most this share of the network's weight layers, or this many if that is more."""


def partition(gm: fx.GraphModule, granularity: str) -> list[Unit]:
    """Return the network's units in order; every weight operator is in exactly one, and every node too.

    Args:
        granularity: ``"layer"`` (one weight layer each, with what follows it, but for layers with no boundary between
            them) or ``"block"``.
    """
    nodes = compute_nodes(gm)
    names = {node: name for name, node in weight_layers(gm).items()}
    places = _Places.of(nodes)
    keys = _block_keys(nodes, places)
    blocks = list(_without_large(nodes, _block_spans(nodes, places, keys)))
    spans = blocks if granularity == "block" else [span for block in blocks for span in _split_layers(nodes, *block)]
    spans = _without_torn_weights(nodes, _at_usable_places(nodes, places, spans))
    return _named_units(nodes, spans, names, set(keys))


def _split_layers(nodes: list[fx.Node], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """One stretch a weight layer: what follows a layer belongs to it, what stands in front of the first one too."""
    layers = [i for i in range(start, stop) if is_weight_op(nodes[i])]
    edges = [start, *layers[1:], stop]
    yield from pairwise(edges)


def _block_spans(nodes: list[fx.Node], places: _Places, keys: list[str]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for (_, key), group in groupby(enumerate(keys), key=lambda item: (item[1] == "", item[1])):
        run = [i for i, _ in group]
        start, stop = run[0], run[-1] + 1
        spans += [(start, stop)] if key else _loose_spans(nodes, places.cuts, start, stop)
    return _join_stem(nodes, places.cuts, _attach_weightless(nodes, places, spans, keys), keys)


@dataclass(frozen=True)
class _Places:
    """What is alive at each place p, between node p − 1 and node p."""

    alive: list[int]
    """How many tensors."""
    usable: list[bool]
    """Whether all of them are tensors with images first."""

    @classmethod
    def of(cls, nodes: list[fx.Node]) -> _Places:
        alive, others = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
        sources = dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s.op == "placeholder")
        batch = {str(s.meta["val"].shape[0]) for s in sources}
        for tensor, (made, last) in _lifetimes(nodes).items():
            for p in range(made + 1, last + 1):
                alive[p] += 1
                others[p] += not _images_first(tensor, batch)
        return cls(alive, [number == 0 for number in others])

    @property
    def cuts(self) -> set[int]:
        """Places with exactly one tensor; the two ends are cuts."""
        return {p for p, number in enumerate(self.alive) if number == 1} | {0, len(self.alive) - 1}


def _lifetimes(nodes: list[fx.Node]) -> dict[fx.Node, tuple[int, int]]:
    """Return for each tensor the position of the node that makes it (−1: an input) and of the last that reads it."""
    position = {node: i for i, node in enumerate(nodes)}
    lives: dict[fx.Node, tuple[int, int]] = {}
    for i, node in enumerate(nodes):
        for source in node.all_input_nodes:
            if source in position or source.op == "placeholder":
                lives[source] = (position.get(source, -1), i)
    for node in nodes:
        if any(user.op == "output" for user in node.users):
            lives[node] = (position[node], len(nodes))
    return lives


def _images_first(node: fx.Node, batch: set[str]) -> bool:
    value = node.meta["val"]
    # Complex numbers are no floats that outputs could be compared in.
    return isinstance(value, Tensor) and not value.is_complex() and value.ndim > 0 and str(value.shape[0]) in batch


def _at_usable_places(nodes: list[fx.Node], places: _Places, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Move boundaries to the nearest usable place between the same two layers; drop those that have none."""
    layers = weight_op_positions(nodes)
    edges = [0]
    for start, _ in spans[1:]:
        before, behind = max(i for i in layers if i < start), min(i for i in layers if i >= start)
        usable = [p for p in range(before + 1, behind + 1) if places.usable[p]]
        edges += sorted(usable, key=lambda p: abs(p - start))[:1]
    return list(pairwise([*edges, len(nodes)]))


def _without_torn_weights(nodes: list[fx.Node], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Drop boundaries between the first and the last layer that use a weight."""
    uses: dict[fx.Node, list[int]] = {}
    for i in weight_op_positions(nodes):
        uses.setdefault(weight_node(nodes[i]), []).append(i)
    edges = [start for start, _ in spans if not any(used[0] < start <= used[-1] for used in uses.values())]
    return list(pairwise([*edges, len(nodes)]))


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


def _block_keys(nodes: list[fx.Node], places: _Places) -> list[str]:
    """The block module of each node; a piece between two cuts has one, that of its weight layers if they agree."""
    blocks = _BlockModules.find(nodes, places.cuts)
    keys = [blocks.innermost(node) for node in nodes]
    for start, stop in pairwise(sorted(places.cuts)):
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
            spans += [*_chain_spans(nodes, chain), *_module_spans(nodes, *piece, LARGE_BLOCK)]
            chain = []
        else:
            chain.append(piece)
    return spans + _chain_spans(nodes, chain)


def _module_spans(nodes: list[fx.Node], start: int, stop: int, limit: int, depth: int = 0) -> list[tuple[int, int]]:
    """The stretch itself if it has at most ``limit`` layers, else those of the modules in it, from ``depth`` down."""
    if _layers_in(nodes, start, stop) <= limit:
        return [(start, stop)]
    paths = [[path for path, _ in module_stack(node)] for node in nodes[start:stop]]
    if all(len(path) <= depth for path in paths):
        return list(_split_layers(nodes, start, stop))
    spans = []
    for _, group in groupby(range(start, stop), key=lambda i: paths[i - start][depth : depth + 1]):
        run = list(group)
        spans += _module_spans(nodes, run[0], run[-1] + 1, limit, depth + 1)
    return spans


def _without_large(nodes: list[fx.Node], spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Split blocks that hold more than their share at modules inside them, into parts of about equal size."""
    limit = max(ALWAYS_SMALL, int(LARGEST_SHARE * _layers_in(nodes, 0, len(nodes))))
    for start, stop in spans:
        layers = _layers_in(nodes, start, stop)
        target = math.ceil(layers / math.ceil(layers / limit)) if layers else limit
        packed: list[tuple[int, int]] = []
        for part in _module_spans(nodes, start, stop, target):
            if packed and _layers_in(nodes, packed[-1][0], part[1]) <= target:
                packed[-1] = (packed[-1][0], part[1])
            else:
                packed.append(part)
        yield from packed


def _chain_spans(nodes: list[fx.Node], chain: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if not chain:
        return []
    start, stop = chain[0][0], chain[-1][1]
    if _layers_in(nodes, start, stop) <= LOOSE_LAYERS:
        return [(start, stop)]
    return list(_split_layers(nodes, start, stop))


def _attach_weightless(
    nodes: list[fx.Node], places: _Places, spans: list[tuple[int, int]], keys: list[str]
) -> list[tuple[int, int]]:
    """Share out what holds no weight layer and belongs to no block, between one span with layers and the next.

    The boundary is where fewest tensors are alive, the last such place: pooling behind a block is the block's, and a
    concatenation of features that live on is its reader's.
    """
    layers = [[i for i in range(*span) if is_weight_op(nodes[i])] for span in spans]
    weighted = [(span, inside[-1]) for span, inside in zip(spans, layers, strict=True) if inside]
    edges = []
    for ((_, stop), last), ((start, _), _) in pairwise(weighted):
        free = range(start, (stop if keys[last] else last + 1) - 1, -1)
        edges.append(min(free, key=places.alive.__getitem__))
    return list(pairwise([0, *edges, len(nodes)]))


def _join_stem(
    nodes: list[fx.Node], cuts: set[int], spans: list[tuple[int, int]], keys: list[str]
) -> list[tuple[int, int]]:
    """Join a loose stem of one layer to the first block when that block has no skip connection, in it or around it."""
    if len(spans) < 3:
        return spans
    (start, middle), (_, stop) = spans[0], spans[1]
    stem_is_loose = keys[weight_op_positions(nodes)[0]] == ""
    block_is_chain = bool(keys[middle]) and stop in cuts and _is_chain(nodes, middle, stop)
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

    # Further calls of a layer are named by the first.
    return "+".join(dict.fromkeys(grow(layer) for layer in own if layer.partition(":")[0] not in {*own} - {layer}))
