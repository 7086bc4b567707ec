"""Calibration: ranges of all weights and activations of the float network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.graph.capture import interface_of
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, fake_quantizers, float_mode
from quiesce.quant.ranges import find_range, lp_range, minmax_range, scale_and_zero_point
from quiesce.recipe import Recipe

SAMPLED_VALUES = 2**17
"""Values of an activation tensor that percentiles and the range search look at; extremes are taken from all."""


@torch.no_grad()
def calibrate(gm: fx.GraphModule, samples: Samples, recipe: Recipe) -> fx.GraphModule:
    """Set scale and zero point of every fake-quantizer of ``gm`` and round its weights to nearest; returns ``gm``.

    Activations are observed in the float network, as QDrop's code does: all values for the extremes, an even random
    sample of them for percentiles and the range search.
    """
    for node in gm.graph.nodes:
        quantizer = getattr(gm, str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, WeightFakeQuantize):
            _set_weight(quantizer, getattr(gm, str(node.args[0].target)), recipe)
    quantizers = {n: q for n, q in fake_quantizers(gm).items() if isinstance(q, ActivationFakeQuantize)}
    generator = torch.Generator().manual_seed(recipe.seed)
    with _observed(quantizers, len(samples), generator) as observed, float_mode(gm):
        for batch in samples.batches(recipe.calibration_batch):
            gm(*interface_of(gm).flatten(batch.args, batch.kwargs))
    for name, quantizer in quantizers.items():
        quantizer.set_parameters(*observed[name].parameters(quantizer, recipe))
    return gm


def _set_weight(quantizer: WeightFakeQuantize, weight: Tensor, recipe: Recipe) -> None:
    ch_axis = quantizer.spec.ch_axis
    rows = weight.reshape(1, -1) if ch_axis is None else weight.movedim(ch_axis, 0).reshape(weight.shape[ch_axis], -1)
    low, high = find_range(rows, quantizer.spec, recipe.weights.range)
    scale, zero_point = scale_and_zero_point(low, high, quantizer.spec)
    quantizer.set_parameters(scale.view(quantizer.scale.shape), zero_point.view(quantizer.scale.shape), weight)


class _Observer:
    """Extremes of all values seen and a random sample of them."""

    def __init__(self, batches_share: float, generator: torch.Generator) -> None:
        self.share = batches_share
        self.generator = generator
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.values: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        flat = args[0].reshape(-1)
        low, high = flat.min(), flat.max()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        count = max(1, round(SAMPLED_VALUES * self.share * args[0].shape[0]))
        if count < flat.numel():
            index = torch.randint(flat.numel(), (count,), generator=self.generator)
            flat = flat[index.to(flat.device)]
        self.values.append(flat)

    def parameters(self, quantizer: ActivationFakeQuantize, recipe: Recipe) -> tuple[Tensor, Tensor]:
        assert self.low is not None and self.high is not None
        settings, spec = recipe.activations, quantizer.spec
        rows = torch.cat([self.low.view(1), *self.values, self.high.view(1)]).unsqueeze(0)
        if settings.range == "lp":
            # The two extremes must not weigh more than their share: they set the widest candidate only.
            low, high = lp_range(rows[:, 1:-1], spec, self.low.view(1), self.high.view(1))
        elif settings.range == "minmax":
            low, high = minmax_range(rows)
        else:
            low, high = find_range(rows, spec, settings.range, settings.percentile)
        scale, zero_point = scale_and_zero_point(low, high, spec)
        return scale[0], zero_point[0]


@contextmanager
def _observed(
    quantizers: dict[str, ActivationFakeQuantize], samples: int, generator: torch.Generator
) -> Iterator[dict[str, _Observer]]:
    observers = {name: _Observer(1 / samples, generator) for name in quantizers}
    handles = [q.register_forward_pre_hook(observers[name]) for name, q in quantizers.items()]
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()
