"""The comparison of a file with the simulation sees what it should see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import quiesce
from quiesce.data import Samples
from quiesce.export.onnx import export_onnx
from quiesce.export.parity import check_parity
from quiesce.quant.fake_quantize import ActivationFakeQuantize, fake_quantizers
from quiesce.quantized import QuantizedModel
from tiny import Chain, images, recipe


@pytest.fixture(scope="module")
def network() -> QuantizedModel:
    return quiesce.quantize(Chain(2), images(16), recipe("nearest", weight_bits=4, activation_bits=4))


@pytest.fixture(scope="module")
def file(network: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network.graph_module, network.recipe, tmp_path_factory.mktemp("file") / "network.onnx").path


def changed(file: Path, folder: Path, name: str, factor: float) -> Path:
    """The file with one initializer multiplied."""
    model = onnx.load(file)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_a_faithful_file_agrees_layer_by_layer_and_at_the_end(network: QuantizedModel, file: Path) -> None:
    found = check_parity(network.graph_module, file, Samples((images(40, seed=3),)), layer_images=24)
    quantizers = fake_quantizers(network.graph_module).items()
    assert [layer.quantizer for layer in found.layers] == [
        n for n, q in quantizers if isinstance(q, ActivationFakeQuantize)
    ]
    assert found.images == 40
    assert found.layers[0].values == 24 * 3 * 64  # the input images
    assert (found.mismatches, found.top1_differs) == (0, 0)
    assert found.sqnr_db is None or found.sqnr_db > 100
    assert found.output_error < 1e-5


def test_a_weight_scale_that_is_off_shows_in_the_layer_behind_it_only(
    network: QuantizedModel, file: Path, tmp_path: Path
) -> None:
    path = changed(file, tmp_path, "blocks_0_conv1_weight_scale", 1.05)
    found = check_parity(network.graph_module, path, Samples((images(24, seed=3),)))
    wrong = [layer.quantizer for layer in found.layers if layer.mismatches]
    # Layers further behind are compared on the inputs they were given, and agree.
    assert len(wrong) == 1 and found.layers[2].quantizer == wrong[0]
    assert found.sqnr_db is not None and found.sqnr_db < 60


def test_a_bias_that_is_off_by_a_little_is_found(network: QuantizedModel, file: Path, tmp_path: Path) -> None:
    model = onnx.load(file)
    name = next(t.name for t in model.graph.initializer if t.name.endswith("bias"))
    found = check_parity(network.graph_module, changed(file, tmp_path, name, 1.01), Samples((images(24, seed=3),)))
    assert found.mismatches > 0


def test_a_changed_top_1_without_a_tie_is_told_from_one_with(
    network: QuantizedModel, file: Path, tmp_path: Path
) -> None:
    path = changed(file, tmp_path, "head_weight_scale", -1.0)
    found = check_parity(network.graph_module, path, Samples((images(24, seed=3),)))
    assert found.top1_differs > 12
    assert found.mismatches == 0 and found.output_error > 1  # behind the last quantizer
    assert found.top1_differs_at_tie < found.top1_differs


def test_on_ties_both_sides_round_half_to_even(network: QuantizedModel, file: Path) -> None:
    """x / scale is k + ½ in float32, where x has been rounded; float64 sees on which side of the tie x is."""
    first = next(q for q in fake_quantizers(network.graph_module).values() if isinstance(q, ActivationFakeQuantize))
    ties = (torch.arange(8 * 3 * 64).view(8, 3, 8, 8) % 12 - 5.5) * first.scale
    found = check_parity(network.graph_module, file, Samples((ties,)))
    assert found.layers[0].mismatches == 0 < found.layers[0].ties_broken
    assert found.largest_difference <= 1e-5 * found.largest_output
