from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.graph import calibrate as module
from quiesce.graph.calibrate import calibrate
from quiesce.graph.capture import capture
from quiesce.quant.fake_quantize import (
    ActivationFakeQuantize,
    WeightFakeQuantize,
    fake_quantizers,
    float_mode,
    snapshot,
)
from quiesce.quant.spec import QuantizationSpec
from quiesce.recipe import Recipe
from small_nets import CASES, captured, conv, nearest, placed, trained


@cache
def net() -> nn.Module:
    torch.manual_seed(3)
    layers = [conv(3, 4, padding=1), nn.ReLU(), conv(4, 4, padding=1), nn.ReLU(), conv(4, 2)]
    return trained(nn.Sequential(*layers))


@cache
def data() -> Samples:
    return Samples((torch.randn(37, 3, 8, 8, generator=torch.Generator().manual_seed(2)),))


@cache
def graph() -> fx.GraphModule:
    return capture(net(), data().select(slice(0, 2)))


def calibrated(recipe: Recipe, batch: int = 64) -> fx.GraphModule:
    return calibrate(placed(graph(), recipe), data(), recipe.with_settings(calibration_batch=batch))


@torch.no_grad()
def layer_inputs() -> list[np.ndarray]:
    """What the float network gives each layer, in float64 and flat."""
    x, found = data().args[0], []
    for layer in net():
        if isinstance(layer, nn.Conv2d):
            found.append(x.double().numpy().ravel())
        x = layer(x)
    return found


def quantizers(gm: fx.GraphModule, kind: type) -> list:
    by_name = fake_quantizers(gm)
    return [by_name[n.target] for n in gm.graph.nodes if n.target in by_name and isinstance(by_name[n.target], kind)]


def grid(low: float, high: float, spec: QuantizationSpec) -> tuple[float, float]:
    """Scale and zero point of a range, by the formulas."""
    low, high = min(low, 0), max(high, 0)
    if spec.symmetric:
        return max(low / spec.quant_min, high / spec.quant_max), 0
    scale = (high - low) / spec.quant_max
    return scale, float(-np.rint(low / scale))


def lp_grid(x: np.ndarray, spec: QuantizationSpec, low: float, high: float) -> tuple[float, float]:
    def error(shrink: float) -> float:
        scale, zero = grid(low * shrink, high * shrink, spec)
        restored = (np.clip(np.rint(x / scale) + zero, spec.quant_min, spec.quant_max) - zero) * scale
        return float((np.abs(x - restored) ** 2.4).mean())

    best = min(1 - np.arange(80) / 100, key=error)
    return grid(low * best, high * best, spec)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", ["minmax", "percentile", "lp"])
def test_activation_ranges_are_those_computed_by_hand(method: str, symmetric: bool) -> None:
    recipe = nearest(
        activation_bits=3, activation_range=method, activation_symmetric=symmetric, activation_percentile=95.0
    )
    found = quantizers(calibrated(recipe), ActivationFakeQuantize)
    for quantizer, x in zip(found, layer_inputs(), strict=True):
        low, high = x.min(), x.max()
        if method == "percentile":
            low, high = np.percentile(x, [2.5, 97.5], method="nearest")
        expected = (lp_grid if method == "lp" else lambda _, spec, a, b: grid(a, b, spec))(x, quantizer.spec, low, high)
        assert quantizer.scale.item() == pytest.approx(expected[0], rel=1e-4)
        assert quantizer.zero_point.item() == expected[1]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("method", ["minmax", "lp"])
def test_weight_ranges_are_those_computed_by_hand(method: str, per_channel: bool) -> None:
    recipe = nearest(weight_bits=3, weight_range=method, weight_per_channel=per_channel)
    found = quantizers(calibrated(recipe), WeightFakeQuantize)
    convs = [m for m in net() if isinstance(m, nn.Conv2d)]
    for quantizer, layer in zip(found, convs, strict=True):
        weight = layer.weight.detach().double().numpy()
        rows = weight.reshape(len(weight) if per_channel else 1, -1)
        search = lp_grid if method == "lp" else lambda _, spec, a, b: grid(a, b, spec)
        expected = [search(row, quantizer.spec, row.min(), row.max()) for row in rows]
        np.testing.assert_allclose(quantizer.scale.reshape(-1), [s for s, _ in expected], rtol=1e-4)
        assert quantizer.zero_point.reshape(-1).tolist() == [z for _, z in expected]
        scale, zero = quantizer.scale.reshape(-1, 1).double().numpy(), quantizer.zero_point.reshape(-1, 1).numpy()
        expected_integers = np.clip(np.rint(rows / scale) + zero, quantizer.spec.quant_min, quantizer.spec.quant_max)
        differing = (quantizer.quantized_weight().reshape(rows.shape).numpy() != expected_integers).mean()
        assert differing < 0.02, "more than ties are rounded otherwise"


