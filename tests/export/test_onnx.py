"""Every exported file loads in ONNX Runtime's default session and computes what the simulation does."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from test_networks import NETWORKS, Activations, Layers, Nested, Norms
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import quiesce
from quiesce.data import Samples
from quiesce.errors import ModelError, OutputError
from quiesce.export.export import Export
from quiesce.export.onnx import export_onnx
from quiesce.export.parity import Parity, check_parity
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers
from quiesce.quantized import QuantizedModel
from quiesce.recipe import Recipe
from tiny import Chain, images, recipe

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6}


EIGHT = {"weight_bits": 8, "activation_bits": 8}


class Kinds(nn.Module):
    """A convolution, a depthwise one, a pointwise one and linear layers, each with an activation function behind it."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), activation()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), activation()),
            *(nn.Conv2d(8, 8, 1), activation()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), activation()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            *(nn.Linear(8, 16), activation()),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


def quantized(model: nn.Module, weight_bits: int, activation_bits: int | None, **settings: Any) -> QuantizedModel:
    bits = {"weight_bits": weight_bits, "weight_first_last_bits": weight_bits}
    bits |= {"activation_bits": activation_bits, "activation_first_last_bits": activation_bits or 8}
    return quiesce.quantize(model.eval(), images(16), recipe("nearest", **{**bits, **settings}))


def exported(network: QuantizedModel, folder: Path, **options: Any) -> Export:
    return export_onnx(network.graph_module, network.recipe, folder / "network.onnx", **options)


def parity(network: QuantizedModel, path: Path, count: int = 24) -> Parity:
    return check_parity(network.graph_module, path, Samples((images(count, seed=9),)))


def assert_same(found: Parity) -> None:
    """The integers of every layer are the simulation's, but where a tie can be broken either way."""
    assert found.mismatches == 0
    assert found.top1_differs == found.top1_differs_at_tie
    assert found.output_error < 1e-5
    if found.ties_broken == 0:
        assert found.largest_difference <= 1e-5 * found.largest_output


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("activation_bits", [2, 4, 8, None])
@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_every_combination_loads_and_agrees(
    weight_bits: int, activation_bits: int | None, activation: str, tmp_path: Path
) -> None:
    network = quantized(Kinds(ACTIVATIONS[activation]), weight_bits, activation_bits)
    export = exported(network, tmp_path)
    found = parity(network, export.path)
    assert_same(found)
    assert found.values == 0 if activation_bits is None else found.values > 10_000
    assert opset(export.path) == (25 if weight_bits == 2 else 21)


@pytest.mark.parametrize("options", [{"compat": True}, {"symmetric": True}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("weight_bits", [2, 3, 4])
def test_other_containers_hold_the_same_values(
    weight_bits: int, symmetric: bool, options: dict[str, bool], tmp_path: Path
) -> None:
    network = quantized(Kinds(nn.ReLU6), weight_bits, 4, weight_symmetric=symmetric)
    assert_same(parity(network, exported(network, tmp_path, **options).path))


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_packed_in_the_narrowest_container(weight_bits: int, symmetric: bool, tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), weight_bits, 4, weight_symmetric=symmetric)
    export = exported(network, tmp_path)
    stored = weights(export.path)
    width = {2: 2, 3: 4, 4: 4, 8: 8}[weight_bits]
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in stored.values()} == {
        f"{'' if symmetric else 'U'}INT{width}"
    }
    for name, quantizer in fake_quantizers(network.graph_module).items():
        if isinstance(quantizer, WeightFakeQuantize):
            tensor = stored[name.removesuffix("_quantizer")]
            assert len(tensor.raw_data) == -(-quantizer.quantized.numel() * width // 8)
            integers = numpy_helper.to_array(tensor).astype(np.int16)
            assert np.array_equal(integers, quantizer.quantized_weight().numpy().astype(np.int16))
    notes = " ".join(export.notes)
    assert ("weights of 3 bits: stored as" in notes) == (weight_bits == 3)


def test_compat_is_opset_13_with_integers_of_8_bits(tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 2, 4)
    export = exported(network, tmp_path, compat=True)
    assert opset(export.path) == 13
    assert {t.data_type for t in weights(export.path).values()} == {onnx.TensorProto.UINT8}
    assert any("of 2 bits: stored as UINT8" in note for note in export.notes)


def test_symmetric_files_have_zero_points_of_0(tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), 2, 4, weight_first_last_bits=8)
    export = exported(network, tmp_path, symmetric=True)
    model = onnx.load(export.path)
    zero_points = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("weight_zero_point")]
    assert zero_points and not any(z.astype(int).any() for z in zero_points)
    types = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in weights(export.path).values())
    assert types == {"INT4": 4, "INT16": 2}
    with pytest.raises(ModelError, match=r"body_0_weight has 8 bits with zero points.*weights\.symmetric = true"):
        export_onnx(network.graph_module, network.recipe, tmp_path / "b.onnx", symmetric=True, compat=True)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_many_habits(kind: type[nn.Module], compat: bool, tmp_path: Path) -> None:
    network = quantized(kind(), 4, 8, weight_per_channel=compat)
    export = exported(network, tmp_path, compat=compat)
    found = parity(network, export.path, 6)
    # Behind an instance norm the mean is 0 but for noise, which is then quantized.
    assert found.mismatches == 0 or kind is Norms
    if found.ties_broken == 0:
        assert found.largest_difference <= 1e-4 * max(found.largest_output, 1.0)


