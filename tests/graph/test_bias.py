from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import quiesce
import tiny
from quiesce.data import Samples
from quiesce.graph.bias import input_quantizer, make_room_for_biases, round_biases
from quiesce.graph.capture import capture
from quiesce.graph.ops import WEIGHT_OPS, argument, is_weight_op, weight_node
from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, float_mode, snapshot
from quiesce.quant.functional import round_bias
from quiesce.recipe import Recipe
from small_nets import CASES, captured, conv, nearest, quantized

IMAGES = Samples((torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


def steps(gm: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Bias and s_x · s_w of each layer, s_w that of the weight in 8 bits, spread over groups by hand."""
    found = {}
    for node in gm.graph.nodes:
        if is_weight_op(node):
            bias, source = argument(node, WEIGHT_OPS[node.target].bias, "bias", None), input_quantizer(gm, node)
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and source is not None:
                values = getattr(gm, str(bias.target))
                weight = getattr(gm, str(weight_node(node).target))
                scale = weight.scale / (2 ** (8 - weight.spec.bits) if weight.spec.symmetric else 1)
                spread = torch.cat([scale] * (len(values) // len(scale))) if scale.ndim else scale
                found[node.name] = values, source.scale * spread
    return found


@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(2.0**-30, 10.0, width=32),
)
def test_a_bias_moves_by_half_a_step_at_most(value: float, step: float) -> None:
    bias = torch.tensor([value])
    rounded = round_bias(bias, torch.tensor([step]))
    integer = rounded.double() / step
    if abs(value / step) < 2**31:
        assert abs(rounded.item() - value) <= step / 2 + 1e-6 * abs(value)
        assert abs(integer.item() - round(integer.item())) <= 1e-6 * abs(integer.item()) + 1e-6
    else:
        assert abs(integer.item()) <= 2**31 * (1 + 1e-6)


def test_ties_go_to_even_and_large_biases_are_clipped() -> None:
    bias = torch.tensor([0.5, 1.5, -2.5, 1e12, -1e12])
    assert round_bias(bias, torch.tensor(1.0)).tolist() == [0, 2, -2, 2**31, -(2**31)]


@pytest.mark.parametrize("name", CASES)
def test_biases_of_all_layers_are_multiples_of_both_scales(name: str) -> None:
    check_grid(name, nearest(backend="onnxruntime", weight_bits=4, activation_bits=4))


@pytest.mark.parametrize("name", ["u-net", "transposed 2d grouped", "linear"])
def test_the_same_with_one_scale_a_weight(name: str) -> None:
    check_grid(name, nearest(backend="onnxruntime", weight_bits=4, activation_bits=4, weight_per_channel=False))


def check_grid(name: str, recipe: Recipe) -> None:
    case = CASES[name]
    gm = quantized(captured(name), case.samples(8), recipe)
    before, state = {n: b.clone() for n, (b, _) in steps(gm).items()}, snapshot(gm)
    rounded = round_biases(gm)
    for node, (bias, step) in steps(rounded).items():
        integers = bias.double() / step.double()
        torch.testing.assert_close(integers, integers.round(), rtol=1e-6, atol=1e-4)
        assert ((bias - before[node]).abs() <= step * 0.5001).all()
    assert all(torch.equal(b, before[n]) for n, (b, _) in steps(gm).items()), "the float biases are kept"
    assert all(torch.equal(t, state[n]) for n, t in snapshot(rounded).items())
    assert [n.name for n in rounded.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_something_is_rounded_in_most_networks() -> None:
    moved = 0
    for name in ("conv-bn", "u-net", "transposed 2d grouped", "linear", "linear-bn", "dense", "conv1d"):
        gm = quantized(captured(name), CASES[name].samples(8), nearest(backend="onnxruntime"))
        pairs = zip(steps(gm).values(), steps(round_biases(gm)).values(), strict=True)
        moved += any(not torch.equal(a, b) for (a, _), (b, _) in pairs)
    assert moved == 7


class TestAgainstIntegers:
    """The simulated network is what integer arithmetic gives."""

    def network(self) -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(conv(3, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 4)).eval()

    def test_layer_by_layer(self) -> None:
        recipe = nearest(backend="onnxruntime", weight_first_last_bits=3, activation_first_last_bits=4)
        net = self.network()
        gm = quantized(capture(net, IMAGES), IMAGES, recipe)
        found = [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]
        x, relu, *_ = (q for q in found if isinstance(q, ActivationFakeQuantize))
        conv_weight, linear_weight = (q for q in found if isinstance(q, WeightFakeQuantize))
        hidden = self.integer_layer(IMAGES.args[0], x, conv_weight, net[0].bias, nn.functional.conv2d, padding=1)
        pooled = nn.functional.max_pool2d(hidden.relu(), 2).flatten(1)
        expected = self.integer_layer(pooled, relu, linear_weight, net[4].bias, nn.functional.linear)
        got, plain = round_biases(gm)(*IMAGES.args)[0], gm(*IMAGES.args)[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert (plain - expected).abs().max() > 1e-3, "the float biases give the same; the test shows nothing"

    def integer_layer(self, x: Tensor, source: Any, weight: Any, bias: Tensor, op: Any, **settings: Any) -> Tensor:
        scale = source.scale.double()
        integers = (x.double() / source.scale).round() + source.zero_point
        integers = integers.clamp(source.spec.quant_min, source.spec.quant_max) - source.zero_point
        room = 2 ** (8 - weight.spec.bits)
        step = (source.scale * weight.scale).double() / room
        added = (bias.double() / step).round()
        filled = weight.quantized.double() * room
        assert filled.abs().max() <= 128
        summed = op(integers, filled, added, **settings)
        assert torch.equal(summed, summed.round()) and scale > 0
        return summed * step.view(-1, *[1] * (summed.ndim - 2))


class TestRoom:
    def calibrated(self, weight: float, bias: float, per_channel: bool = True) -> tuple[fx.GraphModule, nn.Module]:
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval()
        with torch.no_grad():
            net[0].weight[1] *= weight
            net[0].bias[1] = bias
        recipe = nearest(backend="onnxruntime", weight_per_channel=per_channel)
        return quantized(capture(net, IMAGES), IMAGES, recipe), net

    @pytest.mark.parametrize("weight", [1e-12, 1e-30, 0.0])
    def test_a_dead_channel_keeps_its_bias(self, weight: float) -> None:
        gm, net = self.calibrated(weight, 0.7)
        make_room_for_biases(gm)
        rounded = round_biases(gm)
        (bias, step), *_ = steps(rounded).values()
        torch.testing.assert_close(bias[1].item(), 0.7, rtol=1e-6, atol=0)
        assert (bias.abs() / step).max() <= 2**30
        torch.testing.assert_close(rounded(*IMAGES.args)[0], net(*IMAGES.args), rtol=0, atol=0.05)

    def test_without_room_it_would_not(self) -> None:
        gm, _ = self.calibrated(1e-12, 0.7)
        (bias, _), *_ = steps(round_biases(gm)).values()
        assert bias[1] < 0.1

    @pytest.mark.parametrize("per_channel", [True, False])
    def test_healthy_channels_are_left_alone(self, per_channel: bool) -> None:
        gm, _ = self.calibrated(1.0, 0.7, per_channel)
        before = snapshot(gm)
        make_room_for_biases(gm)
        assert all(torch.equal(t, before[n]) for n, t in snapshot(gm).items())

    def test_one_scale_for_a_weight_of_almost_nothing(self) -> None:
        gm, net = self.calibrated(1.0, 0.7, per_channel=False)
        layer = next(n for n in gm.graph.nodes if is_weight_op(n))
        weight, bias = weight_node(layer), layer.args[2]
        tiny_weight = getattr(gm, weight.args[0].target).mul_(1e-20)
        getattr(gm, weight.target).set_parameters(torch.tensor(1e-22), torch.tensor(0.0), tiny_weight)
        make_room_for_biases(gm)
        torch.testing.assert_close(getattr(round_biases(gm), bias.target), net[0].bias.detach(), rtol=1e-5, atol=1e-6)


class TestPipeline:
    def prepared(self, recipe: Recipe) -> Prepared:
        torch.manual_seed(0)
        return prepare(tiny.Chain(depth=2), tiny.images(), recipe, evaluate=tiny.images(8, seed=4))

    def test_float_biases_stay_for_the_teacher_and_for_further_runs(self) -> None:
        recipe = tiny.recipe(backend="onnxruntime")
        prepared = self.prepared(recipe)
        (one, *_), _ = run(prepared, recipe)
        with float_mode(prepared.graph):
            assert torch.equal(prepared.graph(tiny.images(8, seed=4))[0], prepared.reference[0])
        (again, *_), _ = run(prepared, recipe)
        assert one.sqnr_db == again.sqnr_db and one.final_loss == again.final_loss

    @pytest.mark.parametrize("preset", ["nearest", "qdrop-fast"])
    def test_what_is_measured_saved_and_loaded_has_integer_biases(self, preset: str, tmp_path: Path) -> None:
        recipe = tiny.recipe(preset, backend="onnxruntime")
        test = tiny.images(8, seed=4)
        quantized = quiesce.quantize(tiny.Chain(depth=2), tiny.images(), recipe, evaluate=test)
        for bias, step in steps(quantized.graph_module).values():
            integers = bias.double() / step.double()
            torch.testing.assert_close(integers, integers.round(), rtol=1e-6, atol=1e-4)
        quantized.save(tmp_path / "out")
        got = quantized(test)
        assert torch.equal(quiesce.load(tmp_path / "out")(test), got)
        with torch.no_grad():
            reference = tiny.Chain(depth=2)(test)
        sqnr = 10 * torch.log10(reference.square().sum() / (got - reference).square().sum())
        assert quantized.result.run.sqnr_db == pytest.approx(sqnr.item(), abs=1e-3)

    @pytest.mark.parametrize("backend", ["academic", "openvino"])
    def test_other_backends_keep_float_biases(self, backend: str) -> None:
        recipe = tiny.recipe("nearest", backend=backend)
        prepared = self.prepared(recipe)
        assert prepared.network(recipe) is prepared.graph
