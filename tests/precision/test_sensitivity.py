from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quiesce import Recipe, measure_sensitivity
from quiesce.data import Samples
from quiesce.errors import DataError, ModelError, RecipeError
from quiesce.graph.place import layers_at_common_bits
from quiesce.precision.sensitivity import Sensitivity, layer_sensitivities, multiplications
from quiesce.preparation import inputs_of, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import fake_quantizers, snapshot
from quiesce.reconstruct.streams import Network
from small_nets import CASES, captured, nearest, placed
from tiny import Assorted, Chain, TiedPair, images, recipe, same_state

LAYERS = ("0", "2", "5")


def plain() -> nn.Sequential:
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*layers).double().eval()


X = images(40).double()
FIRST, HELD = X[:30], X[30:]


def rounded(x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], bits: int) -> Tensor:
    """Numpy's own asymmetric quantization of the range [low, high]."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**bits - 1)
    zero = np.clip(-np.round(low / scale), 0, 2**bits - 1)
    return torch.from_numpy((np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale)


def reference(name: str, weight_bits: int | None, input_bits: int | None) -> float:
    """The error of the whole network with one layer's weight and input quantized by numpy."""
    net = plain()
    layer = net[int(name)]
    with torch.no_grad():
        expected = net(HELD)
        seen: list[NDArray[np.float64]] = []
        handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
        net(FIRST)
        handle.remove()
        if input_bits is not None:
            low, high = seen[0].min(), seen[0].max()
            layer.register_forward_pre_hook(lambda _, args: rounded(args[0].numpy(), low, high, input_bits))
        if weight_bits is not None:
            weight = layer.weight.numpy()
            axes = tuple(range(1, weight.ndim))
            ends = (f(weight, axis=axes, keepdims=True) for f in (np.min, np.max))
            layer.weight.copy_(rounded(weight, *ends, weight_bits))
        got = net(HELD)
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


@pytest.fixture(scope="module")
def found() -> Sensitivity:
    return measure_sensitivity(plain(), X, recipe("qdrop", weight_bits=3), bits=(2, 3, 5))


@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_those_of_a_network_with_one_layer_quantized_by_numpy(found: Sensitivity, name: str) -> None:
    row = next(row for row in found.layers if row.layer == name)
    own, inputs = (3, 4) if name == "2" else (8, 8)
    assert (row.weight_bits, row.input_bits) == (own, inputs)
    assert list(row.weight_errors) == sorted({2, 3, 5, own})
    for bits, error in row.weight_errors.items():
        assert error == pytest.approx(reference(name, bits, None), rel=1e-9)
    assert row.input_error == pytest.approx(reference(name, None, inputs), rel=1e-9)
    assert row.error == pytest.approx(reference(name, own, inputs), rel=1e-9)
    assert row.sqnr_db == pytest.approx(-10 * np.log10(row.error))


def test_ranges_come_from_other_images_than_errors(found: Sensitivity) -> None:
    assert (found.calibration_images, found.images) == (30, 10)
    other = measure_sensitivity(plain(), torch.cat([FIRST, 3 * HELD]), recipe("qdrop", weight_bits=3), bits=(2, 3, 5))
    assert [row.weight_errors for row in other.layers] != [row.weight_errors for row in found.layers]
    assert [row.weight_bits for row in other.layers] == [8, 3, 8]


def test_layers_are_ranked_and_written_as_json(found: Sensitivity) -> None:
    errors = [row.error for row in found.ranked]
    assert errors == sorted(errors, reverse=True) and [row.layer for row in found.layers] == list(LAYERS)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["layers"][1]["weight_errors"]["3"] == found.layers[1].weight_errors[3]
    assert data["layers"][1]["sqnr_db"] == found.layers[1].sqnr_db and data["images"] == 10


def test_the_calibration_batch_changes_no_number(found: Sensitivity) -> None:
    small = replace(recipe("qdrop", weight_bits=3), calibration_batch=3)
    again = measure_sensitivity(plain(), X, small, bits=(2, 3, 5))
    for row, other in zip(again.layers, found.layers, strict=True):
        assert row.error == pytest.approx(other.error, rel=1e-9)


def test_a_trial_runs_from_its_layer_on() -> None:
    """Eight equal blocks: half a pass a trial, and the network that is measured is left as it was."""
    deep = measure_sensitivity(Chain(8), images(16), recipe("nearest"), bits=())
    trials = 3 * len(deep.layers)  # weight, input, both
    assert 0.45 * trials < deep.passes < 0.6 * trials


def test_nothing_is_changed_and_progress_comes_to_its_end() -> None:
    prepared = prepare(Chain(2), images(16), recipe("nearest"))
    before, calls = snapshot(prepared.graph), list[tuple[str, int, int]]()
    progress = Progress(lambda *a: calls.append(a))
    held = inputs_of(Network(prepared.graph), Samples((images(8, seed=4),)))
    layer_sensitivities(prepared.graph, held, recipe("nearest"), (2, 4), progress)
    assert same_state(snapshot(prepared.graph), before)
    assert all(q.enabled and q.spec.bits in (2, 4, 8) for q in fake_quantizers(prepared.graph).values())
    assert [q.spec.bits for n, q in fake_quantizers(prepared.graph).items() if "conv1_weight" in n] == [2, 2]
    assert calls[-1][1] == calls[-1][2] == 2 * (3 + 2) + 4 * (2 + 2)
    assert {stage for stage, _, _ in calls} >= {"stem", "blocks.1.conv2", "head"}


