"""OpenVINO's files load in the openvino package and answer as the simulation does."""

from __future__ import annotations

from pathlib import Path

import openvino
import pytest
import torch
from test_onnx import Kinds, quantized
from torch import Tensor, nn

from quiesce.errors import ModelError, OutputError
from quiesce.evaluate import sqnr_db
from quiesce.export.openvino import export_openvino
from quiesce.quantized import QuantizedModel
from tiny import images


def exported(network: QuantizedModel, folder: Path, **options: bool) -> Path:
    return export_openvino(network.graph_module, network.recipe, folder / "network.xml", **options).path


def outputs(path: Path, x: Tensor) -> Tensor:
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(next(iter(model([x.numpy()]).values())).copy())


@pytest.mark.parametrize("backend", ["academic", "openvino"])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (2, 4), (3, 2)])
def test_every_combination_loads_and_agrees(
    weight_bits: int, activation_bits: int, activation: type[nn.Module], backend: str, tmp_path: Path
) -> None:
    network = quantized(Kinds(activation), weight_bits, activation_bits, backend=backend)
    x = images(24, seed=9)
    y = network(x)
    found = sqnr_db([outputs(exported(network, tmp_path), x)], [y])
    # A tie that integer kernels break the other way is one step of one value; a wrong layer is far below this.
    assert found is None or found > 30


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_inputs_of_linear_layers_are_not_quantized_again(weight_bits: int, tmp_path: Path) -> None:
    """The plugin's defaults do so where weights are packed."""
    network = quantized(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)), weight_bits, None
    )
    x = images(8, seed=9)
    torch.testing.assert_close(outputs(exported(network, tmp_path), x), network(x), rtol=1e-4, atol=1e-5)


def test_8_bit_containers_give_the_same_answers(tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 4, 4)
    x = images(8, seed=9)
    torch.testing.assert_close(outputs(exported(network, tmp_path, compat=True), x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_size_is_free(batch: int, tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 4, 4)
    x = images(batch, seed=2)
    torch.testing.assert_close(outputs(exported(network, tmp_path), x), network(x), rtol=1e-4, atol=1e-5)


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 4, 8)
    (tmp_path / "network.bin").write_text("mine")
    with pytest.raises(OutputError, match=r"network\.bin is there already"):
        exported(network, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["network.bin"]
    exported(network, tmp_path, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network.bin", "network.xml"]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 4, 8)
    with pytest.raises(ModelError, match=r"\.xml file; network\.ir has another suffix"):
        export_openvino(network.graph_module, network.recipe, tmp_path / "network.ir")
