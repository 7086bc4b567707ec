"""Calibration: ranges of all weights and activations of the float network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.graph.capture import interface_of
from quiesce.graph.rewrite import device_of
from quiesce.processes import ALONE, Processes
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, fake_quantizers, float_mode
from quiesce.quant.grids import GRIDS
from quiesce.quant.ranges import find_range, minmax_range, percentile_range, scale_and_zero_point
from quiesce.recipe import Recipe

SAMPLED_VALUES = 2**17
"""Values of an activation tensor that percentiles and the range search look at; extremes are taken from all."""


@torch.no_grad()
def calibrate(
    gm: fx.GraphModule,
    samples: Samples,
    recipe: Recipe,
    processes: Processes = ALONE,
) -> fx.GraphModule:
    """Set scale and zero point of every fake-quantizer of ``gm`` and round its weights to nearest; returns ``gm``.

    Activations are observed in the float network, as QDrop's code does: all values for the extremes, a random
    sample of each image's for percentiles and the range search. The batch size changes nothing, and ``processes``, each
    with its share of the samples, find what one would find on all of them.
    """
    for node in gm.graph.nodes:
        quantizer = getattr(gm, str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, WeightFakeQuantize):
            set_weight(quantizer, getattr(gm, str(node.args[0].target)), recipe)
    quantizers = {n: q for n, q in fake_quantizers(gm).items() if isinstance(q, ActivationFakeQuantize)}
    first, images = processes.place(len(samples))
    observers = {name: _Observer(len(samples), images, first, recipe.seed) for name in quantizers}
    for batch in samples.batches(recipe.calibration_batch, device_of(gm)):
        with _observed(quantizers, observers, len(batch)), float_mode(gm):
            gm(*interface_of(gm).flatten(batch.args, batch.kwargs))
    for name, quantizer in quantizers.items():
        quantizer.set_parameters(*observers[name].parameters(quantizer, recipe, processes))
    return gm


def set_weight(quantizer: WeightFakeQuantize, weight: Tensor, recipe: Recipe) -> None:
    """Find the range of ``weight`` as ``recipe`` says, and round it to nearest on the grid of ``quantizer.spec``."""
    ch_axis = quantizer.spec.ch_axis
    rows = weight.reshape(1, -1) if ch_axis is None else weight.movedim(ch_axis, 0).reshape(weight.shape[ch_axis], -1)
    settings = recipe.weights
    low, high = find_range(rows, quantizer.spec, settings.range, power_of_two=settings.power_of_two)
    scale, zero_point = scale_and_zero_point(low, high, quantizer.spec, settings.power_of_two)
    quantizer.set_parameters(scale.view(quantizer.scale.shape), zero_point.view(quantizer.scale.shape), weight)


class Sampler:
    """Random entries of images, as many of each whatever the batches: the ones that a process would draw which has all.

    What is drawn from begins with image number ``first``; those in front of it are another process's.
    """

    def __init__(self, per_image: int, first: int, seed: int) -> None:
        self.per_image = per_image
        self._generator = torch.Generator().manual_seed(seed)
        self._passed_over = first

    def draw(self, rows: Tensor) -> Tensor:
        """Return random entries of each row of ``rows`` [rows, entries, ...]; all where there are no more."""
        if self.per_image >= rows.shape[1]:
            return rows
        self._indices(rows.shape[1], self._passed_over)
        self._passed_over = 0
        index = self._indices(rows.shape[1], len(rows)).to(rows.device)
        return rows[torch.arange(len(rows), device=rows.device)[:, None], index]

    def _indices(self, entries: int, rows: int) -> Tensor:
        return torch.randint(entries, (rows, self.per_image), generator=self._generator)


class _Observer:
    """Extremes of all values seen, and random ones of each of ``own`` images, of ``images`` in all processes.

    They are kept in one piece of memory: a small one of each batch would lie scattered among the batches' own, whose
    memory could then not be given back.
    """

    def __init__(self, own: int, images: int, first: int, seed: int) -> None:
        self.sampler = Sampler(-(-SAMPLED_VALUES // images), first, seed)
        self.own = own
        self.drawn = 0

    def add(self, x: Tensor, images: int) -> None:
        rows = x.reshape(images, -1) if x.numel() % images == 0 else x.reshape(1, -1)
        if self.drawn == 0:
            self.values = x.new_empty(self.own * self.sampler.per_image)
            self.low, self.high = rows.amin().clone(), rows.amax().clone()
        torch.minimum(self.low, rows.amin(), out=self.low)
        torch.maximum(self.high, rows.amax(), out=self.high)
        drawn = self.sampler.draw(rows).reshape(-1)
        self.values[self.drawn : self.drawn + len(drawn)] = drawn
        self.drawn += len(drawn)

    def parameters(
        self, quantizer: ActivationFakeQuantize, recipe: Recipe, processes: Processes
    ) -> tuple[Tensor, Tensor]:
        settings, spec = recipe.activations, quantizer.spec
        grid = GRIDS[spec.grid]
        low, high = minmax_range(processes.gather(torch.stack([self.low, self.high])).unsqueeze(0))
        rows = processes.gather(self.values[: self.drawn]).unsqueeze(0)
        if settings.range == "percentile":
            low, high = percentile_range(rows, settings.percentile)
        find = partial(grid.search, rows) if settings.range == "lp" else grid.span
        return find(low[0], high[0], spec, settings.power_of_two)


@contextmanager
def _observed(
    quantizers: dict[str, ActivationFakeQuantize], observers: dict[str, _Observer], images: int
) -> Iterator[None]:
    """Within the block, a batch of ``images`` that runs through the network is observed."""

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: observers[name].add(args[0], images)

    handles = [q.register_forward_pre_hook(observe(name)) for name, q in quantizers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
