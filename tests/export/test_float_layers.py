"""Networks with layers left float, by the recipe and for a computed weight, in every form that is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quiesce
from quiesce.data import Samples
from quiesce.export.executorch import export_executorch
from quiesce.export.inspect import inspect
from quiesce.export.parity import check_parity
from quiesce.graph.bias import _biased_layers
from quiesce.quantized import QuantizedModel
from tiny import Assorted, images, recipe

LEFT = ("stem", "type:Squeeze", "blocks.2.conv2")
QUANTIZED = ["blocks_0_conv1", "blocks_0_conv2", "blocks_2_conv1", "make", "head"]


@pytest.fixture(scope="module", params=["academic", "onnxruntime", "openvino"])
def network(request: pytest.FixtureRequest) -> QuantizedModel:
    settings = recipe("brecq-fast", backend=request.param, leave_float=LEFT)
    return quiesce.quantize(Assorted(), images(16), settings)


def test_saved_and_loaded_it_is_the_same(network: QuantizedModel, tmp_path: Path) -> None:
    network.save(tmp_path / "net")
    loaded = quiesce.load(tmp_path / "net")
    assert torch.equal(loaded(images()), network(images()))
    inventory = inspect(tmp_path / "net")
    assert [row.layer for row in inventory.layers] == QUANTIZED
    floats = 3 * 8 * 9 + 2 * (2 * 4 * 8) + 8 * 8 * 9
    biases = 8 + 2 * 8 + 2 * (4 + 8) + 2 * 8 + 72 + 5
    assert inventory.float_bytes == 4 * (floats + biases)


@pytest.mark.parametrize("form", [{}, {"compat": True}, {"symmetric": True}], ids=["", "compat", "symmetric"])
def test_onnx_runtime_computes_what_the_simulation_does(
    network: QuantizedModel, form: dict[str, bool], tmp_path: Path
) -> None:
    network.export_onnx(tmp_path / "net.onnx", **form)
    parity = check_parity(network.graph_module, tmp_path / "net.onnx", Samples((images(),)))
    assert parity.values > 0 and parity.mismatches == 0 and parity.output_error < 1e-5
    assert [row.layer for row in inspect(tmp_path / "net.onnx").layers] == QUANTIZED


def test_torch_runs_the_program(network: QuantizedModel, tmp_path: Path) -> None:
    network.export_program(tmp_path / "net.pt2")
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(images()), network(images()))


def test_openvino_runs_it(network: QuantizedModel, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    network.export_openvino(tmp_path / "net.xml")
    compiled = openvino.Core().compile_model(tmp_path / "net.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs, expected = torch.from_numpy(compiled([images().numpy()])[0]), network(images())
    assert (outputs - expected).norm() < 0.02 * expected.norm()


@pytest.mark.filterwarnings("ignore")
def test_executorch_runs_it(network: QuantizedModel, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    written = export_executorch(network.graph_module, tmp_path / "net.pte", batch=2)
    assert written.relative_error < 0.05


def test_integer_biases_are_those_of_quantized_layers() -> None:
    settings = recipe("nearest", backend="onnxruntime", leave_float=LEFT)
    network = quiesce.quantize(Assorted(), images(16), settings)
    names = [layer.weight_name for layer in _biased_layers(network.graph_module)]
    assert names == [f"{name}_weight" for name in QUANTIZED]
