"""The two activation streams: what the float network and the quantized one carry at a boundary, for all images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from quiesce.graph.rewrite import device_of
from quiesce.graph.unit import boundary, compute_nodes, extract
from quiesce.memory import Memory, Rows, halved, is_out_of_memory
from quiesce.oscillation.measure import squares
from quiesce.processes import ALONE, Processes
from quiesce.quant.fake_quantize import WeightFakeQuantize, float_mode
from quiesce.transfer import MOST_WAITING, Ahead, Behind, far

Tensors = Mapping[str, Rows]
"""Tensors [images, ...] by node name, wherever they are."""


TEMPORARIES = 8
"""Tensors as large as its result that are counted for a node while it runs: a fake-quantizer takes four, and allocators
keep as much of what was freed before."""


OVERHEAD = 32 * 10**6
"""Bytes that any work takes: workspaces, and what allocators keep."""


class Network:
    """The captured network as a sequence of stretches that can be run one after another."""

    def __init__(
        self,
        gm: fx.GraphModule,
        memory: Memory | None = None,
        together: int = 1,
        processes: Processes = ALONE,
    ) -> None:
        """What runs give is kept where ``memory`` has room; None: on the network's device.

        Batches are multiples of ``together`` images. ``processes`` have the other images.
        """
        self.gm = gm
        self.memory = memory or Memory(device_of(gm) or torch.device("cpu"))
        self.together = together
        self.processes = processes
        self.nodes = compute_nodes(gm)
        self.inputs = tuple(n.name for n in gm.graph.nodes if n.op == "placeholder")
        output = next(n for n in gm.graph.nodes if n.op == "output")
        self.outputs = tuple(n.name for n in output.args[0])
        self.executions = 0
        """Nodes run so far, a batch counted once: shows that cost grows linearly with depth."""
        self._last_use = self._find_last_use()
        placed = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self._values = {n.name: n.meta.get("val") for n in (*placed, *self.nodes)}
        self._captured_images = _hint(self._values[placed[0].name].shape[0])

    def _find_last_use(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                last[source.name] = i
        return last | dict.fromkeys(self.outputs, len(self.nodes))

    def last_use(self, name: str) -> int:
        """Return the position of the last node that reads ``name``, -1 if none does, the end for an output."""
        return self._last_use.get(name, -1)

    def dtype(self, name: str) -> torch.dtype:
        value: Tensor = self._values[name]
        return value.dtype

    def row_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes for one image of the tensors that these nodes make."""
        return sum(
            math.prod(map(_hint, t.shape)) * t.dtype.itemsize // self._captured_images
            for name in names
            for t in pytree.tree_leaves(self._values[name])
            if isinstance(t, Tensor)
        )

    def images_at_a_time(self, batch: int, start: int = 0, stop: int | None = None) -> int:
        """Return ``batch``, or so many images fewer that memory suffices to run ``[start, stop)`` on them."""
        each = self.forward_bytes(start, self.end if stop is None else stop)
        return self.memory.at_a_time(batch, each, OVERHEAD, self.together)

    def forward_bytes(self, start: int, stop: int) -> int:
        """Return the bytes for one image that a forward pass of ``[start, stop)`` takes at most at a time."""
        alive = {name: self.row_bytes([name]) for name in boundary(self.nodes, start, stop).inputs}
        most = 0
        for position in range(start, stop):
            made = self.row_bytes([self.nodes[position].name])
            most = max(most, sum(alive.values()) + TEMPORARIES * made)
            alive[self.nodes[position].name] = made
            alive = {n: size for n, size in alive.items() if self.last_use(n) > position}
        if self.memory.device.type == "cuda":  # read ahead, and waiting to be written
            ends = boundary(self.nodes, start, stop)
            most += self.row_bytes(ends.inputs) + MOST_WAITING * self.row_bytes(ends.outputs)
        return most

    @property
    def end(self) -> int:
        return len(self.nodes)

    def learns(self, start: int, stop: int, step_sizes: bool) -> bool:
        """True when the stretch ``[start, stop)`` has a rounding to learn, or an activation's step size if these are.

        A stretch whose weights are left float, and whose inputs nothing quantizes, has neither.
        """
        own = any(n.op == "call_module" for n in self.nodes[start:stop])
        return bool(self.weight_quantizers(start, stop)) or (step_sizes and own)

    def weight_quantizers(self, start: int, stop: int) -> set[WeightFakeQuantize]:
        """Return those of the weights that the stretch ``[start, stop)`` reads."""
        read = [n for node in self.nodes[start:stop] for n in node.all_input_nodes if n.op == "call_module"]
        return {q for n in read if isinstance(q := getattr(self.gm, str(n.target)), WeightFakeQuantize)}

    def module(self, start: int, stop: int) -> fx.GraphModule:
        """Return the stretch ``[start, stop)`` as a module (:func:`~quiesce.graph.unit.extract`)."""
        return extract(self.gm, self.nodes, start, stop)

    @torch.no_grad()
    def run(self, start: int, stop: int, tensors: Tensors, batch: int, *, quantized: bool) -> Tensors:
        """Run the stretch ``[start, stop)`` on ``tensors`` in batches; return what is alive behind it."""
        module = self.module(start, stop)
        ends = boundary(self.nodes, start, stop)
        images = len(next(iter(tensors.values())))
        made: dict[str, Rows] = {}
        first = 0
        batch = self.images_at_a_time(batch, start, stop)
        device, fed = self.memory.device, [tensors[name] for name in ends.inputs]

        def read(part: slice) -> list[Tensor]:
            return [rows[part] for rows in fed]

        beside = device.type == "cuda" and far(fed)
        with Ahead(read, lambda inputs: inputs, device, threaded=beside) as ahead, Behind(device) as behind:
            while first < images:
                part, following = slice(first, first + batch), slice(first + batch, first + 2 * batch)
                next_one = (following.start, batch), following
                inputs = ahead.of((first, batch), part, next_one if following.start < images else None)
                try:
                    outputs = _forward(module, inputs, quantized)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or batch <= self.together:
                        raise
                    batch = halved(batch, self.together)
                    continue
                for name, values in zip(ends.outputs, outputs, strict=True):
                    if name not in made:
                        made[name] = self.memory.room(values, images * len(values) // min(batch, images))
                    at = first * len(made[name]) // images  # of a clip as a whole there are fewer rows than images
                    behind.write(made[name], slice(at, at + len(values)), values)
                self.executions += stop - start
                first += batch
        alive = {name: t for name, t in tensors.items() if self.last_use(name) >= stop}
        return alive | made

    def output_error(self, outputs: Tensors, reference: Tensors) -> float:
        """Return E‖ŷ − y‖² / E‖y‖² of the network's ``outputs`` against ``reference`` (E‖ŷ − y‖² where y is all zeros).

        It is the inverse of the outputs' signal-to-noise ratio, over the images of all processes.
        """
        sums = [squares(outputs[name], reference[name], self.processes) for name in self.outputs]
        noise, energy = sum(n for n, _, _ in sums), sum(e for _, e, _ in sums)
        return noise / energy if energy > 0 else noise


def _hint(size: int | torch.SymInt) -> int:
    """The size that a dimension had when the network was captured; 1 for one that depends on values."""
    hint = size if isinstance(size, int) else size.node.hint
    return 1 if hint is None else int(hint)


def _forward(module: fx.GraphModule, inputs: list[Tensor], quantized: bool) -> tuple[Tensor, ...]:
    if quantized:
        outputs: tuple[Tensor, ...] = module(*inputs)
        return outputs
    with float_mode(module):
        outputs = module(*inputs)
        return outputs


@dataclass
class Streams:
    """Both streams at one position of the network."""

    position: int
    float: Tensors
    quantized: Tensors
    _ahead: Streams | None = None
    """The float stream further on, if it was asked for (its quantized one is empty)."""

    @classmethod
    def at_input(cls, tensors: Tensors) -> Streams:
        return cls(0, dict(tensors), dict(tensors))

    def targets(self, network: Network, stop: int, batch: int) -> Tensors:
        """Return the float stream behind the stretch from here to ``stop``; :meth:`advance` will not run it again."""
        if self._ahead is None or self._ahead.position != stop:
            self._ahead = None  # freed first
            self._ahead = Streams(stop, network.run(self.position, stop, self.float, batch, quantized=False), {})
        return self._ahead.float

    def advance(self, network: Network, stop: int, batch: int) -> Streams:
        """Return the streams at ``stop``: the quantized one with the rounding and step sizes as they are now."""
        quantized = network.run(self.position, stop, self.quantized, batch, quantized=True)
        ahead = self._ahead if self._ahead is not None and self._ahead.position >= stop else None
        if ahead is not None and ahead.position == stop:
            return Streams(stop, ahead.float, quantized)
        return Streams(stop, network.run(self.position, stop, self.float, batch, quantized=False), quantized, ahead)
