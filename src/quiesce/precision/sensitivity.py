"""Sensitivity: how much error quantizing one layer alone causes at the network's output, on held-out images.

The float network is walked once from front to back; each trial runs from its layer to the end. So a trial costs half a
forward pass in the mean, and what is held in memory is one boundary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from quiesce.errors import ModelError
from quiesce.graph.bias import input_quantizer
from quiesce.graph.calibrate import set_weight
from quiesce.graph.ops import WEIGHT_OPS, input_node, is_weight_op, weight_node
from quiesce.graph.place import weight_groups, weight_layers, weight_quantizer
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, float_mode
from quiesce.recipe import Recipe
from quiesce.reconstruct.streams import Network, Tensors


@dataclass(frozen=True)
class LayerSensitivity:
    """Errors E‖ŷ − y‖² / E‖y‖² of the network's outputs when this layer alone is quantized, to nearest."""

    layer: str
    shared_with: tuple[str, ...]
    """Further layers that have the same weight, and are quantized with this one."""
    weights: int
    """Values of its weight."""
    macs: int
    """Multiplications for one image, and as many additions."""
    weight_bits: int
    """By the recipe."""
    input_bits: int | None
    """By the recipe, the most of those that share the weight; None is float."""
    error: float
    """Of weight and input together, as the recipe has them."""
    input_error: float
    """Of the input alone; 0 for a float one."""
    weight_errors: dict[int, float]
    """Of the weight alone, by its bits; those of the recipe are among them."""

    @property
    def sqnr_db(self) -> float | None:
        """``error`` as a ratio of signal to noise, in dB; None where nothing changed."""
        return -10 * math.log10(self.error) if self.error > 0 else None


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivities of all quantized layers, in network order."""

    layers: list[LayerSensitivity]
    images: int
    """Held-out images that errors were measured on."""
    calibration_images: int
    """Other images, from which ranges were taken."""
    passes: float
    """Whole forward passes over the held-out images that this took."""
    seconds: float
    float_layers: dict[str, str]
    """Layers left float, with the reason of each."""

    @property
    def ranked(self) -> list[LayerSensitivity]:
        """The layers, the one with the largest error first."""
        return sorted(self.layers, key=lambda row: -row.error)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (JSON types only); bits are keys, as text."""
        rows = [
            {**asdict(row), "sqnr_db": row.sqnr_db, "weight_errors": {str(b): e for b, e in row.weight_errors.items()}}
            for row in self.layers
        ]
        return {**asdict(self), "layers": rows}


