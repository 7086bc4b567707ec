"""What computing takes in memory, and where streams would go, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quiesce.graph.unit import Unit, boundary
from quiesce.memory import Memory
from quiesce.recipe import Recipe
from quiesce.reconstruct.streams import OVERHEAD, Network

STEP = 4.0
"""A step's memory for an image, in the bytes of all that the unit's nodes make of it (upper bound of measurements on
ResNet-18 and MobileNetV2: docs/performance.md)."""
LEARNED = 24
"""Bytes of a step for each byte of a weight: V, its gradient and moments, the soft weight, and what the regularizer
keeps (likewise)."""


@dataclass(frozen=True)
class Needs:
    """Bytes that work on a unit takes, beside the streams."""

    fixed: int
    step: int
    """For each image of a step."""
    forward: int
    """For each image of a forward pass."""

    @classmethod
    def of(cls, network: Network, unit: Unit, sizes: Sizes) -> Needs:
        inside = network.nodes[unit.start : unit.stop]
        ends = boundary(network.nodes, unit.start, unit.stop)
        quantizers = network.weight_quantizers(unit.start, unit.stop)
        weights = sum(q.quantized.numel() * q.scale.dtype.itemsize for q in quantizers)
        fed = 2 * network.row_bytes(ends.inputs) + network.row_bytes(ends.outputs)  # the next step's batch
        held = sizes.resident * fed
        if network.memory.device.type == "cuda":
            fed *= 2  # and the one that a captured step reads, into which it is copied
        step = STEP * network.row_bytes(n.name for n in inside) + fed
        return cls(OVERHEAD + LEARNED * weights + held, int(step), network.forward_bytes(unit.start, unit.stop))

    def bytes(self, step: int, forward: int) -> int:
        """Return what steps of ``step`` images and passes of ``forward`` images take."""
        return self.fixed + max(step * self.step, forward * self.forward)


@dataclass(frozen=True)
class Sizes:
    """How many images are worked on at a time, if memory suffices, and the fewest that can be."""

    step: int
    """Images of a step."""
    forward: int
    """Images of a forward pass."""
    together: int = 1
    resident: int = 0
    """Images that steps draw from at a time, where these are not all."""

    @classmethod
    def of(cls, recipe: Recipe, together: int) -> Sizes:
        learning = recipe.reconstruction
        if learning is None:
            return cls(0, recipe.calibration_batch, together)
        return cls(learning.batch_size, recipe.calibration_batch, together, learning.resident_images or 0)


def reserve(network: Network, units: Iterable[Unit], sizes: Sizes) -> None:
    """Keep as much memory free as the work on any of ``units`` takes, fewer images at a time where it must be.

    Raises:
        MemoryLimitError: a stated budget does not suffice for the fewest images.
    """
    memory, needs = network.memory, [Needs.of(network, unit, sizes) for unit in units]
    wanted = [n.bytes(step_images(memory, n, sizes), forward_images(memory, n, sizes)) for n in needs]
    memory.reserve(max(wanted), max(n.bytes(sizes.together, sizes.together) for n in needs))


def step_images(memory: Memory, needs: Needs, sizes: Sizes) -> int:
    """Return how many images of a step are worked on at a time."""
    return memory.at_a_time(sizes.step, needs.step, needs.fixed, sizes.together)


def forward_images(memory: Memory, needs: Needs, sizes: Sizes) -> int:
    return memory.at_a_time(sizes.forward, needs.forward, needs.fixed, sizes.together)


@dataclass(frozen=True)
class PlannedUnit:
    """What one unit of a walk takes."""

    unit: str
    working: int
    """Bytes that its steps and forward passes take."""
    step_images: int
    """Images that a step works on at a time."""
    streams: dict[str, int]
    """Bytes of streams in each place while it is worked on, ``device``, ``host``, ``file``."""

    @property
    def device(self) -> int:
        """Bytes on the device in all, without the network and what is held through the whole run."""
        return self.working + self.streams["device"]


def plan(network: Network, units: Sequence[Unit], images: int, sizes: Sizes) -> list[PlannedUnit]:
    """Return where the streams of a walk over ``units`` would be, and what it would take: nothing is run or made.

    Places are found as in a run: in the order in which streams are made, each in the first place that has room.
    """
    reserve(network, units, sizes)
    memory, planned = network.memory, []
    alive: list[dict[str, tuple[str, int]]] = [{}, {}]
    """Place and bytes of each tensor, float and quantized; the network's inputs are nobody's."""
    for unit in units:
        made = boundary(network.nodes, unit.start, unit.stop).outputs
        behind = [dict(stream) for stream in alive]
        for stream in behind:  # the targets, which are the next float stream; then the quantized stream
            stream |= {name: _placed(network, name, images) for name in made}
        streams = dict(memory.held)
        need = Needs.of(network, unit, sizes)
        step, forward = step_images(memory, need, sizes), forward_images(memory, need, sizes)
        planned.append(PlannedUnit(unit.name, need.bytes(step, forward), step, streams))
        for stream in behind:
            for name in [n for n in stream if network.last_use(n) < unit.stop]:
                place, size = stream.pop(name)
                memory.hold(place, -size)
        alive = behind
    return planned


def _placed(network: Network, name: str, images: int) -> tuple[str, int]:
    memory, dtype = network.memory, network.dtype(name)
    size = images * network.row_bytes([name]) // dtype.itemsize * memory.kept_as(dtype).itemsize
    place = memory.place(size)
    memory.hold(place, size)
    return place, size
