# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, import-not-found, import-untyped"
"""The maths of :mod:`quiesce.quant.kernels` as Triton kernels, for GPUs: each one pass over memory.

Random bytes are hashed where they are needed instead of being written and read. All tensors [...] are dense
(:func:`~quiesce.quant.kernels.is_dense`), and those of one call lie alike in memory. The module is only imported where
there is a GPU, or for Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements that one program works on: a multiple of 8, as a random word has 8 bytes."""
WEIGHT_BLOCK = 1024
"""The same for weights."""
# As in ``quiesce.quant.kernels``, which imports this module.
STRETCH, GAMMA = tl.constexpr(1.2), tl.constexpr(-0.1)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST, SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)


# ---- pieces --------------------------------------------------------------------------------------------------------


@triton.jit
def _mix64(x):
    """SplitMix64 of unsigned numbers."""
    x = (x ^ (x >> 30)) * tl.full([], FIRST, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], SECOND, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _dropped(keys, number, share, row, words):
    """Which of the 8 elements of each of ``words`` stay as they are: [words, 8]."""
    key = _mix64((tl.load(keys + row) + number).to(tl.uint64, bitcast=True))
    hashed = _mix64(key + words.to(tl.uint64) * tl.full([], GOLDEN, tl.uint64))
    shifts = (tl.arange(0, 8) * 8).to(tl.uint64)
    return ((hashed[:, None] >> shifts[None, :]) & 255).to(tl.float32) < share


@triton.jit
def _rounded(steps, low, high):
    """The nearest whole number, to even on ties, in [low, high]: adding 1.5 · 2^(mantissa) leaves no fraction."""
    if steps.dtype == tl.float64:
        shift = tl.full([], 6755399441055744.0, tl.float64)
    else:
        shift = tl.full([], 12582912.0, tl.float32)
    clipped = _clip(steps, low, high)
    return (clipped + shift) - shift


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def _divided(x, by):
    return x / by if x.dtype == tl.float64 else tl.div_rn(x, by)


@triton.jit
def _wide(x):
    """In the precision that is computed in."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _soft_rounding(share):
    return tl.minimum(tl.maximum(share * STRETCH + GAMMA, 0.0), 1.0)


@triton.jit
def _sigmoid(V):
    return 1.0 / (1.0 + tl.exp(-V))


@triton.jit
def _slope(share):
    """dh/dV, by σ(V)."""
    stretched = share * STRETCH + GAMMA
    return tl.where((stretched >= 0.0) & (stretched <= 1.0), share * (1.0 - share) * STRETCH, 0.0)


# ---- activations ---------------------------------------------------------------------------------------------------


@triton.jit
def _place(each, BLOCK: tl.constexpr):
    """The row and words of a program, the offsets of its elements [words, 8], and which of them exist."""
    row = tl.program_id(1)
    words = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    inside = words[:, None] * 8 + tl.arange(0, 8)[None, :]
    return row, words, row.to(tl.int64) * each + inside, inside < each


@triton.jit(do_not_specialize=["number"])
def _quantize_kernel(x, out, scale, numbers, keys, number, each, DROP: tl.constexpr, BLOCK: tl.constexpr):
    row, words, at, there = _place(each, BLOCK)
    low, high = _wide(tl.load(numbers)), _wide(tl.load(numbers + 1))
    first, last = _wide(tl.load(numbers + 2)), _wide(tl.load(numbers + 3))
    step = _wide(tl.load(scale))
    clipped = _clip(_wide(tl.load(x + at, mask=there, other=0.0)), first, last)
    made = _rounded(_divided(clipped, step), low, high) * step
    if DROP:
        share = tl.load(numbers + 4).to(tl.float32)
        made = tl.where(_dropped(keys, number, share, row, words), clipped, made)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["number"])
def _quantize_gradient_kernel(
    grad, x, to_x, to_scale, scale, numbers, keys, number, each, DROP: tl.constexpr, BLOCK: tl.constexpr
):
    row, words, at, there = _place(each, BLOCK)
    low, high = _wide(tl.load(numbers)), _wide(tl.load(numbers + 1))
    first, last = _wide(tl.load(numbers + 2)), _wide(tl.load(numbers + 3))
    value, back = _wide(tl.load(x + at, mask=there, other=0.0)), _wide(tl.load(grad + at, mask=there, other=0.0))
    steps = _divided(_clip(value, first, last), _wide(tl.load(scale)))
    rounded = _rounded(steps, low, high)
    # What rounds into the range; on ties at its two ends the gradient may be either.
    inside = (steps > low - 0.5) & (steps < high + 0.5)
    part = back * tl.where(inside, rounded - steps, rounded)
    passes = inside
    if DROP:
        dropped = _dropped(keys, number, tl.load(numbers + 4).to(tl.float32), row, words)
        part = tl.where(dropped, 0.0, part)
        passes = dropped | inside
    kept = tl.where(passes & (value > first) & (value < last), back, 0.0)
    tl.store(to_x + at, kept.to(to_x.dtype.element_ty), mask=there)
    tl.store(to_scale + row * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(part, 1), 0))


def fake_quantize(x: Tensor, scale: Tensor, numbers: Tensor, keys: Tensor | None, number: int) -> Tensor:
    """As :func:`quiesce.quant.kernels.fused_fake_quantize`; not differentiable."""
    out = torch.empty_like(x)
    grid, each = _grid(x, keys)
    _quantize_kernel[grid](x, out, scale, numbers, keys, number, each, DROP=keys is not None, BLOCK=BLOCK)
    return out


def fake_quantize_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, numbers: Tensor, keys: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients to ``x`` and to ``scale`` (0-dim)."""
    to_x = torch.empty_like(x)
    grid, each = _grid(x, keys)
    parts = torch.empty(grid, dtype=scale.dtype, device=x.device)
    _quantize_gradient_kernel[grid](
        grad, x, to_x, parts, scale, numbers, keys, number, each, DROP=keys is not None, BLOCK=BLOCK
    )
    return to_x, parts.sum()


