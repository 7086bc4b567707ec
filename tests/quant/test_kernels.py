"""Compiled kernels against independent float64 formulas, and against the eager form of the same maths."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quiesce.quant import kernels

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(kernels.problem(CPU) is not None, reason=f"no compiler: {kernels.problem(CPU)}")
LAYOUTS = ("rows", "channels last")


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x.contiguous()


def splitmix64(value: int) -> int:
    """Steele et al., OOPSLA 2014, figure 16: the finalizer, on Python's whole numbers."""
    value &= 2**64 - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_the_hash_is_splitmix64() -> None:
    values = [0, 1, 2, 12345678901234567, -1, -(2**63), 2**63 - 1]
    hashed = kernels.mix64(torch.tensor(values)).tolist()
    assert [h % 2**64 for h in hashed] == [splitmix64(v) for v in values]


@pytest.mark.parametrize("rows, count", [(1, 1), (1, 7), (5, 1), (4, 300)])
def test_compiled_random_words_are_the_same_numbers(rows: int, count: int) -> None:
    keys = torch.arange(rows) * 977 - 3
    assert torch.equal(kernels.random_words(keys, count, fused=True), kernels.random_words(keys, count, fused=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_mixed_as_bytes_say(layout: str) -> None:
    q, f = (laid_out(torch.randn(3, 4, 5, 6), layout) for _ in range(2))
    key = kernels.Key(torch.arange(3), 5)
    random = kernels.random_bytes(key, q.numel(), fused=False)
    share = torch.tensor(90.0)
    fused = kernels.mixed(q, f, key, share, fused=True)
    assert torch.equal(fused, kernels.mixed(q, f, key, share, fused=False))
    assert fused.stride() == q.stride()
    assert (fused == f).float().mean() == pytest.approx((random < 90).float().mean())


@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (0.0, math.inf), (0.0, 0.9)])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_quantize_and_its_gradients_are_lsqs(layout: str, dropped: bool, clip: tuple[float, float]) -> None:
    """LSQ (arXiv 1902.08153, eq. 2-3) behind a clip, element by element in numpy's float64."""
    x = laid_out(torch.randn(4, 3, 6, 5), layout).requires_grad_()
    scale = torch.tensor(0.17, requires_grad=True)
    low, high, share = -3.0, 6.0, 100
    key = kernels.Key(torch.arange(4), 5) if dropped else None
    random = None if key is None else kernels.random_bytes(key, x.numel(), fused=False)
    numbers = torch.tensor([low, high, *clip, float(share)])
    grad = torch.randn_like(x)
    y = kernels.fused_fake_quantize(x, scale, numbers, key)
    y.backward(grad)

    values, s = in_memory(x).astype(np.float64), scale.item()
    clipped, g = np.clip(values, *clip), in_memory(grad).astype(np.float64)
    steps = clipped / s
    rounded = np.clip(np.round(steps), low, high)
    inside = (steps > low - 0.5) & (steps < high + 0.5)
    kept = np.zeros_like(inside) if random is None else random.numpy() < share
    open_ = (values > clip[0]) & (values < clip[1])
    assert np.allclose(in_memory(y), np.where(kept, clipped, rounded * s), atol=1e-6)
    assert np.allclose(in_memory(x.grad), g * ((kept | inside) & open_), atol=1e-6)
    expected = (g * np.where(kept, 0, np.where(inside, rounded - steps, rounded))).sum()
    assert scale.grad.item() == pytest.approx(expected, rel=1e-4)


def in_memory(x: Tensor) -> np.ndarray:
    return kernels.in_memory_order(x).numpy()


@pytest.mark.parametrize("shape, per_channel", [((6, 5), True), ((4, 3, 3, 3), True), ((4, 3, 3, 3), False)])
def test_soft_weights_are_the_same_compiled(shape: tuple[int, ...], per_channel: bool) -> None:
    channels = [shape[0] if per_channel else 1, *[1] * (len(shape) - 1)]
    layout = "channels last" if len(shape) == 4 else "rows"
    V, base = laid_out(3 * torch.randn(shape), layout), laid_out(torch.randint(-2, 5, shape).float(), layout)
    scale, zero_point, ends = torch.rand(channels) + 0.1, torch.full(channels, 1.0), torch.tensor([0.0, 3.0])
    grad, found = torch.randn(shape), {}
    for fused in (False, True):
        variable = V.clone().requires_grad_()
        assert kernels.has_rows(variable, scale)
        soft = kernels.soft_weight(variable, base, zero_point, scale, ends, fused=fused)
        soft.backward(grad)
        found[fused] = soft.detach(), variable.grad
    for eager, fused_result in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(fused_result, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_the_penaltys_gradient_is_that_of_its_formula(beta: float, fused: bool) -> None:
    """AdaRound, eq. 24, differentiated by torch in float64."""
    V, start = 2 * torch.randn(5, 40), torch.randn(5, 40)
    exact = V.double().requires_grad_()
    h = (torch.sigmoid(exact) * 1.2 - 0.1).clamp(0, 1)
    (0.3 * (1 - (2 * h - 1).abs().pow(beta)).sum()).backward()
    found = kernels.penalty_gradient(V, start, torch.tensor(beta), torch.tensor(0.3), fused=fused)
    torch.testing.assert_close(found, (start + exact.grad).float(), rtol=1e-4, atol=1e-5)


def test_a_kernel_is_compiled_once_for_all_shapes() -> None:
    from torch._dynamo.utils import counters

    numbers, scale = torch.tensor([0.0, 15.0, -math.inf, math.inf, 0.0]), torch.tensor(0.1)
    for shape in ((3, 5), (7, 11, 2, 3), (64, 33)):
        kernels.fused_fake_quantize(torch.randn(shape), scale, numbers, None)
    before = counters["stats"]["unique_graphs"]
    for shape in ((4, 4, 9), (17, 5), (2, 8, 16, 16)):
        kernels.fused_fake_quantize(torch.randn(shape), scale, numbers, None)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_loss_lies_as_what_it_is_of(layout: str) -> None:
    student, teacher = (laid_out(torch.randn(3, 4, 5, 6, dtype=torch.float64), layout) for _ in range(2))
    student.requires_grad_()
    loss = kernels.sum_of_squares(student, teacher, fused=True)
    (0.5 * loss).backward()
    difference = student.detach().numpy() - teacher.numpy()
    assert loss.item() == pytest.approx((difference**2).sum())
    assert student.grad is not None and student.grad.stride() == student.stride()
    np.testing.assert_allclose(student.grad.numpy(), difference)


def test_kernels_for_gpus_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name("test_gpu_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
