"""Elementwise maths of an optimization step, each as one pass over memory where a compiler is found.

On a CPU that is torch.compile's. A kernel takes flat tensors, so that it is compiled once and serves every layer:
:func:`in_memory_order` gives the flat view of a tensor without gaps. Numbers that change are tensors, as a number would
be compiled in. On a GPU it is Triton's (:mod:`quiesce.quant.gpu_kernels`). Eager, the same functions run operator by
operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1
"""Stretch of AdaRound's rectified sigmoid, so that h reaches 0 and 1 (arXiv 2004.10568, eq. 23)."""

NO_CLIP = (-math.inf, math.inf)
GOLDEN = -0x61C8864680B583EB
"""2^64 / φ as a signed number: what SplitMix64 steps by."""


@cache
def problem(device: torch.device) -> str | None:
    """Return why kernels can't be fused on ``device``, or None if they can: tries one."""
    numbers = torch.arange(4, device=device)
    key, step = numbers[1], numbers[2]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            same = all(
                torch.equal(make(fused=True), make(fused=False))
                for make in (partial(random_words, numbers, 8), partial(image_keys, key, step, numbers))
            )
    except Exception as error:  # whatever the compiler, or a missing one, raises
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None if same else "a compiled kernel gave other numbers than torch"


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _kernel(function: Callable[..., Any], fused: bool) -> Callable[..., Any]:
    return _compiled(function) if fused else function


def _gpu() -> ModuleType:
    from quiesce.quant import gpu_kernels

    return gpu_kernels


def is_dense(x: Tensor) -> bool:
    """Tell whether ``x`` lies in memory without gaps, row by row or with channels last."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def in_memory_order(x: Tensor) -> Tensor:
    """Return a tensor that :func:`is_dense` as a flat one in the same memory, without its gradient."""
    return _in_memory_of(x, x.numel())


def _in_memory_of(x: Tensor, *shape: int) -> Tensor:
    """No view, but a tensor of its own: torch.compile compiles again for views of other shapes."""
    strides = torch.empty(shape, device="meta").stride()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), x.storage_offset(), shape, strides)


def alike(x: Tensor, other: Tensor) -> Tensor:
    """Return ``x`` as it lies in memory where ``other``, of its shape, lies so too; else a copy that does."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


# ---- random numbers ----------------------------------------------------------------------------------------------


