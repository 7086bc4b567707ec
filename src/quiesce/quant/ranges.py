"""Clipping ranges: min-max, percentile, and the L_p search of the references; and the scale they imply."""

from __future__ import annotations

import torch
from torch import Tensor

from quiesce.quant.functional import dequantize, quantize
from quiesce.quant.spec import QuantizationSpec

LP_NORM = 2.4
"""p of the range search (BRECQ's and QDrop's code)."""
LP_CANDIDATES = 80
"""Shrink factors tried: 1.00, 0.99, …, 0.21."""


def scale_and_zero_point(
    low: Tensor, high: Tensor, spec: QuantizationSpec, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (whole numbers, float dtype) whose grid spans [low, high], to within half a step.

    The range is widened to hold 0, which must be on the grid: padding and ReLU produce it exactly. With
    ``power_of_two`` the scale is rounded up to a power of two, so that the range stays covered.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    smallest = torch.finfo(low.dtype).tiny * 2**20
    if spec.symmetric:
        bound = torch.maximum(-low / -spec.quant_min, high / spec.quant_max)
        scale = torch.where(bound > smallest, bound, torch.ones_like(bound))
        return next_power_of_two(scale) if power_of_two else scale, torch.zeros_like(scale)
    width = (high - low) / (spec.quant_max - spec.quant_min)
    scale = torch.where(width > smallest, width, torch.ones_like(width))
    scale = next_power_of_two(scale) if power_of_two else scale
    zero_point = (spec.quant_min - torch.round(low / scale)).clamp(spec.quant_min, spec.quant_max)
    return scale, zero_point


def next_power_of_two(scale: Tensor) -> Tensor:
    """Return the least power of two that is not below ``scale`` (above 0), exactly."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def minmax_range(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and greatest value of each row of ``rows`` [rows, values]."""
    return rows.amin(dim=1), rows.amax(dim=1)


def percentile_range(rows: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Return the range that holds the central ``percentile`` per cent of each row's values."""
    ordered = rows.sort(dim=1).values
    outside = (100.0 - percentile) / 200.0
    last = rows.shape[1] - 1
    return ordered[:, round(outside * last)], ordered[:, round((1 - outside) * last)]


def lp_range(
    rows: Tensor,
    spec: QuantizationSpec,
    low: Tensor | None = None,
    high: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return, for each row of ``rows`` [rows, values], the range with the least mean |x − x̂|^2.4.

    Minimum and maximum (of the rows, or ``low`` and ``high`` if given) shrink together in steps of 1 % (BRECQ's and
    QDrop's code); the widest of equally good ranges is taken. With ``power_of_two`` each is tried with its scale
    rounded up, so the search is one over neighbouring powers of two.
    """
    row_low, row_high = minmax_range(rows)
    low, high = row_low if low is None else low, row_high if high is None else high
    best_low, best_high = low.clone(), high.clone()
    best = torch.full_like(low, torch.inf)
    for step in range(LP_CANDIDATES):
        shrink = 1.0 - 0.01 * step
        scale, zero_point = (p[:, None] for p in scale_and_zero_point(low * shrink, high * shrink, spec, power_of_two))
        restored = dequantize(quantize(rows, scale, zero_point, spec.quant_min, spec.quant_max), scale, zero_point)
        error = (rows - restored).abs_().pow_(LP_NORM).mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * shrink, best_low)
        best_high = torch.where(better, high * shrink, best_high)
    return best_low, best_high


def find_range(
    rows: Tensor, spec: QuantizationSpec, method: str, percentile: float = 99.99, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (low, high) of each row of ``rows`` by ``method``: minmax, percentile, or lp."""
    if method == "minmax":
        return minmax_range(rows)
    if method == "percentile":
        return percentile_range(rows, percentile)
    return lp_range(rows, spec, power_of_two=power_of_two)