def test_float_layers_are_not_measured_but_told() -> None:
    found = measure_sensitivity(Assorted(), images(16), recipe("nearest", leave_float="type:Squeeze"), bits=())
    assert [row.layer for row in found.layers] == [
        *("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.2.conv1", "blocks.2.conv2", "make", "head"),
    ]
    assert list(found.float_layers)[-1] == "conv2d_9" and len(found.float_layers) == 5


def test_layers_that_share_a_weight_are_one() -> None:
    settings = recipe("nearest", activation_bits=4)
    found = measure_sensitivity(TiedPair(), images(16), settings, bits=(3,))
    assert [(row.layer, row.shared_with) for row in found.layers] == [
        ("stem", ()),
        ("first", ("second",)),
        ("third", ()),
        ("head", ()),
    ]
    tied = found.layers[1]
    assert (tied.weights, tied.macs, tied.input_bits) == (6 * 6 * 9, 2 * 6 * 6 * 9 * 64, 4)
    graph = prepare(TiedPair(), images(12), settings).graph
    assert layers_at_common_bits(graph, settings) == ["first", "second", "third"]
    fixed = settings.with_settings(layers=[{"pattern": "second", "weight_bits": 5}])
    assert layers_at_common_bits(graph, fixed) == ["third"]


def test_frames_of_a_clip_stay_together() -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame, self.middle, self.clip = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            frames = self.middle(self.frame(x).mean((2, 3)).relu())
            clips = frames.view(-1, 4, 4).mean(1, keepdim=True).expand(-1, 4, 4).reshape(-1, 4)
            return self.clip(clips + frames)

    found = measure_sensitivity(Clips().eval(), images(16), recipe("nearest"), bits=())
    assert (found.images, [row.macs for row in found.layers]) == (4, [4 * 27 * 36, 16, 8])
    with pytest.raises(DataError, match="4 images together; give a multiple of 4"):
        measure_sensitivity(Clips().eval(), images(20), recipe("nearest"), bits=())


def test_float_activations_leave_the_weight_alone() -> None:
    found = measure_sensitivity(Chain(1), images(16), recipe("nearest", activation_bits=None), bits=(8,))
    for row in found.layers:
        assert row.input_bits is None and row.input_error == 0 and row.error == row.weight_errors[row.weight_bits]


@pytest.mark.parametrize("bits", [(1,), (9,), (4.0,), ("4",)])
def test_bits_are_2_to_8(bits: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match=r"the number of bits is .*; give a whole number from 2 to 8"):
        measure_sensitivity(Chain(1), images(16), recipe("nearest"), bits=bits)


@pytest.mark.parametrize(("count", "holdout"), [(1, 0.25), (16, 0.0), (16, 1.0), (16, -0.5), (16, 0.001)])
def test_images_must_be_left_on_both_sides(count: int, holdout: float) -> None:
    with pytest.raises(DataError, match="can't be held out and leave others"):
        measure_sensitivity(Chain(1), images(count), recipe("nearest"), holdout=holdout)


def test_infinite_outputs_name_the_layer() -> None:
    class Log(nn.Module):
        """Finite only where the layer's result is exact."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False)
            self.layer.weight.data = torch.tensor([[1.0, 0.3], [0.0, 1.0]])

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y / (y[:, :1] - x[:, :1] - 0.3 * x[:, 1:]).abs().lt(1e-3).float()

    with pytest.raises(ModelError, match="with layer layer quantized, the network returns NaN or infinite"):
        measure_sensitivity(Log(), torch.randn(16, 2), nearest(activation_bits=None, weight_first_last_bits=2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv-bn", [6 * 3 * 9 * 36]),
        ("grouped", [6 * 2 * 9 * 36]),
        ("depthwise", [8 * 9 * 36]),
        ("conv3d", [6 * 2 * 8 * 27]),
        ("linear", [15]),
        ("transposed 2d", [4 * 6 * 9 * 25]),
        ("transposed 2d grouped", [4 * 3 * 9 * 25]),
        ("linear-bn over tokens", [30 * 4]),
        ("two inputs", [3 * 4 * 9 * 64, 20]),
        ("batch sizes", [3 * 4 * 9 * 64, 16 * 65, 8]),
    ],
)
def test_multiplications_for_one_image(name: str, expected: list[int]) -> None:
    samples = CASES[name].samples(3)
    graph = placed(captured(name), nearest())
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    tensors = [*samples.args, *samples.kwargs.values()]
    assert list(multiplications(graph, dict(zip(names, tensors, strict=True))).values()) == expected


def test_layers_at_common_bits_are_neither_ends_nor_overridden() -> None:
    settings: Recipe = recipe(
        "nearest", leave_float="blocks.0.conv1", layers=[{"pattern": "blocks.1.conv2", "weight_bits": 5}]
    )
    graph = prepare(Chain(3), images(8), settings).graph
    assert layers_at_common_bits(graph, settings) == [
        *("blocks.0.conv2", "blocks.1.conv1", "blocks.2.conv1", "blocks.2.conv2")
    ]
