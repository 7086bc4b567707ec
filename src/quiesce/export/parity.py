"""Parity: does an exported ONNX file compute what the simulation computes, in ONNX Runtime's default session?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.evaluate import outputs_of, sqnr_db
from quiesce.export.export import integers_name, require
from quiesce.graph.capture import interface_of
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, fake_quantizers

TIE = 1e-4
"""Distance from a rounding tie, in steps, within which float32 may round either way."""


@dataclass(frozen=True)
class LayerParity:
    """The integers of one activation quantizer, against those that float64 gives for the same inputs."""

    quantizer: str
    values: int
    ties_broken: int
    """Integers that differ where the float64 value is within :data:`TIE` of a tie."""
    mismatches: int
    """Integers that differ elsewhere: none, but for what rounding errors of long sums in float32 make of a near tie."""
    farthest: float
    """Greatest distance from a tie, in steps, of an integer that differs."""


@dataclass(frozen=True)
class Parity:
    """How the outputs of a file compare with the simulation's."""

    images: int
    largest_difference: float
    """Of any output value."""
    largest_output: float
    sqnr_db: float | None
    """10·log10(E‖y‖² / E‖y − ŷ‖²), y the simulation's; None when both are equal."""
    top1_differs: int
    """Images with another top-1."""
    top1_differs_at_tie: int
    """Of these, images on which a tie was broken the other way on one side."""
    layers: list[LayerParity]
    """From the first ``layer_images`` images."""
    output_error: float
    """Greatest difference of an output from what float64 makes of the file's own integers, as a share of the largest
    output, on the first ``layer_images`` images. Ties have no part in it: it is about what stands behind the last
    quantizers, and about whether the session that shows its integers computes what the default one does."""

    @property
    def values(self) -> int:
        return sum(layer.values for layer in self.layers)

    @property
    def ties_broken(self) -> int:
        return sum(layer.ties_broken for layer in self.layers)

    @property
    def mismatches(self) -> int:
        return sum(layer.mismatches for layer in self.layers)

    @property
    def farthest(self) -> float:
        return max((layer.farthest for layer in self.layers), default=0.0)


@torch.no_grad()
def check_parity(
    graph: fx.GraphModule,
    path: Path,
    samples: Samples,
    *,
    simulated: list[Tensor] | None = None,
    layer_images: int = 32,
    batch_size: int = 32,
) -> Parity:
    """Run ``samples`` through the simulated network (on the CPU) and through the ONNX file, and compare.

    Outputs are compared on all samples, and layer by layer on the first ``layer_images``: there each layer is given
    the inputs that ONNX Runtime gave it, in float64, so that differences do not add up. ``simulated`` are the
    network's outputs, if they are there already, made in batches of this size.
    """
    file, inside = OnnxSession(path), OnnxSession(path, list(_activations(graph)))
    if simulated is None:
        simulated = outputs_of(lambda *a, **k: graph(*interface_of(graph).flatten(a, k)), samples, batch_size)
    exported = outputs_of(lambda *a, **k: file(interface_of(graph).flatten(a, k)), samples, batch_size)
    differing = at_tie = 0
    if len(simulated) == 1 and simulated[0].ndim == 2:
        images = torch.nonzero(simulated[0].argmax(1) != exported[0].argmax(1)).flatten().tolist()
        differing = len(images)
        for number, rows in groupby(images, key=lambda image: image // batch_size):
            batch = samples.select(slice(number * batch_size, (number + 1) * batch_size))
            at_tie += _with_broken_ties(graph, inside, batch, [image % batch_size for image in rows])
    pairs = [(y.double(), other.double()) for y, other in zip(simulated, exported, strict=True)]
    layers, output_error = _layer_parities(graph, file, inside, samples.select(slice(0, layer_images)), batch_size)
    return Parity(
        images=len(samples),
        largest_difference=max(float((y - other).abs().max()) for y, other in pairs),
        largest_output=max(float(y.abs().max()) for y, _ in pairs),
        sqnr_db=sqnr_db(exported, simulated),
        top1_differs=differing,
        top1_differs_at_tie=at_tie,
        layers=layers,
        output_error=output_error,
    )


def _layer_parities(
    graph: fx.GraphModule, file: OnnxSession, inside: OnnxSession, samples: Samples, batch_size: int
) -> tuple[list[LayerParity], float]:
    """Return each quantizer's integers and the outputs' error, against float64 on the file's own integers."""
    found: dict[str, list[LayerParity]] = {}
    errors = [0.0]
    for batch in samples.batches(batch_size):
        flat = interface_of(graph).flatten(batch.args, batch.kwargs)
        reference = _Float64(graph, inside.integers(flat))
        expected = reference.run(*flat)
        errors += [_relative_error(y, wanted) for y, wanted in zip(file(flat), expected, strict=True)]
        for layer in reference.found:
            found.setdefault(layer.quantizer, []).append(layer)
    return [_summed(layers) for layers in found.values()], max(errors)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    largest = expected.double().abs().max()
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / largest if largest > 0 else difference)


