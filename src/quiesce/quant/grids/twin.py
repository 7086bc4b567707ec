"""Twin ranges, for values with a long positive side and a short negative one: those behind a GELU.

Signed integers, −2^(bits−1) … 2^(bits−1) − 1, of which positive ones stand for q · s and negative ones for
q · s · 2^(−m): both sides have half the integers, whatever their lengths. The zero point is m, a whole number from 0
to 2^bits − 1. Source: PTQ4ViT, arXiv 2111.12293, section 3.2: two regions whose scales are a power of two apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quiesce.quant.grids.grid import SHRINKS, Grid
from quiesce.quant.ranges import next_power_of_two
from quiesce.quant.spec import QuantizationSpec

LARGEST_SHIFT = 8
"""The most halvings between the two scales that the search tries."""


class Twin(Grid):
    """One scale on each side of 0; see above."""

    def round(self, steps: Tensor, zero_point: Tensor | float, spec: QuantizationSpec) -> Tensor:
        half = 1 << (spec.bits - 1)
        finer = 2.0**zero_point
        negative = torch.round(steps * finer).clamp(-half, 0) / finer
        return torch.round(steps).clamp(0, half - 1) + negative

    def inside(self, zero_point: float, spec: QuantizationSpec) -> tuple[float, float]:
        half = 1 << (spec.bits - 1)
        return -(half + 0.5) / 2**zero_point, half - 0.5

    def span(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Cover both sides; where the negative one is the longer one, both have its scale."""
        half = 1 << (spec.bits - 1)
        smallest = torch.finfo(high.dtype).tiny * 2**20
        negative = -low.clamp(max=0.0) / half
        scale = torch.maximum(high / (half - 1), negative)
        scale = torch.where(scale > smallest, scale, torch.ones_like(scale))
        scale = next_power_of_two(scale) if power_of_two else scale
        shift = torch.floor(torch.log2(scale / negative)).clamp(0, _largest_shift(spec))
        return scale, torch.where(negative > smallest, shift, torch.zeros_like(shift))

    def candidates(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every shrunk positive range with every negative one a power of two apart."""
        for shrink in SHRINKS:
            scale, _ = self.span(low * shrink, high * shrink, spec, power_of_two)
            for shift in range(_largest_shift(spec) + 1):
                yield scale, torch.full_like(scale, shift)


def _largest_shift(spec: QuantizationSpec) -> int:
    return min(LARGEST_SHIFT, spec.quant_max)
