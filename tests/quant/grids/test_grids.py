"""Grids of activations, against numpy in double precision that looks for the value each integer stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import ActivationFakeQuantize, Drop
from quiesce.quant.functional import fake_quantize
from quiesce.quant.grids import GRIDS
from quiesce.quant.grids.grid import Grid
from quiesce.quant.spec import QuantizationSpec

NAMES = list(GRIDS)
SKEWED = [name for name in NAMES if name != "uniform"]
names, bits = st.sampled_from(SKEWED), st.integers(2, 8)
values = arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(-3, 3, width=32))
scales = st.floats(1e-3, 2)


def levels(name: str, bits: int, zero_point: int) -> np.ndarray:
    """The values of all integers at a scale of 1."""
    codes = np.arange(2**bits)
    if name == "twin":
        signed = codes - 2 ** (bits - 1)
        return np.where(signed < 0, signed * 2.0**-zero_point, signed)
    return np.where(codes == 2**bits - 1, 0.0, 2.0 ** (-codes / {"log2": 1, "log-sqrt2": 2}[name]))


def reference(x: np.ndarray, scale: float, zero_point: int, spec: QuantizationSpec) -> np.ndarray:
    """The papers' formulas, one value after the other."""
    table = levels(spec.grid, spec.bits, zero_point) * scale
    half, largest = 2 ** (spec.bits - 1), 2**spec.bits - 1

    def code(value: float) -> int:
        if spec.grid == "twin":
            step = scale * 2.0**-zero_point if value < 0 else scale
            return int(np.clip(np.rint(value / step), -half, half - 1)) + half
        if value <= 0:
            return largest
        parts = {"log2": 1, "log-sqrt2": 2}[spec.grid]
        return int(np.clip(np.rint(-parts * np.log2(value / scale)), 0, largest))

    return np.array([table[code(float(v))] for v in x])


def far_from_ties(x: np.ndarray, scale: float, zero_point: int, spec: QuantizationSpec) -> np.ndarray:
    """Where a last-bit error of a logarithm or quotient changes no integer."""
    below, above = (reference(x * factor, scale, zero_point, spec) for factor in (1 - 1e-9, 1 + 1e-9))
    return below == above


def zero_of(spec: QuantizationSpec) -> int:
    return min(3, spec.quant_max) if spec.grid == "twin" else 0


@given(values, scales, names, bits)
def test_equals_the_formula_in_float64(x: Any, scale: float, name: str, bits: int) -> None:
    spec = QuantizationSpec(bits, grid=name)
    zero_point = zero_of(spec)
    clear = far_from_ties(x, scale, zero_point, spec)
    given = (torch.from_numpy(x), torch.tensor(scale).double(), torch.tensor(zero_point).double())
    expected = reference(x, given[1].item(), zero_point, spec)
    got = GRIDS[name].fake_quantize(*given, spec).numpy()
    np.testing.assert_allclose(got[clear], expected[clear], rtol=1e-14, atol=0)


@given(values, scales, names, bits)
def test_is_idempotent_monotone_and_keeps_zero(x: Any, scale: float, name: str, bits: int) -> None:
    spec = QuantizationSpec(bits, grid=name)
    parameters = (torch.tensor(scale).double(), torch.tensor(float(zero_of(spec))).double(), spec)
    ordered = torch.from_numpy(np.sort(np.append(x, 0.0)))
    got = GRIDS[name].fake_quantize(ordered, *parameters)
    assert torch.equal(GRIDS[name].fake_quantize(got, *parameters), got)
    assert (got.diff() >= 0).all() and (got[ordered == 0] == 0).all()
    assert len(got.unique()) <= 2**bits