@pytest.mark.parametrize("method", ["minmax", "percentile", "lp"])
@pytest.mark.parametrize(("weights", "activations"), [(True, False), (False, True)])
def test_scales_are_powers_of_two_where_asked(weights: bool, activations: bool, method: str) -> None:
    recipe = nearest(weight_bits=3, activation_bits=3, weight_range=method, activation_range=method)
    gm = calibrated(recipe.with_settings(weight_power_of_two=weights, activation_power_of_two=activations))
    for kind, wanted in ((WeightFakeQuantize, weights), (ActivationFakeQuantize, activations)):
        exponents = torch.cat([q.scale.reshape(-1) for q in quantizers(gm, kind)]).log2()
        assert bool((exponents == exponents.round()).all()) == wanted


def test_a_transposed_convolution_has_ranges_per_output_channel() -> None:
    recipe = nearest(weight_range="minmax")
    case = CASES["transposed 2d"]
    gm = calibrate(placed(captured("transposed 2d"), recipe), case.samples(4), recipe)
    (quantizer,) = quantizers(gm, WeightFakeQuantize)
    weight = next(b for n, b in gm.named_buffers() if b.shape == (4, 6, 3, 3) and b.dtype == torch.float32)
    low, high = weight.amin((0, 2, 3)).clamp(max=0), weight.amax((0, 2, 3)).clamp(min=0)
    torch.testing.assert_close(quantizer.scale, (high - low) / 255)


def same(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=0) for name in a)


@pytest.mark.parametrize("method", ["minmax", "percentile", "lp"])
def test_the_batch_size_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED_VALUES", 1500)  # fewer than the tensors hold
    recipe = nearest(activation_bits=4, activation_range=method, activation_percentile=90.0)
    whole = snapshot(calibrated(recipe))
    for batch in (1, 5, 36):
        # A convolution may differ in its last bits between batch sizes.
        assert same(whole, snapshot(calibrated(recipe, batch)), rtol=1e-6)


def test_the_sample_of_values_is_spread_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED_VALUES", 370)
    images = torch.rand(37, 3, 8, 8) + torch.arange(37.0).view(-1, 1, 1, 1)
    recipe = nearest(activation_range="percentile", activation_percentile=60.0)
    gm = calibrate(placed(graph(), recipe), Samples((images,)), recipe)
    first = quantizers(gm, ActivationFakeQuantize)[0]
    # The 80th percentile of 37 images whose values grow from 0 to 37.
    assert first.scale.item() * 255 == pytest.approx(0.8 * 37, rel=0.05)


def test_the_seed_draws_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLED_VALUES", 100)
    recipe = nearest(activation_range="percentile", activation_percentile=90.0)
    one, again = snapshot(calibrated(recipe)), snapshot(calibrated(recipe))
    other = snapshot(calibrated(recipe.with_settings(seed=1)))
    assert same(one, again, rtol=0) and not same(one, other, rtol=1e-6)


def test_activations_are_observed_in_the_float_network() -> None:
    """Two-bit weights would change every range behind them."""
    recipe = nearest(weight_bits=2, weight_first_last_bits=2, activation_range="minmax")
    found = quantizers(calibrated(recipe), ActivationFakeQuantize)
    for quantizer, x in zip(found, layer_inputs(), strict=True):
        assert quantizer.scale.item() == pytest.approx(
            (max(x.max(), 0) - min(x.min(), 0)) / quantizer.spec.quant_max, rel=1e-5
        )


def test_calibration_leaves_the_network_quantized_and_without_observers() -> None:
    gm = calibrated(nearest(weight_bits=4, activation_bits=4))
    found = fake_quantizers(gm).values()
    assert all(q.enabled and not q._forward_pre_hooks for q in found)
    (images,) = data().args
    quantized = gm(images)[0]
    with float_mode(gm):
        assert not torch.allclose(gm(images)[0], quantized, rtol=1e-3)


@pytest.mark.parametrize("method", ["minmax", "percentile", "lp"])
def test_constant_and_all_zero_tensors_are_kept(method: str) -> None:
    """Dead channels and blank images happen."""
    with torch.no_grad():
        dead = trained(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)))
        dead[0].weight.zero_()
        dead[0].bias.fill_(-1.0)
        dead[2].weight[0] = 0.5
    images = Samples((torch.zeros(4, 3, 8, 8),))
    recipe = nearest(weight_bits=4, activation_bits=4, weight_range=method, activation_range=method)
    gm = calibrate(placed(capture(dead, images), recipe), images, recipe)
    with torch.no_grad():
        torch.testing.assert_close(gm(*images.args)[0], dead(*images.args))


@pytest.mark.parametrize("method", ["minmax", "lp"])
def test_extremes_are_those_of_all_values_also_when_few_are_sampled(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLED_VALUES", 37)
    images = torch.rand(37, 3, 8, 8)
    images[20, 1, 2, 3] = 8.0
    recipe = nearest(activation_range=method, activation_bits=8)
    first = quantizers(calibrate(placed(graph(), recipe), Samples((images,)), recipe), ActivationFakeQuantize)[0]
    highest = first.scale.item() * 255
    if method == "minmax":
        assert highest == pytest.approx(8.0)
    else:
        # The search shrinks from the outlier on, down to 0.21 of it at most, and has no reason to stop before.
        shrinks = [8.0 * (1 - 0.01 * step) for step in range(80)]
        assert min(abs(highest - s) for s in shrinks) < 1e-4 and highest < 4.0
