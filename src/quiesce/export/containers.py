"""Integer containers: in which type of a file the integers of a fake-quantizer are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quiesce.errors import ModelError
from quiesce.quant.fake_quantize import WeightFakeQuantize

WIDTHS = (2, 4, 8, 16)
"""Bits of the integer types that files have."""


@dataclass(frozen=True)
class StoredWeight:
    """The integers of a weight in a container: ``(integers − zero_point) · scale`` is the weight."""

    integers: NDArray[np.int16]
    zero_point: NDArray[np.int16]
    """Shape [channels], or []."""
    scale: NDArray[np.float32]
    ch_axis: int | None
    bits: int
    """Bits that the integers need by their recipe; the container may be wider."""
    width: int
    signed: bool

    @property
    def container(self) -> str:
        """Name of the container in ONNX: INT8, UINT4, …"""
        return f"{'' if self.signed else 'U'}INT{self.width}"

    def permuted(self, order: list[int]) -> StoredWeight:
        """Return the weight with its axes in another order."""
        axis = None if self.ch_axis is None else order.index(self.ch_axis)
        return replace(self, integers=self.integers.transpose(order), ch_axis=axis)


def store_weight(
    name: str,
    quantizer: WeightFakeQuantize,
    *,
    narrowest: int = 2,
    widest: int = 16,
    symmetric: bool = False,
    fill: bool = False,
) -> StoredWeight:
    """Return the integers of ``quantizer`` in the narrowest container of at least ``narrowest`` bits.

    ``symmetric`` shifts integers by their zero points, so that all of these are 0: the values stay exactly what they
    are, and need one bit more. ``fill`` multiplies signed integers by the power of two that 8 bits leave room
    for, and divides the scales by it (see ``graph/bias.py``).

    Raises:
        ModelError: a symmetric weight needs more than ``widest`` bits.
    """
    spec = quantizer.spec
    integers = _numbers(quantizer.quantized_weight())
    zero_point = _numbers(quantizer.zero_point)
    signed = spec.symmetric
    low, high = spec.quant_min, spec.quant_max
    factor = spec.headroom if fill and signed else 1
    integers, low, high = integers * factor, low * factor, high * factor
    if symmetric and not signed:
        integers = integers - _numbers(spec.broadcast(quantizer.zero_point, integers.ndim))
        zero_point = np.zeros_like(zero_point)
        low, high, signed = int(integers.min()), int(integers.max()), True
    width = next((w for w in WIDTHS if w >= narrowest and _holds(w, signed, low, high)), WIDTHS[-1] + 1)
    if width > widest:
        raise ModelError(
            f"the weight of {name} has {spec.bits} bits with zero points, and without these it needs more than "
            f"{widest}; quantize it with weights.symmetric = true, or export it with its zero points."
        )
    scale = (quantizer.scale / factor).detach().cpu().numpy()
    return StoredWeight(integers, zero_point, scale, spec.ch_axis, spec.bits, width, signed)


def _holds(width: int, signed: bool, low: int, high: int) -> bool:
    if signed:
        return low >= -(1 << (width - 1)) and high < 1 << (width - 1)
    return low >= 0 and high < 1 << width


def _numbers(tensor: Tensor) -> NDArray[np.int16]:
    return tensor.detach().cpu().numpy().astype(np.int16)
