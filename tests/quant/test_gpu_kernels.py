"""Triton's kernels against the eager form of the same maths: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from quiesce.quant import kernels

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DTYPES = (torch.float32, torch.float64)
SHAPES = ((4, 3, 6, 5), (3, 8, 4, 4), (5, 7), (3, 16, 20, 10))
NUMBER = -77_777_777_777


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Dense and random, with channels last."""
    x = torch.randn(shape, dtype=dtype).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def flat(x: Tensor) -> Tensor:
    return kernels.in_memory_order(x)


@pytest.mark.parametrize("shared", [False, True, None])
@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 0.9)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(
    dtype: torch.dtype, shape: tuple[int, ...], clip: tuple[float, float], shared: bool | None
) -> None:
    """With draws that images have of their own, that all share, and without."""
    from quiesce.quant import gpu_kernels

    x, grad, scale = random(shape, dtype), random(shape, dtype), torch.tensor(0.17, dtype=dtype, device=DEVICE)
    keys = None if shared is None else torch.arange(1 if shared else shape[0], device=DEVICE) * 977 - 3
    numbers = torch.tensor([-5.0, 10.0, *clip, 128.0], dtype=dtype, device=DEVICE)
    drawn = None if keys is None else kernels.random_bytes(kernels.Key(keys, NUMBER), x.numel(), fused=False)
    made = gpu_kernels.fake_quantize(x, scale, numbers, keys, NUMBER)
    assert made.stride() == x.stride()
    assert torch.equal(flat(made), kernels._quantized(flat(x), scale, numbers, drawn))
    to_x, to_scale = gpu_kernels.fake_quantize_gradients(grad, x, scale, numbers, keys, NUMBER)
    expected = kernels._quantized_gradients(flat(grad), flat(x), scale, numbers, drawn)
    assert torch.equal(flat(to_x), expected[0])
    torch.testing.assert_close(to_scale, expected[1], rtol=1e-4, atol=1e-4)
    if keys is not None:
        mixed = gpu_kernels.mixed(x, grad, numbers[4], keys, NUMBER)
        assert drawn is not None
        assert torch.equal(flat(mixed), kernels._mixed(flat(x), flat(grad), drawn, numbers[4]))


@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (0.0, 6.0)])
def test_what_is_not_a_number_stays_none(clip: tuple[float, float]) -> None:
    from quiesce.quant import gpu_kernels

    x = torch.tensor([1.0, math.nan, -1.0], device=DEVICE)
    numbers = torch.tensor([-5.0, 10.0, *clip, 0.0], device=DEVICE)
    made = gpu_kernels.fake_quantize(x, torch.tensor(0.17, device=DEVICE), numbers, None, 0)
    assert made.isnan().tolist() == [False, True, False]
    assert gpu_kernels.squares(x, x.nan_to_num()).isnan()


@pytest.mark.parametrize(
    "shape, rows", [((6, 3, 3, 3), (6, 1, 1, 1)), ((5, 7), (5, 1)), ((5, 7), ()), ((40, 70), (40, 1))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype: torch.dtype, shape: tuple[int, ...], rows: tuple[int, ...]) -> None:
    from quiesce.quant import gpu_kernels

    V, grad = 3 * random(shape, dtype), random(shape, dtype)
    base = random(shape, dtype).round()
    scale = torch.rand(rows, dtype=dtype).to(DEVICE) + 0.1
    zero_point = torch.ones_like(scale)
    ends = torch.tensor([-2.0, 1.0], dtype=dtype, device=DEVICE)
    made = gpu_kernels.soft_weight(V, base, zero_point, scale, ends)
    torch.testing.assert_close(made, kernels._soft_weight(V, base, zero_point, scale, ends))
    back = gpu_kernels.soft_weight_gradient(grad, V, base, scale, ends)
    torch.testing.assert_close(back, kernels._soft_weight_gradient(grad, V, base, scale, ends))
    weight = torch.tensor(0.3, dtype=dtype, device=DEVICE)
    for beta in (2.0, 7.3, 20.0):
        exponent = torch.tensor(beta, dtype=dtype, device=DEVICE)
        found = gpu_kernels.penalty_gradient(V, grad.clone(), exponent, weight)
        torch.testing.assert_close(found, kernels._penalty_gradient(V, grad, exponent, weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from quiesce.quant import gpu_kernels

    student, teacher = random(shape, dtype), random(shape, dtype)
    grad = torch.tensor(0.7, dtype=dtype, device=DEVICE)
    torch.testing.assert_close(gpu_kernels.squares(student, teacher), (student - teacher).square().sum())
    back = gpu_kernels.squares_gradient(student, teacher, grad)
    assert back.stride() == student.stride()
    torch.testing.assert_close(back, 1.4 * (student - teacher))


def test_keys() -> None:
    from quiesce.quant import gpu_kernels

    key, step = (torch.tensor(value, device=DEVICE) for value in (-123_456_789_123, 7))
    images = torch.arange(200, device=DEVICE) * 3
    assert torch.equal(gpu_kernels.image_keys(key, step, images), kernels.image_keys(key, step, images, fused=False))