def mix64(x: Tensor) -> Tensor:
    """Return the SplitMix64 hash of each number of ``x`` (int64). A shift right keeps the sign, hence the masks."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


class Key(NamedTuple):
    """What the random bytes of one tensor are made from."""

    images: Tensor
    """A key [n] for each of its n parts: the rows of its images, or all of it."""
    number: int
    """Its own, a signed 64-bit number."""


def image_keys(key: Tensor, step: Tensor, images: Tensor, *, fused: bool) -> Tensor:
    """Return the keys of ``images`` (int64 [n]) in a step (0-dim), by the ``key`` of all (0-dim)."""
    if fused and key.is_cuda:
        keys: Tensor = _gpu().image_keys(key, step, images)
        return keys
    return mix64(mix64(key + step * GOLDEN) + images * GOLDEN)


def random_bytes(key: Key, count: int, *, fused: bool) -> Tensor:
    """Return ``count`` random bytes, as many for each of the key's parts: uint8 [count]."""
    each = count // len(key.images)
    words = random_words(key.images + key.number, -(-each // 8), fused=fused)
    return words.view(torch.uint8)[:, :each].reshape(-1)


def random_words(keys: Tensor, count: int, *, fused: bool) -> Tensor:
    """Return ``count`` random 64-bit numbers for each of ``keys`` (int64 [rows]): int64 [rows, count]."""
    index = torch.arange(count, device=keys.device)
    words: Tensor = _kernel(_random_words, fused and not keys.is_cuda)(keys, index)
    return words


def _random_words(keys: Tensor, index: Tensor) -> Tensor:
    return mix64(mix64(keys)[:, None] + index * GOLDEN)


# ---- activations -------------------------------------------------------------------------------------------------


def mixed(quantized: Tensor, unquantized: Tensor, key: Key, share: Tensor, *, fused: bool) -> Tensor:
    """Return ``unquantized`` where the random bytes of ``key`` are below ``share`` (0-dim), else ``quantized``.

    Not differentiable when ``fused``, which takes two tensors that lie alike in memory without gaps.
    """
    fused = fused and is_dense(quantized) and quantized.stride() == unquantized.stride()
    flat: Tensor
    if fused and quantized.is_cuda:
        flat = _gpu().mixed(quantized, unquantized, share, *key)
        return flat
    random = random_bytes(key, quantized.numel(), fused=fused)
    if fused:
        flat = _compiled(_mixed)(in_memory_order(quantized), in_memory_order(unquantized), random, share)
        return flat.as_strided(quantized.shape, quantized.stride())
    dropped = (random < share).to(quantized.dtype)
    strides = torch.empty_like(quantized, device="meta").stride()
    return torch.lerp(quantized, unquantized, dropped.as_strided(quantized.shape, strides))


def _mixed(quantized: Tensor, unquantized: Tensor, random: Tensor, share: Tensor) -> Tensor:
    return torch.where(random.to(quantized.dtype) < share, unquantized, quantized)


def fused_fake_quantize(x: Tensor, scale: Tensor, numbers: Tensor, key: Key | None) -> Tensor:
    """Return clip(x, c₀, c₁) fake-quantized with one scale (0-dim), or as it is where random bytes say so.

    Args:
        x: dense (:func:`is_dense`).
        scale: of the grid ``scale · {low, …, high}``; differentiated by as in LSQ (arXiv 1902.08153, eq. 3).
        numbers: ``[low, high, c₀, c₁, share]``: the grid's ends less the zero point, the clipping in front of it (±∞
            for none), and the number of 256 bytes that leave an element unquantized (QDrop).
        key: of the random bytes, or None for no drop.
    """
    result: Tensor
    if x.is_cuda:
        result = _GpuFakeQuantize.apply(x, scale, numbers, *(key or (None, 0)))
    else:
        random = None if key is None else random_bytes(key, x.numel(), fused=True)
        result = _FusedFakeQuantize.apply(x, scale, numbers, random)
    return result


class _GpuFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, numbers: Tensor, keys: Tensor | None, number: int) -> Tensor:
        ctx.save_for_backward(x, scale, numbers, keys)
        ctx.number = number
        return _gpu().fake_quantize(x, scale, numbers, keys, number)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, numbers, keys = ctx.saved_tensors
        grad = alike(grads[0], x)
        to_x, to_scale = _gpu().fake_quantize_gradients(grad, x, scale, numbers, keys, ctx.number)
        return to_x, to_scale, None, None, None


class _FusedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, numbers: Tensor, random: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, scale, numbers, random)
        made = _compiled(_quantized)(in_memory_order(x), scale, numbers, random)
        return made.as_strided(x.shape, x.stride())  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, numbers, random = ctx.saved_tensors
        flat = in_memory_order(alike(grads[0], x)), in_memory_order(x)
        to_x, to_scale = _compiled(_quantized_gradients)(*flat, scale, numbers, random)
        return to_x.as_strided(x.shape, x.stride()), to_scale, None, None


def _quantized(x: Tensor, scale: Tensor, numbers: Tensor, random: Tensor | None) -> Tensor:
    low, high, first, last, share = numbers.unbind()
    clipped = _clip(x, first, last)
    made = torch.round(clipped / scale).clamp(low, high) * scale
    return made if random is None else torch.where(random.to(x.dtype) < share, clipped, made)


def _quantized_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, numbers: Tensor, random: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, high, first, last, share = numbers.unbind()
    steps = _clip(x, first, last) / scale
    rounded = torch.round(steps).clamp(low, high)
    # What rounds into the range; on ties at its two ends the gradient may be either.
    passes = inside = (steps > low - 0.5) & (steps < high + 0.5)
    to_scale = grad * torch.where(inside, rounded - steps, rounded)
    if random is not None:
        dropped = random.to(x.dtype) < share
        passes, to_scale = dropped | inside, torch.where(dropped, 0.0, to_scale)
    return torch.where(passes & (x > first) & (x < last), grad, 0.0), to_scale.sum()


def _clip(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, first), last)


# ---- weights -----------------------------------------------------------------------------------------------------


def soft_weight(V: Tensor, base: Tensor, zero_point: Tensor, scale: Tensor, ends: Tensor, *, fused: bool) -> Tensor:
    """Return AdaRound's s·(clip(base + h(V), q_min, q_max) − z), differentiable by ``V`` (arXiv 2004.10568, eq. 22).

    ``base`` is ⌊W/s⌋ + z in the shape of ``V``; ``zero_point`` and ``scale`` broadcast against it; ``ends`` is
    [q_min, q_max]. ``fused`` takes a V that :func:`has_rows`.
    """
    if not fused:
        return _soft_weight(V, base, zero_point, scale, ends)
    result: Tensor = _FusedSoftWeight.apply(V, base, zero_point, scale, ends)
    return result


