"""AdaRound: learn for each weight whether it is rounded down or up (arXiv 2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quiesce.quant.kernels import GAMMA, ZETA, has_rows, penalty_gradient, soft_rounding, soft_weight
from quiesce.quant.rounding.rounding import Rounding
from quiesce.quant.spec import QuantizationSpec


class AdaRound(Rounding):
    """Soft rounding of one weight: W̃ = s·(clip(⌊W/s⌋ + h(V) + z, q_min, q_max) − z) (AdaRound, eq. 22).

    ``V`` has the weight's shape and starts where h(V) = W/s − ⌊W/s⌋, so that W̃ starts as the clipped float weight.
    ``start``, integers of the weight's shape, moves each h just over halfway from there to the rounding they hold: the
    decision is kept, and its gradient is not dead.
    """

    base: Tensor
    scale: Tensor
    zero_point: Tensor
    ends: Tensor

    def __init__(
        self,
        weight: Tensor,
        spec: QuantizationSpec,
        scale: Tensor,
        zero_point: Tensor,
        start: Tensor | None = None,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__(weight, spec, scale, zero_point, start)
        self.spec = spec
        self.register_buffer("scale", spec.broadcast(scale, weight.ndim))
        self.register_buffer("zero_point", spec.broadcast(zero_point, weight.ndim))
        self.register_buffer("ends", scale.new_tensor([spec.quant_min, spec.quant_max]))
        weight = _laid_out(weight)
        steps = weight / self.scale
        self.register_buffer("base", self._base(steps, start))
        share = (steps - (self.base - self.zero_point)).clamp(0.0, 1.0)
        if start is not None:
            up = (start.to(share.dtype) - self.base).clamp(0.0, 1.0)
            share = share + 0.51 * (up - share)
        self.V = nn.Parameter(-torch.log((ZETA - GAMMA) / (share - GAMMA) - 1.0))
        self.fused = fused and has_rows(self.V, self.scale)

    def forward(self) -> Tensor:
        return soft_weight(self.V, self.base, self.zero_point, self.scale, self.ends, fused=self.fused)

    def _base(self, steps: Tensor, start: Tensor | None) -> Tensor:
        """Return the integers that weights of ``steps`` step sizes are rounded up from."""
        return steps.floor() + self.zero_point

    def regularizer(self, beta: Tensor) -> Tensor:
        """Return Σ (1 − |2h − 1|^β), 0 when every h is 0 or 1 (AdaRound, eq. 24)."""
        return (1.0 - (2.0 * soft_rounding(self.V) - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def add_penalty(self, beta: Tensor, weight: Tensor) -> None:
        assert self.V.grad is not None
        self.V.grad = penalty_gradient(self.V, self.V.grad, beta, weight, fused=self.fused)

    @torch.no_grad()
    def push(self, amount: Tensor) -> None:
        self.V.copy_(penalty_gradient(self.V, self.V, torch.full_like(amount, 2.0), -amount, fused=self.fused))

    @torch.no_grad()
    def undecided(self) -> Tensor:
        h = soft_rounding(self.V)
        return (torch.minimum(h, 1.0 - h) > 0.1).sum()

    @torch.no_grad()
    def harden(self) -> Tensor:
        """Return the integers: up where V ≥ 0 (h ≥ ½), down elsewhere."""
        integers = self.base + (self.V >= 0)
        return integers.clamp(self.spec.quant_min, self.spec.quant_max).to(self.spec.dtype)


def _laid_out(weight: Tensor) -> Tensor:
    """Channels last in memory, as the images that are convolved with it are: else it is copied so in every step."""
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight.contiguous()
