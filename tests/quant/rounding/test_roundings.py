from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from quiesce.quant.ranges import scale_and_zero_point
from quiesce.quant.rounding import ROUNDINGS
from quiesce.quant.rounding.adaround import AdaRound
from quiesce.quant.rounding.joint import JointRounding
from quiesce.quant.rounding.nearest import nearest
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import ROUNDING_NAMES

SPECS = [
    QuantizationSpec(bits, symmetric, ch_axis)
    for bits in (2, 4, 8)
    for symmetric in (False, True)
    for ch_axis in (0, None)
]
weights = arrays.arrays(np.float32, (4, 7), elements=st.floats(-8, 8, width=32))


def grid(weight: Tensor, spec: QuantizationSpec, clip: float = 0.7) -> tuple[Tensor, Tensor]:
    """A scale and zero point that clip the weight's outer values."""
    rows = weight.reshape(1, -1) if spec.ch_axis is None else weight
    scale, zero_point = scale_and_zero_point(rows.amin(1) * clip, rows.amax(1) * clip, spec)
    return (scale[0], zero_point[0]) if spec.ch_axis is None else (scale, zero_point)


def on_grid(integers: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (integers.float() - spec.broadcast(zero_point, 2)) * spec.broadcast(scale, 2)


def floors(weight: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.floor(weight / spec.broadcast(scale, 2)) + spec.broadcast(zero_point, 2)


def clipped(weight: Tensor, spec: QuantizationSpec, scale: Tensor, zero_point: Tensor) -> Tensor:
    low, high = (
        on_grid(torch.full((1, 1), float(q)), spec, scale, zero_point) for q in (spec.quant_min, spec.quant_max)
    )
    return torch.minimum(torch.maximum(weight, low), high)


def test_the_recipe_knows_the_same_roundings() -> None:
    assert set(ROUNDINGS) == set(ROUNDING_NAMES)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ROUNDINGS)
class TestContract:
    """What every learned rounding keeps."""

    def test_starts_close_to_the_weight_and_learns_by_gradient(self, name: str, spec: QuantizationSpec) -> None:
        weight = torch.randn(6, 10)
        scale, zero_point = grid(weight, spec)
        rounding = ROUNDINGS[name](weight, spec, scale, zero_point)
        soft = rounding()
        assert soft.shape == weight.shape and soft.dtype == weight.dtype
        assert ((soft - clipped(weight, spec, scale, zero_point)).abs() <= 0.51 * spec.broadcast(scale, 2)).all()
        penalty = rounding.regularizer(torch.tensor(4.0))
        assert penalty.shape == () and penalty.item() >= 0
        ((soft - weight).square().sum() + penalty).backward()
        gradients = [p.grad for p in rounding.parameters()]
        assert gradients and all(g is not None and torch.isfinite(g).all() and (g != 0).any() for g in gradients)

    def test_hardens_to_neighbouring_integers_of_the_grid(self, name: str, spec: QuantizationSpec) -> None:
        weight = torch.randn(6, 10)
        scale, zero_point = grid(weight, spec)
        rounding = ROUNDINGS[name](weight, spec, scale, zero_point)
        with torch.no_grad():
            rounding.V.add_(torch.randn_like(rounding.V))
        integers = rounding.harden()
        assert integers.dtype == spec.dtype and integers.shape == weight.shape and not integers.requires_grad
        floor = floors(weight, spec, scale, zero_point)
        neighbours = [(floor + up).clamp(spec.quant_min, spec.quant_max) for up in (0, 1)]
        assert ((integers == neighbours[0]) | (integers == neighbours[1])).all()

    def test_a_push_goes_to_the_nearer_decision_and_no_further(self, name: str, spec: QuantizationSpec) -> None:
        weight = torch.randn(6, 10)
        rounding = ROUNDINGS[name](weight, spec, *grid(weight, spec))
        with torch.no_grad():
            rounding.V.copy_(torch.linspace(-2.3, 2.3, 60).view(6, 10))
            rounding.V[0] = -50.0
            rounding.V[1] = 50.0
            rounding.V[2, 0] = 0.0
        before, decisions = rounding.V.detach().clone(), rounding.harden()
        expected = before.clone().double().requires_grad_()
        h = (1.2 * expected.sigmoid() - 0.1).clamp(0.0, 1.0)
        (gradient,) = torch.autograd.grad((1.0 - (2.0 * h - 1.0).square()).sum(), expected)
        rounding.push(torch.tensor(0.3))
        assert torch.allclose(rounding.V.double(), before.double() - 0.3 * gradient, atol=1e-6)
        assert torch.equal(rounding.V[:2], before[:2]) and rounding.V[2, 0] == 0
        assert torch.equal(rounding.harden(), decisions)
        moved = rounding.V - before
        assert (moved * before >= 0).all() and (moved[3:] != 0).all()

    def test_counts_what_is_further_than_a_tenth_from_a_decision(self, name: str, spec: QuantizationSpec) -> None:
        weight = torch.randn(6, 10)
        rounding = ROUNDINGS[name](weight, spec, *grid(weight, spec))
        h = torch.full((60,), 0.05)
        h[:20] = torch.linspace(0.11, 0.89, 20)
        h[20:40] = 0.95
        with torch.no_grad():
            rounding.V.copy_(torch.logit((h + 0.1) / 1.2).view(6, 10))
        assert rounding.undecided().item() == 20
        with torch.no_grad():
            rounding.V.mul_(100.0)
        assert rounding.undecided().item() == 0

    def test_a_warm_start_hardens_to_what_it_started_from(self, name: str, spec: QuantizationSpec) -> None:
        weight = torch.randn(6, 10)
        scale, zero_point = grid(weight, spec)
        floor = floors(weight, spec, scale, zero_point)
        start = (floor + torch.randint(2, weight.shape)).clamp(spec.quant_min, spec.quant_max).to(spec.dtype)
        rounding = ROUNDINGS[name](weight, spec, scale, zero_point, start)
        assert torch.equal(rounding.harden(), start)
        assert torch.equal(rounding.learned_scale(scale), scale)


class TestAdaRound:
    @given(weights, st.sampled_from(SPECS))
    def test_starts_at_the_clipped_float_weight(self, x: Any, spec: QuantizationSpec) -> None:
        weight = torch.from_numpy(x)
        scale, zero_point = grid(weight, spec)
        soft = AdaRound(weight, spec, scale, zero_point)().detach()
        error = (soft - clipped(weight, spec, scale, zero_point)).abs() / spec.broadcast(scale, 2)
        assert error.max() < 1e-4

    @given(weights, st.sampled_from(SPECS), st.integers(0, 2**32))
    def test_any_decisions_survive_a_warm_start(self, x: Any, spec: QuantizationSpec, seed: int) -> None:
        weight = torch.from_numpy(x)
        scale, zero_point = grid(weight, spec)
        up = torch.randint(2, weight.shape, generator=torch.Generator().manual_seed(seed))
        start = (floors(weight, spec, scale, zero_point) + up).clamp(spec.quant_min, spec.quant_max).to(spec.dtype)
        rounding = AdaRound(weight, spec, scale, zero_point, start)
        assert torch.equal(rounding.harden(), start)
        rounding().sum().backward()
        share = (weight / spec.broadcast(scale, 2)) % 1
        free = (start > spec.quant_min) & (start < spec.quant_max) & (share > 1e-3) & (share < 1 - 1e-3)
        assert (rounding.V.grad[free] != 0).all()

    @given(weights, st.sampled_from(SPECS))
    def test_hardened_at_once_it_is_nearest_rounding(self, x: Any, spec: QuantizationSpec) -> None:
        weight = torch.from_numpy(x)
        scale, zero_point = grid(weight, spec)
        share = (weight / spec.broadcast(scale, 2)) % 1
        clear = (share - 0.5).abs() > 1e-3
        hardened = AdaRound(weight, spec, scale, zero_point).harden()
        assert torch.equal(hardened[clear], nearest(weight, spec, scale, zero_point)[clear])

    @pytest.mark.parametrize("beta", [2.0, 8.0, 20.0])
    def test_the_regularizer_is_the_papers(self, beta: float) -> None:
        weight, spec = torch.randn(4, 9), QuantizationSpec(3, ch_axis=0)
        rounding = AdaRound(weight, spec, *grid(weight, spec))
        with torch.no_grad():
            rounding.V.copy_(torch.randn_like(rounding.V))
        rounding()
        h = np.clip(1.2 / (1 + np.exp(-rounding.V.detach().double().numpy())) - 0.1, 0, 1)
        expected = (1 - np.abs(2 * h - 1) ** beta).sum()
        assert rounding.regularizer(torch.tensor(beta)).item() == pytest.approx(expected, rel=1e-4)

    def test_the_regularizer_is_zero_once_all_is_decided(self) -> None:
        weight, spec = torch.randn(4, 9), QuantizationSpec(3, ch_axis=0)
        rounding = AdaRound(weight, spec, *grid(weight, spec))
        with torch.no_grad():
            rounding.V.copy_(torch.where(torch.rand_like(rounding.V) < 0.5, 4.0, -4.0))
        soft = rounding()
        assert rounding.regularizer(torch.tensor(20.0)).item() == 0
        assert rounding.regularizer(torch.tensor(2.0)).item() == 0
        torch.testing.assert_close(soft, on_grid(rounding.harden(), spec, *grid(weight, spec)))

    def test_the_gradient_reaches_every_weight_inside_the_range(self) -> None:
        weight, spec = torch.rand(4, 9) + 0.2, QuantizationSpec(8, ch_axis=0)
        rounding = AdaRound(weight, spec, *grid(weight, spec, clip=1.0))
        rounding().sum().backward()
        # dW̃/dV = s·1.2·σ(V)(1 − σ(V)) where nothing is clipped.
        sigmoid = torch.sigmoid(rounding.V.detach())
        expected = spec.broadcast(grid(weight, spec, clip=1.0)[0], 2) * 1.2 * sigmoid * (1 - sigmoid)
        inside = weight < weight.amax(1, keepdim=True) * 0.98
        torch.testing.assert_close(rounding.V.grad[inside], expected[inside])


class TestJoint:
    def rounding(self, spec: QuantizationSpec, start: Tensor | None = None) -> JointRounding:
        torch.manual_seed(0)
        weight = torch.randn(4, 9)
        return JointRounding(weight, spec, *grid(weight, spec), start)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_what_it_hardens_to_is_on_the_learned_grid(self, spec: QuantizationSpec) -> None:
        rounding = self.rounding(spec)
        scale, zero_point = grid(torch.manual_seed(0) and torch.randn(4, 9), spec)
        with torch.no_grad():
            rounding.V.copy_(torch.where(torch.rand_like(rounding.V) < 0.5, 9.0, -9.0))
            rounding.step_sizes.copy_(torch.randn_like(rounding.step_sizes))
        learned = rounding.learned_scale(scale)
        assert learned.shape == scale.shape and (learned != scale).all()
        torch.testing.assert_close(rounding(), on_grid(rounding.harden(), spec, learned, zero_point))

    def test_step_sizes_stay_within_a_factor(self) -> None:
        rounding, spec = self.rounding(SPECS[0]), SPECS[0]
        scale, _ = grid(torch.manual_seed(0) and torch.randn(4, 9), spec)
        for u, factor in ((-1e3, 0.5**0.5), (1e3, 2**0.5)):
            with torch.no_grad():
                rounding.step_sizes.fill_(u)
            torch.testing.assert_close(rounding.learned_scale(scale), scale * factor)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_the_gradient_is_that_of_finite_differences(self, spec: QuantizationSpec) -> None:
        rounding, target = self.rounding(spec).double(), torch.randn(4, 9).double()

        def loss(step_sizes: Tensor) -> Tensor:
            with torch.no_grad():
                rounding.step_sizes.copy_(step_sizes)
            return (rounding() - target).square().sum()

        loss(torch.full_like(rounding.step_sizes, 0.3)).backward()
        found = rounding.step_sizes.grad.flatten()
        for i in range(found.numel()):
            around = [torch.full_like(rounding.step_sizes.detach(), 0.3) for _ in range(2)]
            for moved, change in zip(around, (1e-6, -1e-6), strict=True):
                moved.view(-1)[i] += change
            expected = (loss(around[0]) - loss(around[1])).item() / 2e-6
            assert found[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)

    @given(weights, st.sampled_from(SPECS), st.integers(0, 2**32))
    def test_integers_found_on_another_scale_survive_a_warm_start(
        self, x: Any, spec: QuantizationSpec, seed: int
    ) -> None:
        weight = torch.from_numpy(x)
        scale, zero_point = grid(weight, spec)
        up = torch.randint(2, weight.shape, generator=torch.Generator().manual_seed(seed))
        start = (floors(weight, spec, scale, zero_point) + up).clamp(spec.quant_min, spec.quant_max).to(spec.dtype)
        rounding = JointRounding(weight, spec, scale * 1.3, zero_point, start)
        assert torch.equal(rounding.harden(), start)
        (rounding().square().sum()).backward()
        assert torch.isfinite(rounding.V.grad).all() and torch.isfinite(rounding.step_sizes.grad).all()


class TestNearest:
    @given(weights, st.sampled_from(SPECS))
    def test_no_integer_of_the_grid_is_closer(self, x: Any, spec: QuantizationSpec) -> None:
        weight = torch.from_numpy(x)
        scale, zero_point = grid(weight, spec)
        integers = nearest(weight, spec, scale, zero_point)
        assert integers.dtype == spec.dtype
        step = spec.broadcast(scale, 2)
        error = (on_grid(integers, spec, scale, zero_point) - weight).abs()
        for neighbour in (integers.int() - 1, integers.int() + 1):
            other = on_grid(neighbour.clamp(spec.quant_min, spec.quant_max), spec, scale, zero_point)
            assert (error <= (other - weight).abs() + 1e-4 * step).all()