@triton.jit(do_not_specialize=["number"])
def _mix_kernel(quantized, unquantized, out, share, keys, number, each, BLOCK: tl.constexpr):
    row, words, at, there = _place(each, BLOCK)
    dropped = _dropped(keys, number, tl.load(share).to(tl.float32), row, words)
    q, f = tl.load(quantized + at, mask=there), tl.load(unquantized + at, mask=there)
    tl.store(out + at, tl.where(dropped, f, q), mask=there)


def mixed(quantized: Tensor, unquantized: Tensor, share: Tensor, keys: Tensor, number: int) -> Tensor:
    """As :func:`quiesce.quant.kernels.mixed`."""
    out = torch.empty_like(quantized)
    grid, each = _grid(quantized, keys)
    _mix_kernel[grid](quantized, unquantized, out, share, keys, number, each, BLOCK=BLOCK)
    return out


@triton.jit
def _keys_kernel(key, step, images, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    golden = tl.full([], GOLDEN, tl.uint64)
    of_step = _mix64(tl.load(key).to(tl.uint64, bitcast=True) + tl.load(step).to(tl.uint64, bitcast=True) * golden)
    image = tl.load(images + at, mask=at < count, other=0).to(tl.uint64, bitcast=True)
    tl.store(out + at, _mix64(of_step + image * golden).to(tl.int64, bitcast=True), mask=at < count)


def image_keys(key: Tensor, step: Tensor, images: Tensor) -> Tensor:
    """Return mix64(mix64(key + step · φ) + images · φ): int64 [images], of int64 [], [] and [images]."""
    out = torch.empty_like(images)
    _keys_kernel[(triton.cdiv(len(images), 128),)](key, step, images, out, len(images), BLOCK=128)
    return out


def _grid(x: Tensor, keys: Tensor | None) -> tuple[tuple[int, int], int]:
    """Programs, a row for each key, and the elements of a row."""
    rows = 1 if keys is None else len(keys)
    each = x.numel() // rows
    return (triton.cdiv(each, BLOCK), rows), each


# ---- weights -------------------------------------------------------------------------------------------------------


def _weight_grid(V: Tensor) -> tuple[int]:
    return (triton.cdiv(V.numel(), WEIGHT_BLOCK),)


@triton.jit
def _soft_weight_kernel(V, base, zero_point, scale, ends, out, count, each, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    low, high = tl.load(ends), tl.load(ends + 1)
    row = at // each
    share = _soft_rounding(_sigmoid(tl.load(V + at, mask=there, other=0.0)))
    integers = tl.minimum(tl.maximum(tl.load(base + at, mask=there, other=0.0) + share, low), high)
    zero = tl.load(zero_point + row, mask=there, other=0.0)
    tl.store(out + at, (integers - zero) * tl.load(scale + row, mask=there, other=0.0), mask=there)


def soft_weight(V: Tensor, base: Tensor, zero_point: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """As :func:`quiesce.quant.kernels.soft_weight`; not differentiable."""
    out = torch.empty_like(V)
    count, each = V.numel(), V.numel() // scale.numel()
    _soft_weight_kernel[_weight_grid(V)](V, base, zero_point, scale, ends, out, count, each, BLOCK=WEIGHT_BLOCK)
    return out


@triton.jit
def _soft_weight_gradient_kernel(grad, V, base, scale, ends, out, count, each, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    share = _sigmoid(tl.load(V + at, mask=there, other=0.0))
    integers = tl.load(base + at, mask=there, other=0.0) + _soft_rounding(share)
    passes = (integers >= tl.load(ends)) & (integers <= tl.load(ends + 1))
    step = tl.load(scale + at // each, mask=there, other=0.0)
    back = tl.load(grad + at, mask=there, other=0.0) * step * _slope(share)
    tl.store(out + at, tl.where(passes, back, 0.0), mask=there)


def soft_weight_gradient(grad: Tensor, V: Tensor, base: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient to ``V``."""
    out = torch.empty_like(V)
    count, each = V.numel(), V.numel() // scale.numel()
    _soft_weight_gradient_kernel[_weight_grid(V)](grad, V, base, scale, ends, out, count, each, BLOCK=WEIGHT_BLOCK)
    return out


@triton.jit
def _penalty_kernel(V, grad, beta, weight, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    exponent = tl.load(beta)
    share = _sigmoid(tl.load(V + at, mask=there, other=0.0))
    distance = 2.0 * _soft_rounding(share) - 1.0
    power = tl.exp2((exponent - 1.0) * tl.log2(tl.maximum(tl.abs(distance), 1e-30)))  # 0 has no logarithm
    slope = tl.where(distance < 0.0, -power, power) * _slope(share)
    back = tl.load(grad + at, mask=there, other=0.0) - 2.0 * tl.load(weight) * exponent * slope
    tl.store(out + at, back, mask=there)


def penalty_gradient(V: Tensor, grad: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    """As :func:`quiesce.quant.kernels.penalty_gradient`, in the memory of ``grad``."""
    count = V.numel()
    _penalty_kernel[_weight_grid(V)](V, grad, beta, weight, grad, count, BLOCK=WEIGHT_BLOCK)
    return grad


# ---- loss ----------------------------------------------------------------------------------------------------------


@triton.jit
def _squares_kernel(student, teacher, parts, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    apart = _wide(tl.load(student + at, mask=there, other=0.0)) - _wide(tl.load(teacher + at, mask=there, other=0.0))
    tl.store(parts + tl.program_id(0), tl.sum(apart * apart, 0))


@triton.jit
def _squares_gradient_kernel(student, teacher, grad, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    apart = _wide(tl.load(student + at, mask=there, other=0.0)) - _wide(tl.load(teacher + at, mask=there, other=0.0))
    back = apart * (2.0 * _wide(tl.load(grad)))
    tl.store(out + at, back.to(out.dtype.element_ty), mask=there)


def squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Σ (student − teacher)² (0-dim); not differentiable."""
    count = student.numel()
    parts = torch.empty(triton.cdiv(count, BLOCK), dtype=teacher.dtype, device=student.device)
    _squares_kernel[(len(parts),)](student, teacher, parts, count, BLOCK=BLOCK)
    return parts.sum()


def squares_gradient(student: Tensor, teacher: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of :func:`squares` to ``student``, times ``grad`` (0-dim)."""
    out = torch.empty_like(student)
    count = student.numel()
    _squares_gradient_kernel[(triton.cdiv(count, BLOCK),)](student, teacher, grad, out, count, BLOCK=BLOCK)
    return out