def test_a_linear_layer_on_tokens_has_its_weight_turned_in_the_file(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 12), nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(torch.relu(self.a(x.flatten(2)))).mean(1)
            return result

    network = quantized(Tokens(), 2, 4)
    model = onnx.load(exported(network, tmp_path).path)
    assert not any(node.op_type == "Transpose" for node in model.graph.node)
    axes = {a.i for n in model.graph.node if n.op_type == "DequantizeLinear" for a in n.attribute if a.name == "axis"}
    assert axes == {1}


def test_inputs_of_other_types_and_names_reach_the_file(tmp_path: Path) -> None:
    class Scaled(Layers):
        def forward(self, x: Tensor, *, index: Tensor) -> dict[str, Tensor]:
            y = self.pooled(self.maps(x))
            return {"logits": y, "chosen": y.gather(1, index)}

    data = {"x": images(12), "index": torch.randint(5, (12, 1))}
    network = quiesce.quantize(Scaled().eval(), [data], recipe("nearest", weight_bits=4, activation_bits=8))
    export = exported(network, tmp_path)
    session = onnxruntime.InferenceSession(export.path)
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("x", "tensor(float)", ["batch", 3, 8, 8]),
        ("index", "tensor(int64)", ["batch", 1]),
    ]
    assert [o.name for o in session.get_outputs()] == ["output_0", "output_1"]
    x, index = images(3, seed=2), torch.randint(5, (3, 1))
    found = session.run(None, {"x": x.numpy(), "index": index.numpy()})
    expected = network(x=x, index=index)
    np.testing.assert_allclose(found[0], expected["logits"].numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], expected["chosen"].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_size_is_free(batch: int, tmp_path: Path) -> None:
    network = quantized(Chain(), 2, 4)
    session = onnxruntime.InferenceSession(exported(network, tmp_path).path)
    x = images(batch, seed=4)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, network(x).numpy(), rtol=1e-4, atol=1e-4)


def test_a_loaded_network_gives_the_same_file(tmp_path: Path) -> None:
    network = quantized(Nested(), 3, 4)
    loaded = quiesce.load(network.save(tmp_path / "net"))
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    export_onnx(network.graph_module, network.recipe, first)
    export_onnx(loaded.graph_module, loaded.recipe, second)
    one, two = (onnx.load(p).graph for p in (first, second))
    assert [n.op_type for n in one.node] == [n.op_type for n in two.node]
    assert {t.name: t.raw_data for t in one.initializer} == {t.name: t.raw_data for t in two.initializer}


def test_metadata_says_how_the_network_was_made(tmp_path: Path) -> None:
    network = quantized(Chain(), 3, 4, seed=5)
    model = onnx.load(exported(network, tmp_path).path)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found["quiesce.seed"] == "5"
    assert found["quiesce.version"] == model.producer_version
    (tmp_path / "recipe.toml").write_text(found["quiesce.recipe"])
    assert Recipe.from_toml(tmp_path / "recipe.toml") == network.recipe
    assert set(json.loads(found["quiesce.bits"])) == set(weights(tmp_path / "network.onnx"))
    assert set(json.loads(found["quiesce.bits"]).values()) == {3}
    assert "UINT4" in found["quiesce.notes"]


