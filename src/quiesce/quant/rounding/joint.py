from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quiesce.quant.rounding.adaround import AdaRound


class JointRounding(AdaRound):
    """AdaRound that learns the weight's step size, too (Genie-M, arXiv 2212.04780).

    W̃ = s'·(clip(B + h(V) + z, q_min, q_max) − z), where B = ⌊W/s⌋ is of the step size at the start and stays, so that
    the gradient to s' is that of a scale. s' = s·2^(tanh(u) / 2): within a factor of √2 of s, for the room of integer
    biases. ``u`` has the scale's shape, and starts at 0.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.step_sizes = nn.Parameter(torch.zeros_like(self.scale))

    def forward(self) -> Tensor:
        return super().forward() * self._factor()

    def learned_scale(self, scale: Tensor) -> Tensor:
        return scale * self._factor().detach().view_as(scale)

    def _base(self, steps: Tensor, start: Tensor | None) -> Tensor:
        """B + z; where the integers to start from were found on another scale, the next ones to B that allow them."""
        base = super()._base(steps, start)
        if start is None:
            return base
        clipped = (base < self.ends[0]) | (base >= self.ends[1])
        return torch.where(clipped, base, torch.minimum(torch.maximum(base, start - 1), start.to(base.dtype)))

    def _factor(self) -> Tensor:
        assert self.step_sizes is not None
        return torch.exp2(0.5 * self.step_sizes.tanh())
