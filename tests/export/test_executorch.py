"""ExecuTorch: what is stored, and that its runtime computes what the simulation does."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quiesce
from quiesce.data import Samples
from quiesce.demo import load_images, load_network
from quiesce.errors import ModelError, OutputError
from quiesce.export.executorch import _integers, export_executorch, run_executorch
from quiesce.graph.bias import round_biases
from quiesce.graph.capture import capture, interface_of
from quiesce.quant.fake_quantize import WeightFakeQuantize
from quiesce.quant.spec import QuantizationSpec
from small_nets import CASES, captured, nearest, quantized, relative_error
from tiny import Chain, images, recipe, run_examples

pytestmark = pytest.mark.filterwarnings("ignore")  # what executorch's import and its passes warn of

LAYERS = {
    "conv": lambda i: nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1),
    "depthwise": lambda i: nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1, groups=3 if i == 0 else 6),
    "linear": lambda i: nn.Linear(8, 8),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def installed() -> None:
    pytest.importorskip("executorch")


@cache
def chain(kind: str) -> Any:
    """Four layers of a kind, captured: nothing, ReLU and ReLU6 between them."""
    a, b, c, d = (LAYERS[kind](i) for i in range(4))
    return capture(nn.Sequential(a, b, nn.ReLU(), c, nn.ReLU6(), d), Samples((images(2),)))


def small(kind: str, weights: int, activations: int, **settings: Any) -> Any:
    """The same, calibrated, all layers with the same bits, and with biases as integers."""
    bits = {"weight_bits": weights, "weight_first_last_bits": weights}
    bits |= {"activation_bits": activations, "activation_first_last_bits": activations}
    ranges = {"weight_range": "minmax", "activation_range": "minmax"}
    return round_biases(quantized(chain(kind), Samples((images(6),)), nearest(**bits, **ranges, **settings)))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("weights", "activations"), [(2, 2), (2, 8), (3, 4), (4, 4), (8, 8)])
def test_the_runtime_computes_what_the_simulation_does(
    weights: int, activations: int, kind: str, tmp_path: Path
) -> None:
    graph = small(kind, weights, activations, weight_symmetric=weights == 8)
    done = export_executorch(graph, tmp_path / "net.pte", batch=4)
    assert (len(done.integer_weights), len(done.float_weights)) == (3, 1)  # the last layer's output is not quantized
    x = 2 * images(4, seed=3)
    assert relative_error(run_executorch(done.path.read_bytes(), [x]), graph(x)) < 1e-5


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_grid(per_channel: bool, symmetric: bool, tmp_path: Path) -> None:
    settings = {"weight_symmetric": symmetric, "activation_symmetric": symmetric, "weight_per_channel": per_channel}
    graph = small("conv", 4, 4, **settings)
    done = export_executorch(graph, tmp_path / "net.pte")
    assert len(done.integer_weights) == 3
    x = images(1, seed=3)
    assert relative_error(run_executorch(done.path.read_bytes(), [x]), graph(x)) < 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_integers_stand_for_just_the_weights(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1, 1e-3, 0, 5, 1, 1]).view(-1, 1, 1, 1)
    quantizer = WeightFakeQuantize(QuantizationSpec(bits, symmetric, 0), weight.shape, weight)
    zero_point = torch.zeros(6) if symmetric else torch.full((6,), float(2 ** (bits - 1)))
    quantizer.set_parameters(torch.full((6,), 3.0 / 2**bits), zero_point, weight)
    stored = _integers(quantizer, None)
    assert stored is not None and stored.values.dtype == torch.int8
    assert torch.equal(stored.values * stored.scale.view(-1, 1, 1, 1), quantizer.dequantized_weight())
    if bits <= 7:  # no channel has room for a factor of 2
        assert ((stored.values.flatten(1).abs().amax(1) >= 32) | (weight.flatten(1).abs().amax(1) < 0.1)).all()


def test_weights_that_int8_does_not_hold_and_biases_that_bound_the_factor() -> None:
    weight = torch.tensor([[-0.9, 1.6], [0.0, 1.0]])
    quantizer = WeightFakeQuantize(QuantizationSpec(8, False, 0), weight.shape, weight)
    quantizer.set_parameters(torch.full((2,), 0.01), torch.full((2,), 90.0), weight)
    assert _integers(quantizer, None) is None  # 160 − 0 = 160 steps above the zero point
    quantizer = WeightFakeQuantize(QuantizationSpec(2, True, 0), weight.shape, weight)
    quantizer.set_parameters(torch.ones(2), torch.zeros(2), weight)
    stored = _integers(quantizer, torch.tensor([0.5, 2.0**29]))
    assert stored is not None
    assert stored.scale.tolist() == [1 / 64, 1 / 2]


@pytest.mark.usefixtures("installed")
def test_the_demo_network_on_integers(tmp_path: Path) -> None:
    calibration, test, _ = load_images()
    settings = recipe("nearest", weight_bits=4, activation_bits=8, backend="onnxruntime")
    network = quiesce.quantize(load_network(), calibration[:64], settings)
    done = network.export_executorch(tmp_path / "net.pte", batch=100)
    assert len(done.integer_weights) == 34 and done.float_weights == ("classifier_weight",)
    assert done.bytes < 225_000
    (logits,) = run_executorch(done.path.read_bytes(), [test[:100]])
    expected = network(test[:100])
    assert relative_error([logits], [expected]) < 0.02
    assert torch.equal(logits.argmax(1), expected.argmax(1))


@pytest.mark.usefixtures("installed")
def test_the_example_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples("docs/deploy.md", "ExecuTorch")
    assert "34 of 35 layers on integers" in capsys.readouterr().out


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "name", ["keyword inputs in another order", "linear-bn over as many tokens", "batch sizes", "u-net", "depthwise"]
)
def test_flat_inputs_and_outputs_of_other_networks(name: str, tmp_path: Path) -> None:
    graph = round_biases(quantized(captured(name), CASES[name].samples(6), nearest(weight_bits=4, activation_bits=8)))
    done = export_executorch(graph, tmp_path / "net.pte", batch=3)
    samples = CASES[name].samples(3)
    flat = interface_of(graph).flatten(samples.args, samples.kwargs)
    assert relative_error(run_executorch(done.path.read_bytes(), flat), graph(*flat)) < 2e-3


@pytest.mark.usefixtures("installed")
def test_a_skip_reads_what_an_integer_layer_reads(tmp_path: Path) -> None:
    settings = recipe("nearest", weight_bits=8, activation_bits=8, weight_symmetric=True)
    network = quiesce.quantize(Chain(2), images(12), settings)
    done = network.export_executorch(tmp_path / "net.pte", batch=2)
    assert done.integer_weights == ("stem_weight", "blocks_0_conv1_weight", "blocks_1_conv1_weight")
    assert done.relative_error < 0.05


@pytest.mark.usefixtures("installed")
def test_what_executorch_can_not_do_is_said(tmp_path: Path) -> None:
    volume = nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 2, 2))
    samples = Samples((torch.randn(4, 2, 5, 5, 5),))
    graph = quantized(capture(volume, samples), samples, nearest())
    with pytest.raises(ModelError, match="ExecuTorch lowers the network but can't run it"):
        export_executorch(graph, tmp_path / "net.pte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("installed")
def test_networks_that_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    samples = Samples((images(4).double(),))
    graph = quantized(capture(model.double(), samples), samples, nearest())
    with pytest.raises(ModelError, match=r"has torch.float64 scales; ExecuTorch takes float32 networks"):
        export_executorch(graph, tmp_path / "net.pte")
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    exported = torch.export.export(model.float(), (images(2),), dynamic_shapes=shapes)
    samples = Samples((images(4),))
    graph = quantized(capture(exported, samples), samples, nearest())
    with pytest.raises(ModelError, match=r"input 0 has free dimensions besides the batch"):
        export_executorch(graph, tmp_path / "net.pte")


def test_without_the_package_and_with_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ModelError, match=r'install it with: pip install "quiesce\[executorch\]"'):
        export_executorch(small("conv", 4, 4), tmp_path / "net.pte")
    (tmp_path / "net.pte").write_text("other")
    with pytest.raises(OutputError, match="is there already"):
        export_executorch(small("conv", 4, 4), tmp_path / "net.pte")
