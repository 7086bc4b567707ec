"""What a file holds is counted as it is, and is no larger than it has to be."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import quiesce
from quiesce.cli.commands import main
from quiesce.demo import load_images, load_network
from quiesce.errors import FileFormatError
from quiesce.export.checkpoint import GRAPH_FILE, TENSOR_FILE
from quiesce.export.inspect import StoredLayer, inspect
from quiesce.models import load_model
from tiny import Chain, images, recipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = quiesce.quantize(Chain(1), images(8), recipe("nearest", weight_bits=3))
    return network.save(tmp_path_factory.mktemp("original") / "net")


@pytest.mark.parametrize("file", ["", GRAPH_FILE, TENSOR_FILE])
def test_layers_and_sums_are_those_of_the_network(file: str, saved: Path) -> None:
    inventory = inspect(saved / file)
    assert inventory.layers == (
        StoredLayer("stem", (8, 3, 3, 3), 8, 8, 8, 216, 8 * 4 + 8),
        StoredLayer("blocks_0_conv1", (8, 8, 3, 3), 3, 3, 8, 216, 40),
        StoredLayer("blocks_0_conv2", (8, 8, 3, 3), 3, 3, 8, 216, 40),
        StoredLayer("head", (10, 8), 8, 8, 10, 80, 50),
    )
    activations, biases, grids = 4 * (4 + 1), 4 * (8 + 8 + 8 + 10), 3 * 40 + 50
    assert (inventory.activation_bytes, inventory.float_bytes) == (activations, biases)
    assert inventory.file_bytes == (saved / GRAPH_FILE).stat().st_size + (saved / TENSOR_FILE).stat().st_size
    totals, weights = inventory.totals, 216 + 2 * 576 + 80
    assert totals["weights"] == weights
    assert totals["needed_bytes"] == 216 + 2 * 216 + 80 + grids + activations + biases
    assert totals["float32_bytes"] == 4 * weights + biases
    assert totals["int8_bytes"] == weights + grids + activations + biases
    assert totals["smaller_than_float32"] == pytest.approx(totals["float32_bytes"] / inventory.file_bytes)


def test_symmetric_weights_have_no_zero_points_to_count(tmp_path: Path) -> None:
    network = quiesce.quantize(Chain(1), images(8), recipe("nearest", weight_symmetric=True, weight_per_channel=False))
    assert [(row.scales, row.grid_bytes) for row in inspect(network.save(tmp_path / "net")).layers] == [(1, 4)] * 4


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileFormatError, match=r"notes\.txt can't be inspected; give a folder .* \.safetensors"):
        inspect(tmp_path / "notes.txt")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.json"):
        with pytest.raises(FileFormatError, match="can't be"):
            inspect(path)


def test_command_shows_the_table_and_writes_the_numbers(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(saved), "--json", str(tmp_path / "numbers.json")])
    shown, inventory = capsys.readouterr().out, inspect(saved)
    (row,) = [line for line in shown.splitlines() if "blocks_0_conv1" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("blocks_0_conv1", "8 × 8 × 3 × 3", "3", "3", "8", "216", "40")
    ]
    assert f"{inventory.totals['smaller_than_float32']:.2f} × smaller" in shown
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["totals"] == inventory.totals
    assert numbers["layers"][1]["integer_bytes"] == 216


def check_size(model: nn.Module, calibration: torch.Tensor, folder: Path) -> None:
    """At most 5 % and 64 KB more than what has to be there."""
    settings = recipe("nearest", weight_bits=2, activation_bits=4)
    inventory = inspect(quiesce.quantize(model, calibration, settings).save(folder))
    assert inventory.file_bytes <= 1.05 * inventory.needed_bytes + 64 * 1024


def test_files_of_the_demo_are_no_larger_than_they_have_to_be(tmp_path: Path) -> None:
    check_size(load_network(), load_images()[0][:8], tmp_path / "net")


@pytest.mark.long
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv2_035", "resnet18", "regnetx_006"])
def test_files_of_real_networks_are_no_larger_than_they_have_to_be(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = load_model(f"timm:{name}", weights="random").model
    assert isinstance(model, nn.Module)
    check_size(model, images(2, size=64), tmp_path / "net")


@pytest.mark.parametrize("compat", [False, True])
def test_an_onnx_file_is_counted_like_the_saved_network(compat: bool, saved: Path, tmp_path: Path) -> None:
    done = quiesce.load(saved).export_onnx(tmp_path / "net.onnx", compat=compat)
    found, original = inspect(done.path), inspect(saved)
    assert found.file_bytes == done.bytes == done.path.stat().st_size
    for row, other in zip(found.layers, original.layers, strict=True):
        assert (row.layer, row.shape, row.bits, row.scales) == (other.layer, other.shape, other.bits, other.scales)
        assert row.stored_bits == (8 if compat or row.bits == 8 else 4)
        assert row.integer_bytes == -(-row.weights * row.stored_bits // 8)
        zero_points = row.scales if row.stored_bits == 8 else -(-row.scales // 2)
        assert row.grid_bytes == 4 * row.scales + zero_points
    # Bounds of activations, and sizes and axes that operators take, are in the file besides the biases.
    assert original.float_bytes < found.float_bytes < original.float_bytes + 200
    assert found.activation_bytes == 4 * (4 + 1)


def test_onnx_files_of_other_programs_are_counted_by_their_containers(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [2, 3], [1, -2, 3, 4, -5, 6])
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("MatMul", ["x", "d"], ["y"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", k]) for n, k in (("x", 2), ("y", 3))]
    scale = helper.make_tensor("s", TensorProto.FLOAT, [], [0.5])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight, scale])), tmp_path / "a.onnx"
    )
    (row,) = inspect(tmp_path / "a.onnx").layers
    assert (row.layer, row.shape, row.bits, row.stored_bits, row.scales) == ("w", (2, 3), 4, 4, 1)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not onnx", b"\xff" * 50])
def test_what_is_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"a\.onnx is not an ONNX file"):
        inspect(tmp_path / "a.onnx")


def test_a_tensor_that_lacks_bytes_is_named(saved: Path, tmp_path: Path) -> None:
    path = quiesce.load(saved).export_onnx(tmp_path / "net.onnx").path
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "head_weight")
    tensor.dims[0] = 2**40
    onnx.save(model, path)
    with pytest.raises(FileFormatError, match=r"damaged: tensor 'head_weight' has 80 bytes for a shape of"):
        inspect(path)