@given(values, scales, names, bits)
def test_gradients_are_those_of_lsq(x: Any, scale: float, name: str, bits: int) -> None:
    """Straight through what is rounded; for the scale the residual there, and the grid's end beyond."""
    spec = QuantizationSpec(bits, grid=name)
    zero_point = zero_of(spec)
    grid, s = GRIDS[name], torch.tensor(scale).double().requires_grad_()
    values = torch.from_numpy(x).requires_grad_()
    got = grid.learned(values, s, float(zero_point), spec)
    weights = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    (got * weights).sum().backward()
    low, high = grid.inside(float(zero_point), spec)
    inside = (x / s.item() > low) & (x / s.item() < high)
    edges = np.isclose(x / s.item(), low) | np.isclose(x / s.item(), high)
    grad = values.grad.numpy()
    np.testing.assert_allclose(grad[~edges], np.where(inside, weights.numpy(), 0.0)[~edges])
    if not edges.any():
        residual = np.where(inside, got.detach().numpy() - x, got.detach().numpy()) / s.item()
        assert s.grad.item() == pytest.approx(float((weights.numpy() * residual).sum()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_is_one_case_of_the_common_form(name: str) -> None:
    """What the base class computes from ``round`` and ``inside`` is what a grid computes itself."""
    spec = QuantizationSpec(4, grid=name)
    x = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for learned in (GRIDS[name].learned, lambda *a: Grid.learned(GRIDS[name], *a)):
        scale, values = torch.tensor(0.21, dtype=torch.float64, requires_grad=True), x.clone().requires_grad_()
        out = learned(values, scale, 5.0, spec)
        out.square().sum().backward()
        results.append((out.detach(), values.grad, scale.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def probabilities() -> torch.Tensor:
    scores = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return torch.softmax(3 * scores, -1)


def after_gelu() -> torch.Tensor:
    return torch.nn.functional.gelu(1.5 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))


DATA: dict[str, Callable[[], torch.Tensor]] = {
    "uniform": after_gelu, "twin": after_gelu, "log2": probabilities, "log-sqrt2": probabilities
}  # fmt: skip


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_ranges(name: str, bits: int, power_of_two: bool) -> None:
    """The spanning grid clips nothing by more than half its last step; the search is as good at least."""
    x, spec, grid = DATA[name](), QuantizationSpec(bits, grid=name), GRIDS[name]
    spanned = grid.span(x.amin(), x.amax(), spec, power_of_two)
    searched = grid.search(x, x.amin(), x.amax(), spec, power_of_two)
    for scale, zero_point in (spanned, searched):
        assert scale.ndim == zero_point.ndim == 0 and scale > 0
        assert zero_point == zero_point.round() and 0 <= zero_point <= spec.quant_max
        assert not power_of_two or torch.frexp(scale).mantissa == 0.5
    low, high = grid.inside(float(spanned[1]), spec)
    assert x.amin() >= low * spanned[0] * 1.001 and x.amax() <= high * spanned[0] * 1.001

    def error(scale: torch.Tensor, zero_point: torch.Tensor) -> float:
        return float((x - grid.fake_quantize(x, scale, zero_point, spec)).abs().pow(2.4).mean())

    assert error(*searched) <= error(*spanned) * (1 + 1e-6)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (-2.0, 0.1), (-1e-30, 1e-30), (1e-45, 1e-44)])
@pytest.mark.parametrize("name", NAMES)
def test_ranges_without_one_side_give_finite_grids(name: str, ends: tuple[float, float]) -> None:
    low, high = (torch.tensor(end) for end in ends)
    x, spec = torch.linspace(*ends, 50), QuantizationSpec(4, grid=name)
    for scale, zero_point in (GRIDS[name].span(low, high, spec), GRIDS[name].search(x, low, high, spec)):
        assert torch.isfinite(scale) and scale > 0 and 0 <= zero_point <= spec.quant_max
        assert torch.isfinite(GRIDS[name].fake_quantize(x, scale, zero_point, spec)).all()


def test_twin_covers_a_longer_negative_side() -> None:
    scale, shift = GRIDS["twin"].span(torch.tensor(-4.0), torch.tensor(1.0), QuantizationSpec(4, grid="twin"))
    assert scale == 0.5 and shift == 0


def test_log2_keeps_small_probabilities_apart_where_equal_steps_do_not() -> None:
    x = torch.tensor([1.0, 0.5, 0.03, 0.008, 0.001])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    log = GRIDS["log2"].fake_quantize(x, one, zero, QuantizationSpec(4, grid="log2"))
    equal = fake_quantize(x, one / 15, zero, 0, 15)
    assert (log[2:] > 0).all() and (equal[2:] == 0).all()
    assert ((log / x).log2().abs() <= 0.5 + 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_learning_a_step_size_under_drop_lowers_the_error(name: str) -> None:
    """From a scale that clips much, with QDrop's drop at work."""
    x = DATA[name]()
    quantizer = ActivationFakeQuantize(QuantizationSpec(4, grid=name), x)
    scale, zero_point = GRIDS[name].span(x.amin(), x.amax(), quantizer.spec)
    quantizer.set_parameters(0.4 * scale, zero_point)
    before = float((quantizer(x) - x).square().mean())
    draws = Draws(1, torch.device("cpu"))
    quantizer.start_learning(True, Drop(0.5, draws))
    optimizer = torch.optim.Adam([quantizer.scale], lr=float(scale) * 0.02)
    for step in range(100):
        draws.begin(torch.tensor(step), torch.arange(len(x)))
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert torch.isfinite(quantizer.scale.grad) and quantizer.scale.grad != 0
        optimizer.step()
    quantizer.stop_learning()
    assert float((quantizer(x) - x).square().mean()) < before
