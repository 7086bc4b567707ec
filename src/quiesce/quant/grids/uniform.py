"""Equal steps: (q − z) · s, by division and rounding half to even. The zero point z is the integer of 0."""

from __future__ import annotations

import torch
from torch import Tensor

from quiesce.quant.functional import fake_quantize, learned_fake_quantize
from quiesce.quant.grids.grid import Grid
from quiesce.quant.ranges import lp_range, scale_and_zero_point
from quiesce.quant.spec import QuantizationSpec


class Uniform(Grid):
    """The grid of :mod:`quiesce.quant.functional`, symmetric ones too."""

    def round(self, steps: Tensor, zero_point: Tensor | float, spec: QuantizationSpec) -> Tensor:
        return (torch.round(steps) + zero_point).clamp(spec.quant_min, spec.quant_max) - zero_point

    def inside(self, zero_point: float, spec: QuantizationSpec) -> tuple[float, float]:
        return spec.quant_min - zero_point - 0.5, spec.quant_max - zero_point + 0.5

    def span(
        self, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        return scale_and_zero_point(low, high, spec, power_of_two)

    def search(
        self, values: Tensor, low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
    ) -> tuple[Tensor, Tensor]:
        ends = lp_range(values.reshape(1, -1), spec, low.reshape(1), high.reshape(1), power_of_two)
        scale, zero_point = scale_and_zero_point(*ends, spec, power_of_two)
        return scale[0], zero_point[0]

    def fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantizationSpec) -> Tensor:
        return fake_quantize(x, scale, zero_point, spec.quant_min, spec.quant_max)

    def learned(self, x: Tensor, scale: Tensor, zero_point: float, spec: QuantizationSpec) -> Tensor:
        return learned_fake_quantize(x, scale, spec.quant_min - zero_point, spec.quant_max - zero_point)
