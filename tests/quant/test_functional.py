from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from quiesce.quant.functional import dequantize, fake_quantize, quantize
from quiesce.quant.spec import QuantizationSpec

SPECS = [QuantizationSpec(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
specs = st.sampled_from(SPECS)
values = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
scales = st.floats(1e-3, 20)


def reference(x: np.ndarray, scale: float, zero_point: int, spec: QuantizationSpec) -> tuple[np.ndarray, np.ndarray]:
    """ONNX QuantizeLinear and DequantizeLinear, as their specification words them: integers and real values."""
    integers = np.clip(np.rint(x / scale) + zero_point, spec.quant_min, spec.quant_max)
    return integers, (integers - zero_point) * scale


def zero_point_of(spec: QuantizationSpec, share: float) -> int:
    return 0 if spec.symmetric else round(spec.quant_max * share)


def far_from_ties(x: np.ndarray, scale: float) -> np.ndarray:
    """Rounding of x / scale that a last-bit error does not change."""
    return np.abs(x / scale % 1 - 0.5) > 1e-4


@given(values, scales, specs, st.floats(0, 1))
def test_equals_the_reference_exactly_in_float64(x: Any, scale: float, spec: QuantizationSpec, share: float) -> None:
    zero_point = zero_point_of(spec, share)
    integers, restored = reference(x, scale, zero_point, spec)
    arguments = (torch.from_numpy(x), torch.tensor(scale).double(), torch.tensor(zero_point).double())
    scale = arguments[1].item()
    integers, restored = reference(x, scale, zero_point, spec)
    got = quantize(*arguments, spec.quant_min, spec.quant_max)
    assert np.array_equal(got.numpy(), integers)
    assert np.array_equal(dequantize(got, *arguments[1:]).numpy(), restored)
    assert np.array_equal(fake_quantize(*arguments, spec.quant_min, spec.quant_max).numpy(), restored)


@given(values, scales, specs, st.floats(0, 1))
def test_equals_the_reference_in_float32(x: Any, scale: float, spec: QuantizationSpec, share: float) -> None:
    scale = float(np.float32(scale))
    clear = far_from_ties(x, scale)
    zero_point = zero_point_of(spec, share)
    integers, restored = reference(x, scale, zero_point, spec)
    arguments = (torch.from_numpy(x).float(), torch.tensor(scale), torch.tensor(float(zero_point)))
    got = quantize(*arguments, spec.quant_min, spec.quant_max).numpy()
    assert np.array_equal(got[clear], integers[clear])
    faked = fake_quantize(*arguments, spec.quant_min, spec.quant_max).numpy()
    np.testing.assert_allclose(faked[clear], restored[clear], rtol=1e-6)


def test_ties_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), -8, 7).tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_scales_of_channels_broadcast() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    scale, zero_point = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [1.0]])
    assert quantize(x, scale, zero_point, 0, 3).tolist() == [[1, 2], [3, 3]]


def plain_chain(x: Tensor, scale: Tensor, zero_point: float, spec: QuantizationSpec) -> Tensor:
    """Divide, round straight through, clip, multiply, with autograd's own gradients."""
    steps = x / scale
    rounded = steps + (steps.round() - steps).detach()
    low, high = (torch.tensor(q - zero_point, dtype=x.dtype) for q in (spec.quant_min, spec.quant_max))
    clipped = torch.where(rounded < low, low, torch.where(rounded > high, high, rounded))
    return clipped * scale


def gradients(function: Any, x: np.ndarray, scale: float, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf, step = torch.from_numpy(x).requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    output = function(leaf, step)
    (output * weight).sum().backward()
    assert leaf.grad is not None and step.grad is not None
    return output.detach(), leaf.grad, step.grad


@given(values, scales, specs, st.floats(0, 1))
def test_gradients_are_those_of_the_plain_chain(x: Any, scale: float, spec: QuantizationSpec, share: float) -> None:
    x = x[far_from_ties(x, scale)]
    zero_point = float(zero_point_of(spec, share))
    weight = torch.linspace(-1, 2, max(1, len(x)), dtype=torch.float64)[: len(x)]
    zero = torch.tensor(zero_point)
    got = gradients(lambda a, s: fake_quantize(a, s, zero, spec.quant_min, spec.quant_max), x, scale, weight)
    expected = gradients(lambda a, s: plain_chain(a, s, zero_point, spec), x, scale, weight)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_torchs_learnable_fake_quantize(spec: QuantizationSpec) -> None:
    x = torch.randn(500)
    zero_point = float(zero_point_of(spec, 0.4))
    weight = torch.randn(500)
    scale, theirs_scale = torch.tensor(0.11, requires_grad=True), torch.tensor([0.11], requires_grad=True)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = fake_quantize(ours_x, scale, torch.tensor(zero_point), spec.quant_min, spec.quant_max)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(
        theirs_x, theirs_scale, torch.tensor([zero_point]), spec.quant_min, spec.quant_max, 1.0
    )
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    torch.testing.assert_close(scale.grad, theirs_scale.grad[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded", "sliced"])
def test_gradients_do_not_depend_on_the_memory_layout(layout: str) -> None:
    base, weight = torch.randn(4, 6, 5, 3), torch.randn(4, 6, 5, 3)
    laid_out = {
        "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda t: t,
        "sliced": lambda t: torch.cat([t, t], 3)[..., :3],
    }[layout]
    found = []
    for x in (base, laid_out(base)):
        leaf, scale = x.detach().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        output = fake_quantize(leaf, scale, torch.tensor(3.0), 0, 15)
        grad = torch.tensor(2.0).expand(output.shape) if layout == "expanded" else weight
        output.backward(grad)
        found.append((output.detach(), leaf.grad, scale.grad))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-4)


def test_the_path_without_gradients_gives_the_same_values() -> None:
    x, scale, zero_point = torch.randn(300), torch.tensor(0.2), torch.tensor(3.0)
    plain = fake_quantize(x, scale, zero_point, 0, 15)
    assert not plain.requires_grad
    learned = fake_quantize(x, scale.clone().requires_grad_(), zero_point, 0, 15)
    assert learned.requires_grad and torch.equal(plain, learned.detach())
    with torch.no_grad():
        assert not fake_quantize(x, scale.clone().requires_grad_(), zero_point, 0, 15).requires_grad