def _summed(layers: list[LayerParity]) -> LayerParity:
    return LayerParity(
        quantizer=layers[0].quantizer,
        values=sum(layer.values for layer in layers),
        ties_broken=sum(layer.ties_broken for layer in layers),
        mismatches=sum(layer.mismatches for layer in layers),
        farthest=max(layer.farthest for layer in layers),
    )


def _with_broken_ties(graph: fx.GraphModule, inside: OnnxSession, batch: Samples, rows: list[int]) -> int:
    """Return on how many of these images a tie was broken against float64, in the simulation or in the file.

    Both run the whole batch, as the last bits of sums, and with them ties, depend on the batch size.
    """
    flat = interface_of(graph).flatten(batch.args, batch.kwargs)
    sides = (inside.integers(flat), _simulated_integers(graph, flat))

    def broken(row: int, integers: dict[str, Tensor]) -> bool:
        reference = _Float64(graph, {name: _of_image(t, row, len(batch)) for name, t in integers.items()})
        reference.run(*[_of_image(x, row, len(batch)) for x in flat])
        return any(layer.ties_broken for layer in reference.found)

    return sum(any(broken(row, integers) for integers in sides) for row in rows)


def _of_image(tensor: Tensor, row: int, images: int) -> Tensor:
    """Return one image's part of a tensor that has the same number of rows for each."""
    rows = tensor.shape[0] // images
    return tensor[row * rows : (row + 1) * rows]


def _activations(graph: fx.GraphModule) -> dict[str, ActivationFakeQuantize]:
    return {n: q for n, q in fake_quantizers(graph).items() if isinstance(q, ActivationFakeQuantize)}


def _simulated_integers(graph: fx.GraphModule, flat: list[Tensor]) -> dict[str, Tensor]:
    """Return what the simulation quantizes each activation to."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            assert isinstance(module, ActivationFakeQuantize)
            found[name] = torch.round(output / module.scale) + module.zero_point

        return hook

    quantizers = _activations(graph)
    handles = [q.register_forward_hook(keep(name)) for name, q in quantizers.items()]
    try:
        graph(*flat)
    finally:
        for handle in handles:
            handle.remove()
    return found


class OnnxSession:
    """A default session of ONNX Runtime on one file: flat inputs to flat outputs.

    It also gives the integers of the named quantizers.
    """

    def __init__(self, path: Path, quantizers: Sequence[str] = ()) -> None:
        require(("onnx", "onnxruntime"), "onnx")
        import onnx
        import onnxruntime

        model = onnx.load(path)
        self.outputs = [output.name for output in model.graph.output]
        self.quantizers = {name: integers_name(name) for name in quantizers}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.quantizers.values())
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, flat: list[Tensor]) -> list[Tensor]:
        return self._run(self.outputs, flat)

    def integers(self, flat: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.quantizers, self._run(list(self.quantizers.values()), flat), strict=True))

    def _run(self, names: list[str], flat: list[Tensor]) -> list[Tensor]:
        inputs = [i.name for i in self.session.get_inputs()]
        feed = {name: np.ascontiguousarray(x.numpy()) for name, x in zip(inputs, flat, strict=True)}
        return [torch.from_numpy(y) for y in self.session.run(names, feed)] if names else []


class _Float64(fx.Interpreter):
    """Runs the simulated network in float64; at each quantizer the given integers are compared and go on."""

    def __init__(self, graph: fx.GraphModule, integers: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self.integers = integers
        self.found: list[LayerParity] = []

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _double(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _double(super().get_attr(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        quantizer = self.fetch_attr(target)
        if isinstance(quantizer, WeightFakeQuantize):
            return quantizer.dequantized_weight().double()
        spec, integers = quantizer.spec, self.integers[target].double()
        steps = args[0] / quantizer.scale.double()
        expected = (torch.round(steps) + quantizer.zero_point.double()).clamp(spec.quant_min, spec.quant_max)
        differs = expected != integers
        distances = (steps - steps.floor() - 0.5).abs()[differs]
        at_tie = int((distances <= TIE).sum())
        farthest = float(distances.max()) if len(distances) else 0.0
        self.found.append(LayerParity(target, differs.numel(), at_tie, len(distances) - at_tie, farthest))
        return (integers - quantizer.zero_point.double()) * quantizer.scale.double()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
