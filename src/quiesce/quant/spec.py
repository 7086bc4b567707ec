"""What the integers of one quantized tensor look like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizationSpec:
    """Integer grid of a tensor: asymmetric is unsigned with a zero point, symmetric is signed with zero point 0.

    ``ch_axis`` is the axis that has one scale per entry (the output channels of a weight); None is one scale for
    the whole tensor. ``grid`` is a row of ``quiesce.quant.grids.GRIDS``; weights are uniform.
    """

    bits: int
    symmetric: bool = False
    ch_axis: int | None = None
    grid: str = "uniform"

    @property
    def quant_min(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        return (1 << (self.bits - 1 if self.symmetric else self.bits)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest torch dtype that holds the integers."""
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def headroom(self) -> int:
        """The power of two by which signed integers can be multiplied and still fit 8 bits; 1 for unsigned ones."""
        return 1 << (8 - self.bits) if self.symmetric else 1

    def broadcast(self, parameter: Tensor, ndim: int) -> Tensor:
        """View a scale or zero point of shape [channels] so that it broadcasts over an ``ndim``-dimensional tensor."""
        if self.ch_axis is None:
            return parameter
        shape = [1] * ndim
        shape[self.ch_axis] = -1
        return parameter.view(shape)
