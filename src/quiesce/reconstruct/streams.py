"""The two activation streams: what the float network and the quantized one carry at a boundary, for all images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quiesce.graph.unit import boundary, compute_nodes, extract
from quiesce.quant.fake_quantize import WeightFakeQuantize, float_mode

Tensors = dict[str, Tensor]
"""Tensors [images, ...] by node name."""


class Network:
    """The captured network as a sequence of stretches that can be run one after another."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
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
        images = next(iter(tensors.values())).shape[0]
        made: dict[str, list[Tensor]] = {name: [] for name in ends.outputs}
        for first in range(0, images, batch):
            self.executions += stop - start
            inputs = [tensors[name][first : first + batch] for name in ends.inputs]
            for name, value in zip(ends.outputs, _forward(module, inputs, quantized), strict=True):
                made[name].append(value)
        alive = {name: t for name, t in tensors.items() if self._last_use.get(name, -1) >= stop}
        return alive | {name: torch.cat(parts) for name, parts in made.items()}

    def output_error(self, outputs: Tensors, reference: Tensors) -> float:
        """Return E‖ŷ − y‖² / E‖y‖² of the network's ``outputs`` against ``reference`` (E‖ŷ − y‖² where y is all zeros).

        It is the inverse of the outputs' signal-to-noise ratio.
        """
        noise = energy = 0.0
        for name in self.outputs:
            target = reference[name].to(torch.float64)
            noise += (outputs[name].to(torch.float64) - target).square().sum().item()
            energy += target.square().sum().item()
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

    @classmethod
    def at_input(cls, tensors: Tensors) -> Streams:
        return cls(0, dict(tensors), dict(tensors))

    def targets(self, network: Network, stop: int, batch: int) -> Tensors:
        """Return the float stream behind the stretch from here to ``stop``."""
        return network.run(self.position, stop, self.float, batch, quantized=False)

    def advance(self, network: Network, stop: int, batch: int) -> Streams:
        """Return the streams at ``stop``: the quantized one with the rounding and step sizes as they are now."""
        quantized = network.run(self.position, stop, self.quantized, batch, quantized=True)
        return Streams(stop, self.targets(network, stop, batch), quantized)
