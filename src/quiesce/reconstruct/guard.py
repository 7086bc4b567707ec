"""The guard: a merge stays only if held-out images say that the whole network gained by it.

A lower local loss does not imply a better network: the unit may have fitted the calibration images. So a merged unit
and its unmerged counterpart are compared at the network's output, on images nobody optimized on, with everything behind
the unit still float.
"""

from __future__ import annotations

from dataclasses import dataclass

from quiesce.memory import behind
from quiesce.reconstruct.streams import Network, Streams, Tensors


@dataclass(frozen=True)
class Trial:
    """One merge that was tried, with the held-out output errors of both sides."""

    modules: list[str]
    merged_error: float
    unmerged_error: float

    @property
    def accepted(self) -> bool:
        return self.merged_error < self.unmerged_error


class Guard:
    """Measures held-out output errors E‖ŷ − y‖² / E‖y‖² against the float network.

    ``network`` is its own view of the graph, so that its forward passes are counted apart.
    """

    def __init__(self, network: Network, inputs: Tensors, first: int, batch: int) -> None:
        """``inputs`` are all calibration images; those from index ``first`` on are held out."""
        self.network = network
        self.first = first
        self.batch = batch
        self.images = network.processes.place(len(next(iter(inputs.values()))) - first)[1]
        """All that are held out, those of other processes included."""
        self._inputs = self._held_out(inputs)
        self._float = network.run(0, network.end, self._inputs, batch, quantized=False)

    def error_behind(self, streams: Streams, stop: int) -> float:
        """Error when the network is quantized as it is now from ``streams`` to ``stop``, and float behind that."""
        held = self._held_out(streams.quantized)
        there = self.network.run(streams.position, stop, held, self.batch, quantized=True)
        return self._error(self.network.run(stop, self.network.end, there, self.batch, quantized=False))

    def error_of_network(self) -> float:
        """Error of the whole network, quantized as it is now."""
        return self._error(self.network.run(0, self.network.end, self._inputs, self.batch, quantized=True))

    def _held_out(self, tensors: Tensors) -> Tensors:
        return {name: behind(rows, self.first) for name, rows in tensors.items()}

    def _error(self, outputs: Tensors) -> float:
        return self.network.output_error(outputs, self._float)
