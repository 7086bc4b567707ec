"""What a learned rounding is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from quiesce.quant.spec import QuantizationSpec


class Rounding(nn.Module, ABC):
    """The rounding of one weight while it is learned: ``V`` is what the optimizer moves."""

    V: nn.Parameter
    step_sizes: nn.Parameter | None
    """What the optimizer moves, at a rate of its own, where the weight's scale is learned, too."""

    @abstractmethod
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
        """Start at ``weight``, or between it and the integers ``start``; scale and zero point are [channels] or [].

        ``fused`` asks for compiled kernels, where the rounding has them.
        """
        super().__init__()
        self.register_parameter("step_sizes", None)

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the soft-rounded weight, in real units."""

    @abstractmethod
    def regularizer(self, beta: Tensor) -> Tensor:
        """Return the 0-dim penalty that drives the rounding to a decision."""

    def add_penalty(self, beta: Tensor, weight: Tensor) -> None:
        """Add the gradient of ``weight`` (0-dim) times :meth:`regularizer` to that of ``V``."""
        (weight * self.regularizer(beta)).backward()

    @abstractmethod
    def push(self, amount: Tensor) -> None:
        """Move ``V`` against ``amount`` (0-dim) times the gradient of :meth:`regularizer` at β = 2: to a decision."""

    @abstractmethod
    def undecided(self) -> Tensor:
        """Return how many weights (0-dim) are more than a tenth of a step size from the integer decided for."""

    def learned_scale(self, scale: Tensor) -> Tensor:
        """Return the scale decided for; ``scale`` is the one that the rounding was made with, and has its shape."""
        return scale

    @abstractmethod
    def harden(self) -> Tensor:
        """Return the integers decided for, in the spec's dtype and the weight's shape."""
