"""Fake-quantize maths: affine quantization by division and rounding half to even, as ONNX QuantizeLinear does it.

``q = clip(round(x / scale) + zero_point, quant_min, quant_max)`` and ``x̂ = (q − zero_point) · scale``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the integers of ``x`` as a float tensor of its shape; scale and zero point broadcast against ``x``."""
    return (torch.round(x / scale) + zero_point).clamp(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the real values ``(q − zero_point) · scale`` in the dtype of ``scale``."""
    return (q.to(scale.dtype) - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize ``x`` with one scale (0-dim) for the whole tensor, differentiably.

    Gradients are those of LSQ (arXiv 1902.08153, eq. 3): straight through the rounding for ``x`` inside the range,
    0 outside; for ``scale`` the rounding residual inside and the clipped integer outside.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        result: Tensor = _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
        return result
    return dequantize(quantize(x, scale, zero_point, quant_min, quant_max), scale, zero_point)


class _FakeQuantize(torch.autograd.Function):
    """One backward formula instead of the chain of divide, round, add, clip, subtract, multiply."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        steps = x / scale
        low, high = quant_min - zero_point, quant_max - zero_point
        rounded = torch.round(steps)
        clipped = torch.clamp(rounded, low, high)
        inside = rounded == clipped
        ctx.save_for_backward(steps, clipped, inside)
        ctx.scale = scale
        return clipped * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        steps, clipped, inside = ctx.saved_tensors
        grad_inside = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # Σ g·clipped − Σ g·1[inside]·x/s, without another full-size tensor.
            grad_scale = torch.dot(grad.flatten(), clipped.flatten()) - torch.dot(grad_inside.flatten(), steps.flatten())
        return grad_inside, grad_scale, None, None, None
