"""AdaRound: learn for each weight whether it is rounded down or up (arXiv 2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quiesce.quant.rounding.rounding import Rounding
from quiesce.quant.spec import QuantizationSpec

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid, so that h reaches 0 and 1 (AdaRound, eq. 23)."""


class AdaRound(Rounding):
    """Soft rounding of one weight: W̃ = s·(clip(⌊W/s⌋ + h(V) + z, q_min, q_max) − z) (AdaRound, eq. 22).

    ``V`` has the weight's shape and starts where h(V) = W/s − ⌊W/s⌋, so that W̃ starts as the clipped float weight.
    ``start``, integers of the weight's shape, moves each h just over halfway from there to the rounding they hold: the
    decision is kept, and its gradient is not dead.
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, weight: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor, start: Tensor | None = None
    ) -> None:
        super().__init__(weight, spec, scale, zero_point, start)
        self.spec = spec
        self.register_buffer("scale", spec.broadcast(scale, weight.ndim))
        self.register_buffer("zero_point", spec.broadcast(zero_point, weight.ndim))
        steps = weight / self.scale
        self.register_buffer("base", steps.floor() + self.zero_point)
        share = steps - steps.floor()
        if start is not None:
            up = (start.to(share.dtype) - self.base).clamp(0.0, 1.0)
            share = share + 0.51 * (up - share)
        self.V = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1.0))
        self.h = share

    def forward(self) -> Tensor:
        """Return the soft-rounded weight; keeps h for :meth:`regularizer`, so that it is computed once a step."""
        self.h = (torch.sigmoid(self.V) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
        integers = (self.base + self.h).clamp(self.spec.quant_min, self.spec.quant_max)
        return (integers - self.zero_point) * self.scale

    def regularizer(self, beta: Tensor) -> Tensor:
        """Return Σ (1 − |2h − 1|^β), 0 when every h is 0 or 1 (AdaRound, eq. 24), for the h of the last forward."""
        return (1.0 - (2.0 * self.h - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def harden(self) -> Tensor:
        """Return the integers: up where V ≥ 0 (h ≥ ½), down elsewhere."""
        integers = self.base + (self.V >= 0)
        return integers.clamp(self.spec.quant_min, self.spec.quant_max).to(self.spec.dtype)