@torch.no_grad()
def layer_sensitivities(
    gm: fx.GraphModule, inputs: Tensors, recipe: Recipe, bits: Collection[int], progress: Progress
) -> tuple[list[LayerSensitivity], float]:
    """Measure every quantized layer of the calibrated network ``gm``, which is left as it was.

    Args:
        gm: with nearest rounding, calibrated by ``recipe`` on other images than ``inputs``.
        inputs: held-out images [images, ...] by the names of the network's inputs.
        bits: of weights, to try besides those that the recipe gives.

    Returns:
        The layers in network order, and the number of whole forward passes that it took.

    Raises:
        ModelError: the network, or what a single quantized layer makes of it, returns NaN or infinite values.
    """
    network, batch = Network(gm), recipe.calibration_batch
    nodes = weight_layers(gm)
    groups = [group for group in weight_groups(nodes) if weight_quantizer(gm, nodes[group[0]])]
    layers = [_Layer.find(network, {name: nodes[name] for name in group}) for group in groups]
    trials = sorted((t for layer in layers for t in layer.trials(bits)), key=lambda trial: trial.start)
    progress.plan(len(trials))
    macs = multiplications(gm, {name: tensor[:batch] for name, tensor in inputs.items()})
    errors: dict[tuple[str, int | None, bool], float] = {}
    with float_mode(gm):
        reference = network.run(0, network.end, inputs, batch, quantized=True)
        alive, position = inputs, 0
        for trial in trials:
            progress.enter(trial.layer.name)
            if trial.start > position:
                alive = network.run(position, trial.start, alive, batch, quantized=True)
                position = trial.start
            with _alone(gm, trial, recipe):
                outputs = network.run(position, network.end, alive, batch, quantized=True)
            error = network.output_error(outputs, reference)
            if not math.isfinite(error):
                raise ModelError(
                    f"with layer {trial.layer.name} quantized, the network returns NaN or infinite values on the "
                    "held-out images; check the network on them, and its normalization of inputs."
                )
            errors[trial.layer.name, trial.bits, trial.with_input] = error
            progress.tick()
    images = len(next(iter(inputs.values())))
    passes = network.executions / (network.end * -(-images // batch))
    return [layer.summary(errors, sum(macs[name] for name in layer.names)) for layer in layers], passes


@dataclass(frozen=True)
class _Layer:
    """A quantized layer, with those that share its weight: what quantizes them, and where they begin."""

    names: tuple[str, ...]
    place: int
    """Position of its node, or of the first of them."""
    weight: WeightFakeQuantize
    weight_name: str
    sources: list[ActivationFakeQuantize]
    sources_place: int
    """Position of the first quantizer of their inputs, or ``place``."""

    @classmethod
    def find(cls, network: Network, nodes: dict[str, fx.Node]) -> _Layer:
        gm, (first, *_) = network.gm, nodes.values()
        weight = weight_quantizer(gm, first)
        assert weight is not None
        quantizers = [input_quantizer(gm, node) for node in nodes.values()]
        sources = list(dict.fromkeys(q for q in quantizers if q is not None))
        place = min(network.nodes.index(node) for node in nodes.values())
        places = [i for i, n in enumerate(network.nodes) if n.op == "call_module" and _module(gm, n) in sources]
        weight_name = str(weight_node(first).all_input_nodes[0].target)
        return cls(tuple(nodes), place, weight, weight_name, sources, min([*places, place]))

    @property
    def name(self) -> str:
        return self.names[0]

    def trials(self, bits: Collection[int]) -> Iterator[_Trial]:
        for number in sorted({*bits, self.weight.spec.bits}):
            yield _Trial(self, self.place, number, False)
        if self.sources:
            yield _Trial(self, self.sources_place, None, True)
            yield _Trial(self, self.sources_place, self.weight.spec.bits, True)

    def summary(self, errors: dict[tuple[str, int | None, bool], float], macs: int) -> LayerSensitivity:
        own, quantized = self.weight.spec.bits, bool(self.sources)
        return LayerSensitivity(
            layer=self.name,
            shared_with=self.names[1:],
            weights=self.weight.quantized.numel(),
            macs=macs,
            weight_bits=own,
            input_bits=max((source.spec.bits for source in self.sources), default=None),
            error=errors[self.name, own, quantized],
            input_error=errors[self.name, None, True] if quantized else 0.0,
            weight_errors={b: e for (name, b, inputs), e in errors.items() if name == self.name and b and not inputs},
        )


@dataclass(frozen=True)
class _Trial:
    layer: _Layer
    start: int
    bits: int | None
    """Of the weight; None leaves it float."""
    with_input: bool


@contextmanager
def _alone(gm: fx.GraphModule, trial: _Trial, recipe: Recipe) -> Iterator[None]:
    """Within the block, what the trial quantizes is on; all else is off already."""
    weight, sources = trial.layer.weight, trial.layer.sources
    spec, state = weight.spec, [(t, t.clone()) for t in (weight.scale, weight.zero_point, weight.quantized)]
    if trial.bits is not None and trial.bits != spec.bits:
        weight.spec = replace(spec, bits=trial.bits)
        set_weight(weight, getattr(gm, trial.layer.weight_name), recipe)
    weight.enabled = trial.bits is not None
    for source in sources:
        source.enabled = trial.with_input
    try:
        yield
    finally:
        weight.enabled, weight.spec = False, spec
        for source in sources:
            source.enabled = False
        for tensor, before in state:
            tensor.copy_(before)


def _module(gm: fx.GraphModule, node: fx.Node) -> Any:
    return getattr(gm, str(node.target))


@torch.no_grad()
def multiplications(gm: fx.GraphModule, inputs: Tensors) -> dict[str, int]:
    """Return each weight layer's multiplications (and as many additions) for one image, by running ``inputs``."""
    counter = _Multiplications(gm)
    counter.run(*inputs.values())
    images = len(next(iter(inputs.values())))
    return {name: counter.found[node] // images for name, node in weight_layers(gm).items()}


class _Multiplications(fx.Interpreter):
    """Each output value takes as many as its channel has weights; in a transposed layer each input value does."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_weight_op(n):
            weight: Tensor = self.env[weight_node(n)]
            op = WEIGHT_OPS[n.target]  # type: ignore[index]
            values = self.env[input_node(n)] if op.transposed else value
            self.found[n] = values.numel() * (weight.numel() // weight.shape[0])
        return value