def test_the_file_holds_little_besides_integers_and_their_parameters(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [192, *[256] * 12]
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    network = quantized(Wide(), 2, 4)
    export = exported(network, tmp_path)
    stored = sum(
        -(-q.quantized.numel() * 2 // 8) + q.scale.numel() * 4 + -(-q.scale.numel() * 2 // 8) + q.scale.numel() * 4
        for q in fake_quantizers(network.graph_module).values()
        if isinstance(q, WeightFakeQuantize)
    )
    assert export.bytes == export.path.stat().st_size <= 1.05 * stored + 64 * 1024


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    network = quantized(Chain(), 8, 8)
    path = tmp_path / "network.onnx"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"network\.onnx is there already"):
        exported(network, tmp_path)
    assert path.read_text() == "mine"
    exported(network, tmp_path, force=True)
    onnx.checker.check_model(path)


def test_float64_networks_are_refused(tmp_path: Path) -> None:
    network = quiesce.quantize(Chain().double().eval(), images(12).double(), recipe("nearest"))
    with pytest.raises(ModelError, match=r"torch\.float64 scales; ONNX files hold float32 networks"):
        exported(network, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norms_are_composed_for_opset_13(axes: int, affine: bool, tmp_path: Path) -> None:
    class Normed(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.Sequential(
                *(nn.LayerNorm([8] * axes, eps=1e-3, elementwise_affine=affine), nn.ReLU()),
                *(nn.LayerNorm([8] * axes, eps=1e-2, elementwise_affine=affine), nn.ReLU()),
            )
            for parameter in self.norms.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.pooled(self.d(self.norms(self.maps(x))))

    network = quantized(Normed(), 4, 8)
    assert_same(parity(network, exported(network, tmp_path, compat=True).path))


def test_an_operator_that_opset_13_lacks_is_named(tmp_path: Path) -> None:
    class Sampled(Layers):
        def forward(self, x: Tensor) -> Tensor:
            grid = x[:, :2].permute(0, 2, 3, 1)
            return self.pooled(nn.functional.grid_sample(self.maps(x), grid, align_corners=False))

    network = quantized(Sampled(), 4, 8)
    with pytest.raises(ModelError, match="opset 13 has no operator GridSample"):
        exported(network, tmp_path, compat=True)


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_integer_kernels_run_where_the_simulation_has_their_biases(weight_bits: int, tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), weight_bits, 8, backend="onnxruntime")
    export = exported(network, tmp_path, compat=True)
    assert_same(parity(network, export.path))
    assert operators_run(export.path, tmp_path)["QLinearConv"] == 4


@pytest.mark.parametrize("weight_bits", [2, 4])
def test_packed_weights_have_biases_rounded_as_finely_as_those_of_8_bits(weight_bits: int, tmp_path: Path) -> None:
    network = quantized(Kinds(nn.ReLU), weight_bits, 8, backend="onnxruntime")
    export = exported(network, tmp_path)
    assert_same(parity(network, export.path))
    assert operators_run(export.path, tmp_path)["QLinearConv"] == 0


def test_files_for_tensorrt_hold_nothing_but_pairs_of_quantizers(tmp_path: Path) -> None:
    network = quiesce.quantize(Kinds(nn.ReLU).eval(), images(16), recipe("nearest", backend="tensorrt", **EIGHT))
    export = exported(network, tmp_path, compat=True)
    model = onnx.load(export.path)
    layers = {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Reshape", "Gemm"}
    assert {n.op_type for n in model.graph.node} <= {"QuantizeLinear", "DequantizeLinear"} | layers
    zero_points = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("zero_point")]
    assert zero_points and all(z.dtype == np.int8 and not z.any() for z in zero_points)
    found = parity(network, export.path)
    # ONNX Runtime rounds its biases, which on some processors changes no output.
    assert found.largest_difference == 0 or (found.sqnr_db is not None and found.sqnr_db > 30)


def operators_run(path: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def opset(path: Path) -> int:
    return next(o.version for o in onnx.load(path).opset_import if o.domain == "")


def weights(path: Path) -> dict[str, onnx.TensorProto]:
    graph = onnx.load(path).graph
    stored = {t.name: t for t in graph.initializer}
    used = [n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"]
    return {name: stored[name] for name in used if name in stored}


def test_nested_results_come_out_flat_in_order(tmp_path: Path) -> None:
    network = quantized(Nested(), 4, 8)
    session = onnxruntime.InferenceSession(exported(network, tmp_path).path)
    x = images(3, seed=5)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = [t for t in pytree.tree_leaves(network(x)) if isinstance(t, Tensor)]
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4)


def test_activation_functions_without_integer_kernels_agree(tmp_path: Path) -> None:
    network = quantized(Activations(), 8, 8, backend="onnxruntime")
    found = parity(network, exported(network, tmp_path).path)
    assert found.sqnr_db is None or found.sqnr_db > 40
