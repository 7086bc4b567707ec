"""Fake-quantize maths: affine quantization by division and rounding half to even, as ONNX QuantizeLinear does it.

``q = clip(round(x / scale) + zero_point, quant_min, quant_max)`` and ``x̂ = (q − zero_point) · scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quiesce.quant.kernels import in_memory_order, is_dense


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the integers of ``x`` as a float tensor of its shape; scale and zero point broadcast against ``x``."""
    return (torch.round(x / scale) + zero_point).clamp(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the real values ``(q − zero_point) · scale`` in the dtype of ``scale``."""
    return (q.to(scale.dtype) - zero_point) * scale


def round_bias(bias: Tensor, step: Tensor) -> Tensor:
    """Return ``bias`` rounded to multiples of ``step`` (which broadcasts against it), clipped to 32-bit multiples."""
    integers = torch.round(bias.double() / step.double()).clamp(-(2**31), 2**31 - 1)
    return (integers * step.double()).to(bias.dtype)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize ``x`` with one scale (0-dim) for the whole tensor, differentiably.

    Gradients are those of LSQ (arXiv 1902.08153, eq. 3): straight through the rounding for ``x`` inside the range,
    0 outside; for ``scale`` the rounding residual inside and the clipped integer outside.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        zero = float(zero_point)
        return learned_fake_quantize(x, scale, quant_min - zero, quant_max - zero)
    return dequantize(quantize(x, scale, zero_point, quant_min, quant_max), scale, zero_point)


def learned_fake_quantize(x: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """Return :func:`fake_quantize` of ``x`` on the grid ``scale · {low, …, high}``, the bounds less the zero point.

    For the optimization loop: the bounds are numbers, so that nothing is read back from the device.
    """
    # What rounds into the range; on ties at its two ends the gradient may be either.
    inside = (low - 0.5, high + 0.5)
    return learned_rounding(x, scale, lambda steps: torch.round(steps).clamp_(low, high), inside)


def learned_rounding(
    x: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor], inside: tuple[float, float]
) -> Tensor:
    """Return ``scale · rounding(x / scale)`` with LSQ's gradients (:func:`fake_quantize`).

    ``inside`` are the ends, in steps, of what is rounded; what lies beyond is clipped.
    """
    result: Tensor = _Rounded.apply(x, scale, rounding, inside)
    return result


class _Rounded(torch.autograd.Function):
    """One backward formula instead of the chain of divide, round, clip, multiply."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, rounding: Callable[[Tensor], Tensor], inside: tuple[float, float]
    ) -> Tensor:
        steps = x / scale
        rounded = rounding(steps)
        ctx.save_for_backward(steps, rounded)
        ctx.inside = inside
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        steps, rounded = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, steps, *ctx.inside)
        # Σ g·rounded − Σ g·1[inside]·x/s
        grad_scale = inner(grad, rounded) - inner(inside, steps) if ctx.needs_input_grad[1] else None
        return inside, grad_scale, None, None


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ a·b of two tensors of one shape, without a temporary when they lie alike in memory."""
    if a.stride() == b.stride() and is_dense(a):
        return torch.dot(in_memory_order(a), in_memory_order(b))
    return (a * b).sum()