def has_rows(V: Tensor, scale: Tensor) -> bool:
    """Tell whether ``V`` is dense, with one scale for all of it or one for each entry of its first axis."""
    return is_dense(V) and scale.numel() == (scale.shape[0] if scale.ndim else 1)


class _FusedSoftWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, base: Tensor, zero_point: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(V, base, scale, ends)
        if V.is_cuda:
            return _gpu().soft_weight(V, alike(base, V), zero_point, scale, ends)  # type: ignore[no-any-return]
        rows = scale.numel()
        flat = _compiled(_soft_weight)(
            _rows(V, rows), _rows(base, rows), _rows(zero_point, rows), _rows(scale, rows), ends
        )
        return flat.as_strided(V.shape, V.stride())  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        V, base, scale, ends = ctx.saved_tensors
        if V.is_cuda:
            return (
                _gpu().soft_weight_gradient(alike(grads[0], V), V, alike(base, V), scale, ends),
                None,
                None,
                None,
                None,
            )
        rows = scale.numel()
        flat = _compiled(_soft_weight_gradient)(
            _rows(alike(grads[0], V), rows), _rows(V, rows), _rows(base, rows), _rows(scale, rows), ends
        )
        return flat.as_strided(V.shape, V.stride()), None, None, None, None


def _rows(x: Tensor, rows: int) -> Tensor:
    return _in_memory_of(x, rows, x.numel() // rows)


def soft_rounding(V: Tensor) -> Tensor:
    """Return h(V) = clip(1.2·σ(V) − 0.1, 0, 1), the share of a step that is added (AdaRound, eq. 23)."""
    return (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def _soft_weight(V: Tensor, base: Tensor, zero_point: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    low, high = ends.unbind()
    return (torch.clamp(base + soft_rounding(V), low, high) - zero_point) * scale


def _slope(V: Tensor) -> Tensor:
    """dh/dV."""
    share = torch.sigmoid(V)
    stretched = share * (ZETA - GAMMA) + GAMMA
    return torch.where((stretched >= 0.0) & (stretched <= 1.0), share * (1.0 - share) * (ZETA - GAMMA), 0.0)


def _soft_weight_gradient(grad: Tensor, V: Tensor, base: Tensor, scale: Tensor, ends: Tensor) -> Tensor:
    low, high = ends.unbind()
    integers = base + soft_rounding(V)
    return torch.where((integers >= low) & (integers <= high), grad * scale * _slope(V), 0.0)


def penalty_gradient(V: Tensor, grad: Tensor, beta: Tensor, weight: Tensor, *, fused: bool) -> Tensor:
    """Return ``grad`` plus the gradient by ``V`` of weight · Σ (1 − |2h(V) − 1|^β) (AdaRound, eq. 24)."""
    if not (fused and is_dense(V)):
        return _penalty_gradient(V, grad, beta, weight)
    if V.is_cuda:
        return _gpu().penalty_gradient(V, alike(grad, V), beta, weight)  # type: ignore[no-any-return]
    flat = _compiled(_penalty_gradient)(in_memory_order(V), in_memory_order(alike(grad, V)), beta, weight)
    return flat.as_strided(V.shape, V.stride())  # type: ignore[no-any-return]


def _penalty_gradient(V: Tensor, grad: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    distance = 2.0 * soft_rounding(V) - 1.0
    slope = distance.abs().pow(beta - 1.0) * distance.sign() * _slope(V)
    return grad - (2.0 * weight * beta) * slope


# ---- loss --------------------------------------------------------------------------------------------------------


def sum_of_squares(student: Tensor, teacher: Tensor, *, fused: bool) -> Tensor:
    """Return Σ (student − teacher)² (0-dim), differentiable by ``student``."""
    if fused and is_dense(student) and student.stride() == teacher.stride():
        result: Tensor = _FusedSumOfSquares.apply(student, teacher)
        return result
    return torch.nn.functional.mse_loss(student, teacher, reduction="sum")


class _FusedSumOfSquares(torch.autograd.Function):
    """Its gradient lies in memory as ``student`` does; that of torch's own loss, row by row, would be copied."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        if student.is_cuda:
            return _gpu().squares(student, teacher)  # type: ignore[no-any-return]
        return torch.nn.functional.mse_loss(student, teacher, reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        if student.is_cuda:
            return _gpu().squares_gradient(student, teacher, grads[0]), None
        flat = _compiled(_squares_gradient)(in_memory_order(student), in_memory_order(teacher), grads[0])
        return flat.as_strided(student.shape, student.stride()), None


def _squares_gradient(student: Tensor, teacher: Tensor, grad: Tensor) -> Tensor:
    return (student - teacher) * (2.0 * grad)
