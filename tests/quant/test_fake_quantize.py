from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from quiesce.errors import ModelError
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import (
    ActivationFakeQuantize,
    Drop,
    WeightFakeQuantize,
    fake_quantizers,
    float_mode,
    restore,
    snapshot,
)
from quiesce.quant.ranges import scale_and_zero_point
from quiesce.quant.spec import QuantizationSpec


def weight_quantizer(weight: Tensor, spec: QuantizationSpec) -> WeightFakeQuantize:
    quantizer = WeightFakeQuantize(spec, weight.shape, weight)
    rows = weight.reshape(1, -1) if spec.ch_axis is None else weight.movedim(spec.ch_axis, 0).flatten(1)
    scale, zero_point = scale_and_zero_point(rows.amin(1), rows.amax(1), spec)
    shape = quantizer.scale.shape
    quantizer.set_parameters(scale.view(shape), zero_point.view(shape), weight)
    return quantizer


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.of_weight = weight_quantizer(self.weight.detach(), QuantizationSpec(3, ch_axis=0))
        self.of_input = ActivationFakeQuantize(QuantizationSpec(4), torch.ones(()))
        self.of_input.set_parameters(torch.tensor(0.3), torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.of_input(x) @ self.of_weight(self.weight).T


class TestWeight:
    @pytest.mark.parametrize("ch_axis", [None, 0, 1])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_integers_and_scales_give_the_weight_back_to_half_a_step(
        self, ch_axis: int | None, symmetric: bool
    ) -> None:
        weight, spec = torch.randn(5, 4, 3, 3), QuantizationSpec(6, symmetric, ch_axis)
        quantizer = weight_quantizer(weight, spec)
        assert quantizer.scale.shape == (() if ch_axis is None else (weight.shape[ch_axis],))
        integers = quantizer.quantized_weight()
        assert integers.dtype == spec.dtype and integers.shape == weight.shape
        assert spec.quant_min <= int(integers.min()) and int(integers.max()) <= spec.quant_max
        step = spec.broadcast(quantizer.scale, 4)
        error = (quantizer(weight) - weight).abs() / step
        # Half a step for rounding, and half for the shift that makes zero a grid point at the range's end.
        assert error.max() <= (0.5 if symmetric else 1.0) + 1e-4
        torch.testing.assert_close(
            quantizer(weight), (integers.float() - spec.broadcast(quantizer.zero_point, 4)) * step, rtol=0, atol=0
        )

    def test_off_it_returns_the_weight_itself(self) -> None:
        weight = torch.randn(4, 3)
        quantizer = weight_quantizer(weight, QuantizationSpec(2, ch_axis=0))
        quantizer.enabled = False
        assert quantizer(weight) is weight

    def test_off_without_a_float_weight_is_refused(self) -> None:
        quantizer = weight_quantizer(torch.randn(4, 3), QuantizationSpec(2))
        assert quantizer().shape == (4, 3)
        quantizer.enabled = False
        with pytest.raises(ModelError, match="without float weights"):
            quantizer()

    def test_learned_rounding_goes_in_and_comes_out_as_integers(self) -> None:
        weight = torch.randn(4, 3)
        quantizer = weight_quantizer(weight, QuantizationSpec(3, ch_axis=0))
        before = quantizer.quantized_weight().clone()
        rounding = quantizer.start_rounding("adaround", weight, warm=False)
        soft = quantizer(weight)
        assert soft.requires_grad and not torch.equal(soft.detach(), quantizer.dequantized_weight())
        with torch.no_grad():
            rounding.V.fill_(9.0)
        quantizer.harden()
        assert quantizer.rounding is None
        after = quantizer.quantized_weight()
        assert after.dtype == torch.uint8 and bool((after >= before).all()) and bool((after > before).any())
        torch.testing.assert_close(quantizer(weight), quantizer.dequantized_weight(), rtol=0, atol=0)

    def test_hardening_without_a_learned_rounding_changes_nothing(self) -> None:
        quantizer = weight_quantizer(torch.randn(4, 3), QuantizationSpec(3))
        before = quantizer.quantized_weight().clone()
        quantizer.harden()
        assert torch.equal(quantizer.quantized_weight(), before)


class TestActivation:
    def test_on_and_off(self) -> None:
        quantizer, x = Holder().of_input, torch.randn(50)
        expected = ((x / 0.3).round() + 5).clamp(0, 15).sub(5) * torch.tensor(0.3)
        torch.testing.assert_close(quantizer(x), expected)
        quantizer.enabled = False
        assert quantizer(x) is x

    def test_learning_moves_the_scale_and_leaves_nothing_behind(self) -> None:
        quantizer, x = Holder().of_input, torch.randn(50)
        before = quantizer(x)
        quantizer.start_learning(learn_scale=True)
        learned = quantizer(x)
        torch.testing.assert_close(learned.detach(), before)
        learned.square().sum().backward()
        assert quantizer.scale.grad is not None and quantizer.scale.grad != 0
        quantizer.stop_learning()
        assert quantizer.scale.grad is None and not quantizer(x).requires_grad
        assert torch.equal(quantizer(x), before)

    def test_while_learning_elements_are_dropped(self) -> None:
        quantizer, x = Holder().of_input, torch.randn(4000)
        quantizer.start_learning(False, drop_of(0.25, 4000))
        kept_float = (quantizer(x) == x).float().mean().item()
        assert kept_float == pytest.approx(0.25, abs=0.03)
        quantizer.stop_learning()
        assert (quantizer(x) == x).float().mean().item() < 0.01


def drop_of(prob: float, images: int, seed: int = 1, step: int = 0) -> Drop:
    draws = Draws(seed, torch.device("cpu"))
    draws.begin(torch.tensor(step), torch.arange(images))
    return Drop(prob, draws)


class TestDrop:
    @pytest.mark.parametrize("prob", [0.0, 0.1, 0.5, 0.9])
    def test_takes_the_unquantized_value_with_the_given_probability(self, prob: float) -> None:
        mixed = drop_of(prob, 64).mix(0, torch.zeros(64, 501), torch.ones(64, 501))
        assert set(mixed.unique().tolist()) <= {0.0, 1.0}
        spread = 4 * math.sqrt(prob * (1 - prob) / mixed.numel())
        assert mixed.mean().item() == pytest.approx(prob, abs=spread + 1 / 512)

    def test_a_probability_close_to_one_drops_nearly_everything(self) -> None:
        mixed = drop_of(0.999, 50).mix(0, torch.zeros(50, 100), torch.ones(50, 100))
        assert mixed.mean().item() > 0.98

    def test_elements_tensors_and_steps_are_independent_and_repeatable(self) -> None:
        zeros, ones = torch.zeros(200, 100), torch.ones(200, 100)
        first = drop_of(0.5, 200).mix(0, zeros, ones)
        others = [
            drop_of(0.5, 200).mix(1, zeros, ones),
            drop_of(0.5, 200).mix(-1, zeros, ones),
            drop_of(0.5, 200, step=1).mix(0, zeros, ones),
            drop_of(0.5, 200, seed=2).mix(0, zeros, ones),
            *(first.roll(shift, axis) for shift, axis in ((1, 0), (1, 1), (4, 1), (8, 1))),
        ]
        for other in others:
            assert (first * other).mean().item() == pytest.approx(0.25, abs=0.02)
        assert torch.equal(drop_of(0.5, 200).mix(0, zeros, ones), first)

    @pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "sliced", "scalar"])
    def test_every_layout_keeps_values_at_their_places(self, layout: str) -> None:
        x = torch.randn(2, 3, 5, 7)
        x = {
            "contiguous": x,
            "channels last": x.contiguous(memory_format=torch.channels_last),
            "transposed": x.transpose(0, 3),
            "sliced": x[:, :, ::2],
            "scalar": torch.tensor(1.5),
        }[layout]
        mixed = drop_of(0.5, 2).mix(0, x, -x)
        assert mixed.shape == x.shape and torch.equal(mixed.abs(), x.abs())
        taken = (mixed == -x).float().mean().item()
        assert layout == "scalar" or 0.3 < taken < 0.7

    def test_gradients_go_to_the_value_taken(self) -> None:
        quantized, unquantized = torch.zeros(300, requires_grad=True), torch.ones(300, requires_grad=True)
        mixed = drop_of(0.3, 300).mix(0, quantized, unquantized)
        mixed.sum().backward()
        assert torch.equal(unquantized.grad, mixed.detach()) and torch.equal(quantized.grad, 1 - mixed.detach())


