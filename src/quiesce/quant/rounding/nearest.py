"""Rounding to nearest: no learning."""

from __future__ import annotations

from torch import Tensor

from quiesce.quant.functional import quantize
from quiesce.quant.spec import QuantizationSpec


def nearest(weight: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the integers of ``weight``, each rounded to the nearest grid point; scales of shape [channels] or []."""
    scale, zero_point = spec.broadcast(scale, weight.ndim), spec.broadcast(zero_point, weight.ndim)
    return quantize(weight, scale, zero_point, spec.quant_min, spec.quant_max).to(spec.dtype)
