"""The two activation streams: what the float network and the quantized one carry at a boundary, for all images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quiesce.graph.rewrite import device_of
from quiesce.graph.unit import boundary, compute_nodes, extract
from quiesce.memory import Memory, Rows
from quiesce.oscillation.measure import squares
from quiesce.quant.fake_quantize import WeightFakeQuantize, float_mode

Tensors = Mapping[str, Rows]
"""Tensors [images, ...] by node name, wherever they are."""


class Network:
    """The captured network as a sequence of stretches that can be run one after another."""

    def __init__(self, gm: fx.GraphModule, memory: Memory | None = None) -> None:
        """What runs give is kept where ``memory`` has room; None: on the network's device."""
        self.gm = gm
        self.memory = memory or Memory(device_of(gm) or torch.device("cpu"))
        self.nodes = compute_nodes(gm)
        self.inputs = tuple(n.name for n in gm.graph.nodes if n.op == "placeholder")
        output = next(n for n in gm.graph.nodes if n.op == "output")
        self.outputs = tuple(n.name for n in output.args[0])
        self.executions = 0
        """Nodes run so far, a batch counted once: shows that cost grows linearly with depth."""
        self._last_use = self._find_last_use()

    def _find_last_use(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            for source in node.all_input_nodes:
                last[source.name] = i
        return last | dict.fromkeys(self.outputs, len(self.nodes))

    @property
    def end(self) -> int:
        return len(self.nodes)

    def learns(self, start: int, stop: int, step_sizes: bool) -> bool:
        """True when the stretch ``[start, stop)`` has a rounding to learn, or an activation's step size if these are.

        A stretch whose weights are left float, and whose inputs nothing quantizes, has neither.
        """
        inside = self.nodes[start:stop]
        read = [n for node in inside for n in node.all_input_nodes if n.op == "call_module"]
        weights = any(isinstance(getattr(self.gm, str(n.target)), WeightFakeQuantize) for n in read)
        return weights or (step_sizes and any(n.op == "call_module" for n in inside))

    @torch.no_grad()
    def run(self, start: int, stop: int, tensors: Tensors, batch: int, *, quantized: bool) -> Tensors:
        """Run the stretch ``[start, stop)`` on ``tensors`` in batches; return what is alive behind it."""
        module = extract(self.gm, self.nodes, start, stop)
        ends = boundary(self.nodes, start, stop)
        images = len(next(iter(tensors.values())))
        made: dict[str, Rows] = {}
        for first in range(0, images, batch):
            self.executions += stop - start
            inputs = [tensors[name][first : first + batch] for name in ends.inputs]
            for name, values in zip(ends.outputs, _forward(module, inputs, quantized), strict=True):
                if name not in made:
                    made[name] = self.memory.room(values, images * len(values) // min(batch, images))
                at = first * len(made[name]) // images  # of a clip as a whole there are fewer rows than images
                made[name][at : at + len(values)] = values
        alive = {name: t for name, t in tensors.items() if self._last_use.get(name, -1) >= stop}
        return alive | made

    def output_error(self, outputs: Tensors, reference: Tensors) -> float:
        """Return E‖ŷ − y‖² / E‖y‖² of the network's ``outputs`` against ``reference`` (E‖ŷ − y‖² where y is all zeros).

        It is the inverse of the outputs' signal-to-noise ratio.
        """
        sums = [squares(outputs[name], reference[name]) for name in self.outputs]
        noise, energy = sum(n for n, _ in sums), sum(e for _, e in sums)
        return noise / energy if energy > 0 else noise


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
