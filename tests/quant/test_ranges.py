from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from quiesce.quant.functional import fake_quantize
from quiesce.quant.ranges import (
    find_range,
    lp_range,
    minmax_range,
    next_power_of_two,
    percentile_range,
    scale_and_zero_point,
)
from quiesce.quant.spec import QuantizationSpec

SPECS = [QuantizationSpec(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
specs = st.sampled_from(SPECS)
bounds = st.floats(-(2.0**60), 2.0**60, width=32)
rows = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.floats(-100, 100, width=32)
)


def restored(x: np.ndarray, low: float, high: float, spec: QuantizationSpec) -> np.ndarray:
    """Quantize and restore ``x`` on the grid over [low, high], in float64 and by the formulas of the paper."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        scale, zero_point = max(low / spec.quant_min, high / spec.quant_max), 0
    else:
        scale = (high - low) / spec.quant_max
        zero_point = -np.rint(low / scale) if scale else 0
    scale = scale or 1.0
    return (np.clip(np.rint(x / scale) + zero_point, spec.quant_min, spec.quant_max) - zero_point) * scale


def lp_error(x: np.ndarray, low: float, high: float, spec: QuantizationSpec) -> float:
    return float((np.abs(x - restored(x, low, high, spec)) ** 2.4).mean())


class TestScaleAndZeroPoint:
    @given(bounds, bounds, specs)
    @example(0.0, 0.0, QuantizationSpec(4))
    @example(0.0, 0.0, QuantizationSpec(4, symmetric=True))
    @example(5.0, 5.0, QuantizationSpec(2))
    @example(-3.0, -3.0, QuantizationSpec(8, symmetric=True))
    @example(1e-38, 2e-38, QuantizationSpec(8))
    def test_zero_is_on_the_grid_and_the_grid_spans_the_range(self, a: float, b: float, spec: QuantizationSpec) -> None:
        low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
        scale, zero_point = scale_and_zero_point(low, high, spec)
        assert scale.shape == zero_point.shape == (1,)
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert torch.equal(zero_point, zero_point.round())
        assert spec.quant_min <= zero_point.item() <= spec.quant_max
        if spec.symmetric:
            assert zero_point.item() == 0
        zero = fake_quantize(torch.zeros(1), scale[0], zero_point[0], spec.quant_min, spec.quant_max)
        assert zero.item() == 0
        # An asymmetric grid is shifted by up to half a step, as its zero point is a whole number.
        slack = (0 if spec.symmetric else 0.5) + 1e-4
        lowest, highest = ((q - zero_point.item()) * scale.item() for q in (spec.quant_min, spec.quant_max))
        assert lowest <= low.item() + slack * scale.item()
        assert highest >= high.item() - slack * scale.item()

    @given(bounds, bounds, specs)
    def test_the_grid_is_no_wider_than_needed(self, a: float, b: float, spec: QuantizationSpec) -> None:
        low, high = min(a, b, 0.0), max(a, b, 0.0)
        scale, _ = scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
        steps = max(-low / -spec.quant_min, high / spec.quant_max) if spec.symmetric else (high - low) / spec.quant_max
        if steps > 1e-30:
            assert scale.item() == pytest.approx(steps, rel=1e-5)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    @pytest.mark.parametrize("value", [0.0, 1.7, -0.3])
    def test_a_constant_tensor_is_restored(self, spec: QuantizationSpec, value: float) -> None:
        x = torch.full((5,), value)
        scale, zero_point = scale_and_zero_point(*minmax_range(x[None]), spec)
        got = fake_quantize(x, scale[0], zero_point[0], spec.quant_min, spec.quant_max)
        torch.testing.assert_close(got, x)


class TestPowersOfTwo:
    @given(bounds, bounds, specs)
    @example(0.0, 0.0, QuantizationSpec(4))
    @example(0.0, 2.0**-149, QuantizationSpec(8))
    @example(-(2.0**60), 2.0**60, QuantizationSpec(2, symmetric=True))
    @example(0.0, 3.0, QuantizationSpec(2))
    def test_the_scale_is_the_next_one_and_the_range_is_covered(
        self, a: float, b: float, spec: QuantizationSpec
    ) -> None:
        low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
        plain, _ = scale_and_zero_point(low, high, spec)
        scale, zero_point = scale_and_zero_point(low, high, spec, power_of_two=True)
        assert math.frexp(scale.item())[0] == 0.5, "the scale is no power of two"
        assert plain.item() <= scale.item() < 2 * plain.item()
        assert zero_point == zero_point.round() and spec.quant_min <= zero_point <= spec.quant_max
        slack = (0 if spec.symmetric else 0.5) + 1e-4
        lowest, highest = ((q - zero_point.item()) * scale.item() for q in (spec.quant_min, spec.quant_max))
        assert lowest <= low.item() + slack * scale.item()
        assert highest >= high.item() - slack * scale.item()

    @pytest.mark.parametrize("exponent", [-60, -3, 0, 1, 50])
    def test_a_power_of_two_is_itself(self, exponent: int) -> None:
        at, above = (
            torch.tensor([2.0**exponent]),
            torch.nextafter(torch.tensor([2.0**exponent]), torch.tensor(torch.inf)),
        )
        assert next_power_of_two(at).item() == 2.0**exponent
        assert next_power_of_two(above).item() == 2.0 ** (exponent + 1)
        assert next_power_of_two(above.double()).item() == 2.0 ** (exponent + 1)

    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_the_search_takes_the_best_power(self, spec: QuantizationSpec) -> None:
        """Against all powers of two, on rows with outliers, so that the widest range is not always the best."""
        x = np.random.default_rng(1).standard_t(3, size=(6, 300))
        rows = torch.from_numpy(x)
        low, high = lp_range(rows, spec, power_of_two=True)
        scale, zero_point = scale_and_zero_point(low, high, spec, power_of_two=True)
        widest, _ = scale_and_zero_point(*minmax_range(rows), spec, power_of_two=True)
        assert (torch.log2(scale) == torch.log2(scale).round()).all()
        for i, row in enumerate(rows):
            error = _power_error(row, scale[i], zero_point[i], spec)
            for factor in (1.0, 0.5):
                lo, hi = row.min() * factor, row.max() * factor
                one, zero = scale_and_zero_point(lo[None], hi[None], spec, power_of_two=True)
                assert error <= _power_error(row, one[0], zero[0], spec) * (1 + 1e-9)
        assert spec.bits > 4 or (scale < widest).any(), "nothing was clipped, so the search is not tested"


def _power_error(row: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantizationSpec) -> float:
    got = fake_quantize(row, scale, zero_point, spec.quant_min, spec.quant_max)
    return float((row - got).abs().pow(2.4).mean())


class TestMinmax:
    def test_every_row_has_its_own(self) -> None:
        low, high = minmax_range(torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 4.0]]))
        assert (low.tolist(), high.tolist()) == ([-2.0, 3.0], [1.0, 4.0])


class TestPercentile:
    @given(rows, st.floats(50, 100, exclude_min=True))
    def test_lies_where_numpy_puts_it(self, x: Any, percentile: float) -> None:
        low, high = percentile_range(torch.from_numpy(x), percentile)
        tail = (100 - percentile) / 2
        below, above = (np.percentile(x, [tail, 100 - tail], axis=1, method=m) for m in ("lower", "higher"))
        slack = np.abs(x).max() * 1e-6  # numpy's positions and ours may differ in the last bit
        assert (low.numpy() >= below[0] - slack).all() and (low.numpy() <= above[0] + slack).all()
        assert (high.numpy() >= below[1] - slack).all() and (high.numpy() <= above[1] + slack).all()

    def test_is_numpys_nearest_value(self) -> None:
        x = np.random.default_rng(0).normal(size=(3, 4567)).astype(np.float32)
        low, high = percentile_range(torch.from_numpy(x), 99.0)
        expected = np.percentile(x, [0.5, 99.5], axis=1, method="nearest")
        assert np.array_equal(low.numpy(), expected[0]) and np.array_equal(high.numpy(), expected[1])

    @given(rows)
    def test_a_hundred_per_cent_is_minmax(self, x: Any) -> None:
        whole = minmax_range(torch.from_numpy(x))
        for ours, theirs in zip(percentile_range(torch.from_numpy(x), 100.0), whole, strict=True):
            assert torch.equal(ours, theirs)


class TestLp:
    @given(rows, specs)
    def test_is_never_worse_than_minmax(self, x: Any, spec: QuantizationSpec) -> None:
        low, high = (bound.tolist() for bound in lp_range(torch.from_numpy(x), spec))
        for row, a, b in zip(x.astype(np.float64), low, high, strict=True):
            minmax = lp_error(row, row.min(), row.max(), spec)
            assert lp_error(row, a, b, spec) <= minmax * (1 + 1e-3) + 1e-6

    @pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[5], SPECS[8]], ids=str)
    def test_is_the_best_of_eighty_shrunk_ranges(self, spec: QuantizationSpec) -> None:
        x = np.random.default_rng(1).standard_t(3, size=(4, 300))
        low, high = lp_range(torch.from_numpy(x), spec)
        for row, a, b in zip(x, low.tolist(), high.tolist(), strict=True):
            errors = {s: lp_error(row, row.min() * s, row.max() * s, spec) for s in 1 - np.arange(80) / 100}
            best = min(errors, key=errors.__getitem__)
            assert (a, b) == pytest.approx((row.min() * best, row.max() * best))
        assert bool((high < torch.from_numpy(x).amax(1)).any()), "no row was clipped, so the search is not tested"

    def test_the_widest_of_equally_good_ranges_is_taken(self) -> None:
        x = torch.zeros(1, 5)
        assert [b.item() for b in lp_range(x, QuantizationSpec(4), torch.tensor([-1.0]), torch.tensor([1.0]))] == [
            -1,
            1,
        ]

    def test_rows_are_independent(self) -> None:
        x, spec = torch.randn(6, 50), QuantizationSpec(3)
        together = lp_range(x, spec)
        alone = [lp_range(row[None], spec) for row in x]
        for i, bound in enumerate(together):
            torch.testing.assert_close(bound, torch.cat([a[i] for a in alone]))


def test_find_range_goes_by_name() -> None:
    x, spec = torch.randn(2, 2000), QuantizationSpec(3)
    for method, expected in (
        ("minmax", minmax_range(x)),
        ("percentile", percentile_range(x, 90.0)),
        ("lp", lp_range(x, spec)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(find_range(x, spec, method, 90.0), expected, strict=True))