class TestStates:
    def test_quantizers_are_found_by_name(self) -> None:
        found = fake_quantizers(nn.Sequential(Holder(), nn.ReLU()))
        assert sorted(found) == ["0.of_input", "0.of_weight"]

    def test_snapshot_is_a_copy_that_restore_puts_back(self) -> None:
        holder, x = Holder(), torch.randn(6, 3)
        before, state = holder(x), snapshot(holder)
        holder.of_input.set_parameters(torch.tensor(0.7), torch.tensor(1.0))
        holder.of_weight.set_parameters(torch.full((4,), 0.9), torch.ones(4), torch.randn(4, 3))
        assert not torch.allclose(holder(x), before)
        restore(holder, state)
        assert torch.equal(holder(x), before)
        assert set(state) == {
            "of_input.scale", "of_input.zero_point", "of_weight.scale", "of_weight.zero_point", "of_weight.quantized",
        }  # fmt: skip

    def test_a_learned_scale_can_be_taken_and_restored(self) -> None:
        holder = Holder()
        holder.of_input.start_learning(learn_scale=True)
        state = snapshot(holder)
        with torch.no_grad():
            holder.of_input.scale.fill_(2.0)
        restore(holder, state)
        assert holder.of_input.scale.item() == pytest.approx(0.3) and not state["of_input.scale"].requires_grad

    def test_restore_takes_from_a_larger_state(self) -> None:
        holder = Holder()
        state = snapshot(holder) | {"elsewhere.scale": torch.ones(())}
        restore(holder, state)

    def test_float_mode_is_the_float_network(self) -> None:
        holder, x = Holder(), torch.randn(6, 3)
        quantized = holder(x)
        with float_mode(holder):
            torch.testing.assert_close(holder(x), x @ holder.weight.T)
        assert torch.equal(holder(x), quantized)

    def test_float_mode_leaves_what_was_off_and_survives_errors(self) -> None:
        holder = Holder()
        holder.of_input.enabled = False
        with pytest.raises(RuntimeError), float_mode(holder), float_mode(holder):
            raise RuntimeError
        assert holder.of_weight.enabled and not holder.of_input.enabled


def test_a_held_weight_is_given_up_when_grid_or_integers_change() -> None:
    """Whatever changes a quantizer must not leave the weight of before."""
    weight = torch.randn(4, 3)
    holder = Holder()
    quantizer = holder.of_weight
    state = snapshot(holder)

    def learn() -> None:
        quantizer.start_rounding("adaround", weight, warm=False)
        quantizer.harden()

    changes = (
        lambda: quantizer.set_parameters(2 * quantizer.scale, quantizer.zero_point, weight),
        lambda: restore(holder, state),
        learn,
    )
    for change in changes:
        quantizer.hold()
        assert quantizer() is quantizer.held
        change()
        assert quantizer.held is None
        assert torch.equal(quantizer(), quantizer.dequantized_weight())


def test_a_held_weight_is_not_used_while_rounding_is_learned_or_the_quantizer_is_off() -> None:
    holder = Holder()
    holder.of_weight.hold()
    with float_mode(holder):
        assert holder.of_weight(holder.weight) is holder.weight
    holder.of_weight.start_rounding("adaround", holder.weight.detach(), warm=False)
    assert holder.of_weight() is not holder.of_weight.held
