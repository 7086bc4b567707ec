"""What a grid of activations is: which values its integers stand for, at a scale of 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from quiesce.quant.functional import learned_rounding
from quiesce.quant.ranges import LP_NORM
from quiesce.quant.spec import QuantizationSpec

SHRINKS = tuple(1.0 - 0.01 * step for step in range(80))
"""Factors on a range that the search tries, as :func:`quiesce.quant.ranges.lp_range` does."""


class Grid(ABC):
    """Values x̂ = s · g(x / s) of one tensor with one scale s (0-dim), where g rounds to the grid at a scale of 1.

    The zero point z (0-dim, a whole number) is a second parameter, with a meaning that each grid states. 0 is on every
    grid. Gradients are LSQ's (arXiv 1902.08153, eq. 3), of which uniform grids are one case: straight through for
    values that are rounded and 0 for values that are clipped; for s the residual (x̂ − x) / s of the former and x̂ / s
    of the latter.
    """

    @abstractmethod
    def round(self, steps: Tensor, zero_point: Tensor | float, spec: QuantizationSpec) -> Tensor:
        """Return g of ``steps`` = x / s."""

    @abstractmethod
    def inside(self, zero_point: float, spec: QuantizationSpec) -> tuple[float, float]:
        """Return the ends, in steps, of what is rounded; what lies beyond is clipped."""

    @abstractmethod
    def span(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the grid that spans [low, high] (tensors of one shape)."""

    def candidates(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scales and zero points to try, from the widest range on."""
        for shrink in SHRINKS:
            yield self.span(low * shrink, high * shrink, spec, power_of_two)

    def search(
        self, values: Tensor, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the first candidate with the least mean |x − x̂|^2.4 over ``values`` (any shape)."""

        def error(candidate: tuple[Tensor, Tensor]) -> float:
            scale, zero_point = candidate
            restored = self.round(values / scale, zero_point, spec) * scale
            return float((values - restored).abs_().pow_(LP_NORM).mean())

        return min(self.candidates(low, high, spec, power_of_two), key=error)

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantizationSpec) -> Tensor:
        """Return x̂, differentiably."""
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
            return self.learned(x, scale, float(zero_point), spec)
        return self.round(x / scale, zero_point, spec) * scale

    def learned(self, x: Tensor, scale: Tensor, zero_point: float, spec: QuantizationSpec) -> Tensor:
        """Return :meth:`fake_quantize` for the optimization loop, which reads nothing back from the device."""
        return learned_rounding(
            x, scale, lambda steps: self.round(steps, zero_point, spec), self.inside(zero_point, spec)
        )
