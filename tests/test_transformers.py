"""Transformers through the whole pipeline: what is quantized on which grid, learned, saved, and exported or refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quiesce
from quiesce.data import Samples
from quiesce.errors import ModelError, RecipeError
from quiesce.export.parity import check_parity
from quiesce.export.program import as_program
from quiesce.graph.ops import aten
from quiesce.preparation import Prepared, prepare
from quiesce.quant.fake_quantize import ActivationFakeQuantize, fake_quantizers, float_mode
from quiesce.recipe import Recipe
from small_nets import Lambda
from tiny import images, recipe
from transformer import transformer

SKEWED = {"activations.softmax": "log2", "activations.gelu": "twin", "activations.layer_norm": "reparameterized"}


@cache
def made(*settings: tuple[str, Any]) -> quiesce.QuantizedModel:
    return quiesce.quantize(transformer(), images(32), recipe("qdrop-fast", steps=20, **dict(settings)))


def grids(prepared: Prepared) -> list[tuple[str, str, int]]:
    """Of each activation quantizer: the operator in front of it, its grid and bits."""
    graph, found = prepared.graph, []
    for node in graph.graph.nodes:
        quantizer = getattr(graph, str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, ActivationFakeQuantize):
            source = node.args[0]
            name = source.op if source.op == "placeholder" else str(source.target).split(".")[1:2] or ["getitem"]
            found.append(("".join(name), quantizer.spec.grid, quantizer.spec.bits))
    return found


def test_inputs_of_layers_and_of_both_products_are_quantized() -> None:
    block = ["layer_norm", "getitem", "transpose", "softmax", "getitem", "reshape", "layer_norm", "gelu"]
    found = grids(prepare(transformer(), images(16), recipe("nearest")))
    assert sorted(name for name, _, _ in found) == sorted(["placeholder", *2 * block, "mean"])
    assert {bits for name, _, bits in found if name in ("placeholder", "mean")} == {8}
    assert {bits for name, _, bits in found if name in block} == {4}
    assert {grid for _, grid, _ in found} == {"uniform"}


@pytest.mark.parametrize("symmetric", [False, True])
def test_probabilities_and_what_a_gelu_gives_have_the_grids_asked_for(symmetric: bool) -> None:
    settings = recipe("nearest", **SKEWED, activation_symmetric=symmetric)
    prepared = prepare(transformer(), images(16), settings)
    for name, grid, _ in grids(prepared):
        assert grid == {"softmax": "log2", "gelu": "twin"}.get(name, "uniform")
    for quantizer in fake_quantizers(prepared.graph).values():
        assert (
            quantizer.spec.symmetric == (symmetric and quantizer.spec.grid == "uniform") or quantizer.spec.ch_axis == 0
        )


def test_without_quantized_activations_no_grid_is_placed() -> None:
    assert not grids(prepare(transformer(), images(16), recipe("nearest", **SKEWED, activation_bits=None)))


def test_a_product_with_a_constant_that_is_no_weight_is_left() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layer(x @ self.tables)

    net = Lambda(forward, layer=nn.Linear(8, 4), tables=nn.Parameter(torch.randn(3, 8, 8)))
    assert [name for name, _, _ in grids(prepare(net, images(16), recipe("nearest")))] == ["matmul"]


@pytest.mark.parametrize("product", ["matmul", "bmm", "mm", "einsum", "baddbmm", "addmm"])
def test_products_of_every_name(product: str) -> None:
    functions = {
        "matmul": lambda a, b: a @ b,
        "bmm": torch.bmm,
        "mm": lambda a, b: torch.mm(a.flatten(0, 1), b.flatten(0, 1).T @ b.flatten(0, 1)).view_as(a),
        "einsum": lambda a, b: torch.einsum("nij,njk->nik", a, b),
        "baddbmm": lambda a, b: torch.baddbmm(a, a, b),
        "addmm": lambda a, b: torch.addmm(a.flatten(0, 1), a.flatten(0, 1), b.sum(0)).view_as(a),
    }

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x[:, 0]
        return self.head(functions[product](self.a(x), self.b(x)))

    net = Lambda(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 4))
    prepared = prepare(net, images(16), recipe("nearest"))
    assert len(grids(prepared)) >= 4
    products = {aten.matmul.default, aten.bmm.default, aten.mm.default, aten.einsum.default, aten.baddbmm.default}
    for node in prepared.graph.graph.nodes:
        if node.target in products | {aten.addmm.default}:
            factors = node.all_input_nodes[-2:]
            assert all(isinstance(getattr(prepared.graph, str(n.target)), ActivationFakeQuantize) for n in factors)


def test_blocks_are_units_and_layers_too() -> None:
    prepared = prepare(transformer(), images(16), recipe("nearest"))
    assert [unit.name for unit in prepared.modules] == ["patches", "blocks.0", "blocks.1", "head"]
    assert [len(unit.layers) for unit in prepared.modules] == [1, 4, 4, 1]


def test_the_float_network_is_the_same_with_every_option() -> None:
    net, x = transformer(), images(16)
    for settings in ({}, SKEWED):
        prepared = prepare(net, x, recipe("nearest", **settings))
        with float_mode(prepared.graph):
            torch.testing.assert_close(prepared.graph(x)[0], net(x), rtol=1e-4, atol=1e-5)
    assert [entry.node for entry in prepared.left] == ["layer_norm_4"]


@pytest.mark.parametrize("settings", [{}, SKEWED])
def test_reconstruction_learns_every_step_size(settings: dict[str, Any]) -> None:
    learned, nearest = made(*settings.items()), prepare(transformer(), images(32), recipe("nearest", **settings))
    before = fake_quantizers(nearest.graph)
    for name, quantizer in fake_quantizers(learned.graph_module).items():
        if isinstance(quantizer, ActivationFakeQuantize) and name != "x_quantizer":
            assert quantizer.scale != before[name].scale, name
            assert quantizer.scale > 0 and quantizer.zero_point == before[name].zero_point


@pytest.mark.parametrize("softmax", ["log2", "log-sqrt2"])
def test_saved_and_loaded_bit_identical(softmax: str, tmp_path: Path) -> None:
    network, x = made(*{**SKEWED, "activations.softmax": softmax}.items()), images(5, seed=3)
    network.save(tmp_path / "net")
    loaded = quiesce.load(tmp_path / "net")
    assert torch.equal(loaded(x), network(x))
    specs = [q.spec for q in fake_quantizers(loaded.graph_module).values()]
    assert {spec.grid for spec in specs} == {"uniform", softmax, "twin"}


def test_a_program_holds_every_grid_exactly() -> None:
    network = made(*SKEWED.items())
    program = as_program(network.graph_module)
    for batch in (1, 6):
        x = images(batch, seed=3)
        assert torch.equal(program.module()(x), network(x))


@pytest.mark.parametrize(
    ("export", "suffix", "what"),
    [
        ("export_onnx", "onnx", "ONNX"),
        ("export_openvino", "xml", "OpenVINO"),
        ("export_executorch", "pte", "ExecuTorch"),
        ("export_program", "pt2", "PT2E"),
    ],
)
def test_other_exports_refuse_a_grid_by_name(export: str, suffix: str, what: str, tmp_path: Path) -> None:
    if export == "export_executorch":
        pytest.importorskip("executorch")
    settings = {"pt2e": True} if export == "export_program" else {}
    with pytest.raises(ModelError, match=rf"softmax_int has a log2 grid, which .*{what}.* can't hold; .*torch.export"):
        getattr(made(*SKEWED.items()), export)(tmp_path / f"net.{suffix}", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("academic", {"activations.layer_norm": "reparameterized"}),
        ("academic", {"activation_bits": 8}),
        ("onnxruntime", {"weight_bits": 8, "activation_bits": 8}),
        ("onnxruntime", {"weight_bits": 8, "activation_bits": 8, "activations.layer_norm": "reparameterized"}),
    ],
)
def test_onnx_runtime_computes_the_same(backend: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = quiesce.quantize(transformer(), images(32), recipe("nearest", backend=backend, **settings))
    for compat in (False, True):
        path = network.export_onnx(tmp_path / f"{compat}.onnx", compat=compat).path
        found = check_parity(network.graph_module, path, Samples((1.5 * images(16, seed=9),)))
        assert found.mismatches == 0 and found.output_error < 1e-5
        assert found.top1_differs == found.top1_differs_at_tie


def test_onnx_runtime_multiplies_integers_in_attention(tmp_path: Path) -> None:
    """Both products of both blocks are fused into integer kernels."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    settings = recipe("nearest", backend="onnxruntime", weight_bits=8, activation_bits=8)
    network = quiesce.quantize(transformer(), images(32), settings)
    path, optimized = network.export_onnx(tmp_path / "net.onnx", compat=True).path, tmp_path / "optimized.onnx"
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 4
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(optimized).graph.node]
    assert "MatMul" not in kinds and "FusedMatMul" not in kinds


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
def test_runtimes_demand_uniform_grids(backend: str) -> None:
    with pytest.raises(RecipeError, match=r"activations.softmax is .log2., and backend .* demands .uniform."):
        Recipe.preset("nearest", backend=backend, **{"activations.softmax": "log2"})


@pytest.mark.parametrize("setting", ["softmax", "gelu", "layer_norm"])
def test_an_unknown_choice_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"activations.{setting} 'log3' is unknown"):
        Recipe.preset("nearest", **{f"activations.{setting}": "log3"})


def test_masked_attention_with_log2_probabilities() -> None:
    """Hidden keys have probabilities of exactly 0, which are on the grid."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, 0]).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, (x[:, 0] > 0)))

    net = Lambda(forward, qkv=nn.Linear(8, 24), head=nn.Linear(8, 4))
    prepared = prepare(net, images(16), recipe("nearest", **SKEWED))
    assert ("masked_fill", "log2", 4) in grids(prepared)
    assert torch.isfinite(prepared.graph(images(4, seed=2))[0]).all()
