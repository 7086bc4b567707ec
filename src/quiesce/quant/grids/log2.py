"""Powers of two, or of √2, for values in [0, s] most of which are near 0: probabilities behind a softmax.

``q = clip(round(−n · log₂(x / s)), 0, 2^bits − 1)`` and ``x̂ = s · 2^(−q / n)``, but 0 at the largest q; n is 1, or 2
for powers of √2. Sources: FQ-ViT, arXiv 2111.13824, eq. 8 (n = 1, s = 1); RepQ-ViT, arXiv 2212.08254 (n = 2). The zero
point is 0, and unused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quiesce.quant.grids.grid import Grid
from quiesce.quant.ranges import next_power_of_two
from quiesce.quant.spec import QuantizationSpec


class Log2(Grid):
    """``parts`` levels to each halving; negative values are clipped to 0."""

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def round(self, steps: Tensor, zero_point: Tensor | float, spec: QuantizationSpec) -> Tensor:
        # log2 of 0 is −∞, which is the largest q.
        integers = torch.round(steps.clamp(min=0.0).log2() * -self.parts).clamp(0, spec.quant_max)
        return torch.exp2(integers / -self.parts).masked_fill(integers == spec.quant_max, 0.0)

    def inside(self, zero_point: float, spec: QuantizationSpec) -> tuple[float, float]:
        return 0.0, float(2.0 ** (0.5 / self.parts))

    def span(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        smallest = torch.finfo(high.dtype).tiny * 2**20
        scale = torch.where(high > smallest, high, torch.ones_like(high))
        return next_power_of_two(scale) if power_of_two else scale, torch.zeros_like(scale)
