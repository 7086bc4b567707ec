"""Saving and loading: bit-identical in a fresh process, and closed to whatever a file may hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quiesce
from fresh_process import check_identical
from quiesce import QuantizedModel, Recipe
from quiesce.errors import FileFormatError, ModelError, OutputError
from quiesce.export.checkpoint import GRAPH_FILE, TENSOR_FILE
from quiesce.export.operators import operators
from quiesce.export.packing import unpack
from quiesce.graph.capture import TensorForm, interface_of
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers

PAGE = Path(__file__).parents[2] / "docs/checkpoint.md"


class Attention(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.nn.functional.hardsigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return x * scale


class Varied(nn.Module):
    """Group convolution, batch-norm, hard-swish, squeeze-and-excitation, channel shuffle by views, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.attention = Attention(8)
        self.act = nn.Hardswish(inplace=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y = self.grouped(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last((x + self.attention(y)).mean((2, 3)))


class Nested(nn.Module):
    """Keyword inputs, and a dict with a tuple and None out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        a, b = self.a(left), self.b(right)
        return {"sum": a + b, "both": (a.relu(), b), "nothing": None}


def quantized(model: nn.Module, calibration: object, **settings: Any) -> QuantizedModel:
    recipe = Recipe.preset("brecq-fast", steps=2, batch_size=4, **settings)
    return quiesce.quantize(model.eval(), calibration, recipe)


@pytest.fixture(scope="module")
def varied() -> QuantizedModel:
    torch.manual_seed(0)
    return quantized(Varied(), torch.randn(8, 3, 8, 8), weight_bits=3)


@pytest.fixture
def saved(varied: QuantizedModel, tmp_path: Path) -> Path:
    return varied.save(tmp_path / "net")


def test_loads_bit_identical_in_a_fresh_process(varied: QuantizedModel, saved: Path) -> None:
    check_identical(varied, saved, torch.randn(5, 3, 8, 8))


@pytest.mark.parametrize(
    "settings", [{"weight_symmetric": True}, {"weight_per_channel": False}, {"activation_bits": None}]
)
def test_every_kind_of_grid_loads_bit_identical(settings: dict[str, Any], tmp_path: Path) -> None:
    network = quantized(Varied(), torch.randn(8, 3, 8, 8), **settings)
    network.save(tmp_path / "net")
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(quiesce.load(tmp_path / "net")(x), network(x))


def test_nested_inputs_and_outputs(tmp_path: Path) -> None:
    network = quantized(Nested(), [{"left": torch.randn(8, 6), "right": torch.randn(8, 6)}])
    network.save(tmp_path / "net")
    loaded = quiesce.load(tmp_path / "net")
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    made, again = network(left=x, right=y), loaded(right=y, left=x)
    assert list(again) == ["sum", "both", "nothing"]
    assert again["nothing"] is None
    assert isinstance(again["both"], tuple)
    assert torch.equal(made["both"][1], again["both"][1])
    with pytest.raises(ModelError, match=r"call it with: 0 positional, left, right"):
        loaded(x, y)


def test_what_is_kept_beside_the_network(varied: QuantizedModel, saved: Path) -> None:
    loaded = quiesce.load(saved)
    assert loaded.result == varied.result
    assert loaded.recipe == varied.recipe
    assert {p.name for p in saved.iterdir()} == {GRAPH_FILE, TENSOR_FILE, "result.json", "recipe.toml"}
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in saved.iterdir())


def test_weights_are_stored_as_packed_integers_only(varied: QuantizedModel, saved: Path) -> None:
    tensors = load_file(saved / TENSOR_FILE)
    assert not any(name.endswith("weight") for name in tensors)
    weights = {n: q for n, q in fake_quantizers(varied.graph_module).items() if isinstance(q, WeightFakeQuantize)}
    assert sorted(q.spec.bits for q in weights.values()) == [3, 3, 3, 8, 8]
    for name, quantizer in weights.items():
        packed = tensors[f"{name}.quantized"]
        again = unpack(packed, quantizer.spec.bits, quantizer.quantized.shape, signed=False)
        assert torch.equal(again, quantizer.quantized)


def test_code_of_the_page_reads_the_integers(
    varied: QuantizedModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.rename(saved.parent / "out").parent)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), scope)
    weights = {n: q for n, q in fake_quantizers(varied.graph_module).items() if isinstance(q, WeightFakeQuantize)}
    assert scope["integers"].keys() == weights.keys()
    for name, quantizer in weights.items():
        assert np.array_equal(scope["integers"][name], quantizer.quantized.numpy())


def test_symmetric_grids_store_no_zero_points(tmp_path: Path) -> None:
    network = quantized(Varied(), torch.randn(8, 3, 8, 8), weight_symmetric=True, activation_symmetric=True)
    stored = load_file(network.save(tmp_path / "net") / TENSOR_FILE)
    assert not any(name.endswith("zero_point") for name in stored)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(quiesce.load(tmp_path / "net")(x), network(x))


def test_the_first_version_is_refused(saved: Path) -> None:
    path = saved / GRAPH_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 1}))
    with pytest.raises(FileFormatError, match=r"has version 1, and this program reads 2; use a matching one"):
        quiesce.load(saved)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_number_of_bits_loads_bit_identical(bits: int, symmetric: bool, tmp_path: Path) -> None:
    settings = {"weight_bits": bits, "weight_symmetric": symmetric, "activation_bits": bits}
    network = quantized(Nested(), [{"left": torch.randn(8, 6), "right": torch.randn(8, 6)}], **settings)
    loaded = quiesce.load(network.save(tmp_path / "net"))
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    assert torch.equal(loaded(left=x, right=y)["sum"], network(left=x, right=y)["sum"])


def test_loading_again_after_saving_a_loaded_network(saved: Path, tmp_path: Path) -> None:
    loaded = quiesce.load(saved)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / GRAPH_FILE).read_text() == (saved / GRAPH_FILE).read_text()


def test_a_folder_with_other_files_is_kept(varied: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds"):
        varied.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_operator_off_the_list_is_refused_before_any_work() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand_like(x)

    with pytest.raises(ModelError, match=r"operator aten\.rand_like.* is not among those that can be saved"):
        quantized(Random(), torch.randn(8, 4))


class SelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), dropout

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout)


def test_attention_is_saved_without_dropout_only(tmp_path: Path) -> None:
    network = quantized(SelfAttention(0.0), torch.randn(8, 4, 8))
    network.save(tmp_path / "net")
    x = torch.randn(3, 4, 8)
    assert torch.equal(quiesce.load(tmp_path / "net")(x), network(x))
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        quantized(SelfAttention(0.5), torch.randn(8, 4, 8))
    path = tmp_path / "net" / GRAPH_FILE
    document = json.loads(path.read_text())
    row = next(r for r in document["nodes"] if r.get("target") == "aten.matmul.default")
    row["target"], row["args"] = "aten.scaled_dot_product_attention.default", [row["args"][0]] * 3
    path.write_text(json.dumps(document))
    quiesce.load(tmp_path / "net")  # whole attention without dropout is on the list
    row["kwargs"] = {"dict": {"dropout_p": 0.5}}
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="random"):
        quiesce.load(tmp_path / "net")


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(5, 6, num_layers=2, dropout=0.5, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0])


def test_recurrent_layers_are_saved_for_inference_only(tmp_path: Path) -> None:
    network = quantized(Recurrent(), torch.randn(8, 4, 5))
    network.save(tmp_path / "net")
    x = torch.randn(3, 4, 5)
    assert torch.equal(quiesce.load(tmp_path / "net")(x), network(x))
    path = tmp_path / "net" / GRAPH_FILE
    document = json.loads(path.read_text())
    row = next(r for r in document["nodes"] if r.get("target", "").startswith("aten.gru"))
    assert row["args"][5:7] == [0.5, False]
    row["args"][6] = True
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="random"):
        quiesce.load(tmp_path / "net")


WITH_DROPOUT = {"scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu"}


def test_operators_are_pure() -> None:
    for name, operator in operators().items():
        if name.startswith("aten."):
            assert not operator._schema.is_mutable, name
            random = torch.Tag.nondeterministic_seeded in operator.tags
            # Attention and recurrent layers draw random numbers for their dropout only, and are refused with it.
            assert random == (name.split(".")[1] in WITH_DROPOUT), name
    assert {"aten.conv2d.default", "aten.linear.default", "operator.getitem"} <= set(operators())


Damage = Callable[[dict[str, Any]], None]


def first(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(row for row in document["nodes"] if row["op"] == op)


def put(row: Callable[[dict[str, Any]], dict[str, Any]], key: str, value: Any) -> Damage:
    def damage(document: dict[str, Any]) -> None:
        row(document)[key] = value

    return damage


def call(document: dict[str, Any]) -> dict[str, Any]:
    return first(document, "call")


CODE = "a=1) if __import__('os').system('touch executed') else (x"
DAMAGES: dict[str, Damage] = {
    "another format": put(lambda d: d, "format", "something else"),
    "another version": put(lambda d: d, "version", 99),
    "operator not allowed": put(call, "target", "aten.rand_like.default"),
    "operator outside of ATen": put(call, "target", "os.system"),
    "unknown node kind": put(call, "op", "exec"),
    "unknown node": put(call, "args", [{"node": "nowhere"}]),
    "unknown constant": put(call, "args", [{"dtype": "object"}]),
    "arguments that are none": put(call, "args", 3),
    "code as a keyword": put(call, "kwargs", {"dict": {CODE: 1}}),
    "a keyword of another operator": put(call, "kwargs", {"dict": {"out": 1}}),
    "keywords that are none": put(call, "kwargs", []),
    "code as a node's name": put(call, "name", CODE),
    "a keyword as a node's name": put(lambda d: first(d, "input"), "name", "lambda"),
    "code as a tensor's name": put(lambda d: first(d, "tensor"), "tensor", CODE),
    "a missing tensor": put(lambda d: first(d, "tensor"), "tensor", "absent"),
    "code as a quantizer's name": put(lambda d: first(d, "quantize"), "quantizer", CODE),
    "an unknown quantizer": put(lambda d: first(d, "quantize"), "quantizer", "absent"),
    "bits out of range": put(lambda d: next(iter(d["quantizers"].values())), "bits", 64),
    "an axis out of range": put(
        lambda d: next(q for q in d["quantizers"].values() if q["kind"] == "weight"), "ch_axis", 9
    ),
    "signed instead of unsigned": put(
        lambda d: next(q for q in d["quantizers"].values() if q["kind"] == "weight"), "symmetric", True
    ),
    "no outputs": put(lambda d: d, "outputs", None),
    "unknown outputs": put(lambda d: d, "outputs", ["nowhere"]),
    "a broken interface": put(lambda d: d["interface"], "outputs", {"object": 1}),
    "an output that the graph lacks": put(lambda d: d["interface"], "outputs", {"tensor": 1}),
    "an input that the graph lacks": put(
        lambda d: d["interface"], "inputs", {"tuple": [{"tuple": [{"tensor": 1}]}, {"dict": []}]}
    ),
    "arguments by numbers": put(
        lambda d: d["interface"], "inputs", {"tuple": [{"tuple": []}, {"dict": [[1, {"tensor": 0}]]}]}
    ),
    "no form of an input": put(lambda d: d["interface"], "forms", []),
    "a form with a negative size": put(lambda d: d["interface"]["forms"][0], "shape", [None, -3]),
    "a form of an unknown dtype": put(lambda d: d["interface"]["forms"][0], "dtype", "object"),
    "a broken recipe": put(lambda d: d["recipe"], "seed", "one"),
    "nodes that are none": put(lambda d: d, "nodes", {"op": "call"}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_tampered_graph_is_refused(name: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved / GRAPH_FILE
    document = json.loads(path.read_text())
    DAMAGES[name](document)
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError):
        quiesce.load(saved)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", [GRAPH_FILE, TENSOR_FILE, "result.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(file: str, share: float, saved: Path) -> None:
    data = (saved / file).read_bytes()
    (saved / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(FileFormatError, match=file.replace(".", r"\.")):
        quiesce.load(saved)


@pytest.mark.parametrize("file", [GRAPH_FILE, TENSOR_FILE, "result.json"])
def test_a_missing_or_foreign_file_is_refused(file: str, saved: Path) -> None:
    (saved / file).write_bytes(b"\x89PNG\r\n not one of ours" * 10)
    with pytest.raises(FileFormatError, match=file.replace(".", r"\.")):
        quiesce.load(saved)
    (saved / file).unlink()
    with pytest.raises(FileFormatError, match=file.replace(".", r"\.")):
        quiesce.load(saved)


def test_forms_of_the_inputs_are_kept(varied: QuantizedModel, saved: Path) -> None:
    forms = interface_of(quiesce.load(saved).graph_module).forms
    assert forms == interface_of(varied.graph_module).forms == (TensorForm(torch.float32, (None, 3, 8, 8)),)
    stored = json.loads((saved / GRAPH_FILE).read_text())["interface"]["forms"]
    assert stored == [{"dtype": "float32", "shape": [None, 3, 8, 8]}]
