"""The placement contract: what every backend quantizes, and what each quantizes beyond that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.evaluate import compare
from quiesce.graph.backends import BACKENDS
from quiesce.graph.calibrate import calibrate
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.ops import input_node, is_weight_op, origin, weight_node
from quiesce.graph.partition import partition
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from quiesce.recipe import Recipe
from small_nets import CASES, Lambda, call, captured, conv, outputs, placed

IMAGES = Samples((torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


def _relu6(self: Any, x: Tensor) -> Tensor:
    """ReLU6 in the three forms that a graph may hold."""
    return self.head(F.relu6(self.c(self.b(F.hardtanh(self.a(x), 0, 6)).clamp(0, 6))))


def _residual(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    return self.head((self.b(self.a(x).relu()) + x).relu())


def _downsample(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    return self.head(self.a(x) + self.b(x))


def _concat(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.cat([self.a(x).relu(), self.b(x)], 1))


def _pools(self: Any, x: Tensor) -> Tensor:
    x = F.avg_pool2d(F.max_pool2d(self.stem(x).relu(), 2), 2)
    return self.head(F.adaptive_avg_pool2d(self.a(x).relu(), 1).flatten(1))


def _excitation(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    gate = F.hardsigmoid(self.b(self.a(x.mean((2, 3), keepdim=True)).relu()))
    return self.head((x * gate).mean((2, 3)))


def _shuffle(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    x = x.view(x.shape[0], 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
    return self.head(F.pad(x, (1, 1, 1, 1)))


def _scaled(self: Any, x: Tensor) -> Tensor:
    """Additions and products with numbers and constants, and means that are no pools."""
    x = self.stem(x) * 0.5 + 1
    x = x + self.offset + x.mean(1, keepdim=True)
    return self.head(x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "relu6": lambda: Lambda(_relu6, a=conv(3, 4), b=conv(4, 4), c=conv(4, 2, 1), head=conv(2, 2)),
    "hardswish": lambda: nn.Sequential(
        conv(3, 4), nn.Hardswish(), conv(4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)
    ),
    "hardtanh": lambda: nn.Sequential(conv(3, 4), nn.Hardtanh(-1, 1), conv(4, 2)),
    "residual": lambda: Lambda(
        _residual, stem=conv(3, 4), a=conv(4, 4, padding=1), b=conv(4, 4, padding=1), head=conv(4, 2)
    ),
    "downsample": lambda: Lambda(_downsample, stem=conv(3, 4), a=conv(4, 4), b=conv(4, 4), head=conv(4, 2)),
    "concat": lambda: Lambda(_concat, a=conv(3, 4), b=conv(3, 4), head=conv(8, 2)),
    "pools": lambda: Lambda(_pools, stem=conv(3, 4, padding=1), a=conv(4, 4, padding=1), head=nn.Linear(4, 2)),
    "excitation": lambda: Lambda(_excitation, stem=conv(3, 4), a=conv(4, 2, 1), b=conv(2, 4, 1), head=nn.Linear(4, 2)),
    "shuffle": lambda: Lambda(_shuffle, stem=conv(3, 4), head=conv(4, 2)),
    "numbers": lambda: Lambda(_scaled, stem=conv(3, 4), offset=nn.Parameter(torch.rand(4, 1, 1)), head=conv(4, 2)),
}


@cache
def graph(net: str) -> fx.GraphModule:
    torch.manual_seed(5)
    return capture(NETS[net]().eval(), IMAGES)


def recipe(backend: str, **settings: Any) -> Recipe:
    return Recipe.preset("nearest", backend=backend, **{"weight_bits": 8, "activation_bits": 8, **settings})


def activation_bits(gm: fx.GraphModule) -> dict[str, int]:
    """Bits of each quantized tensor, by the operator that makes it: ``x``, ``conv2d``, ``conv2d_1``, …"""
    found: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for node in gm.graph.nodes:
        name = "x" if node.op == "placeholder" else str(node.target).split(".")[-2 if node.op == "call_function" else 0]
        label = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        quantizers = [getattr(gm, str(user.target)) for user in node.users if user.op == "call_module"]
        found.update((label, q.spec.bits) for q in quantizers if isinstance(q, ActivationFakeQuantize))
    return found


def quantized_tensors(gm: fx.GraphModule) -> set[str]:
    return set(activation_bits(gm))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", NETS)
def test_everywhere_weights_and_inputs_of_layers_are_quantized_each_once(net: str, backend: str) -> None:
    check_contract(placed(graph(net), recipe(backend)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_contract_holds_for_odd_networks(case: str, backend: str) -> None:
    check_contract(placed(captured(case), recipe(backend)), backend)


def check_contract(gm: fx.GraphModule, backend: str) -> None:
    quantizers = {n: getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "call_module"}
    assert len({n.target for n in quantizers}) == len(quantizers)
    pass_ops = BACKENDS[backend].pass_ops
    for node in quantizers:
        (source,) = node.args
        assert list(source.users) == [node], f"{source} is also read unquantized"
        assert origin(source, pass_ops) not in quantizers, f"{source} is on a grid already"
    for layer in [n for n in gm.graph.nodes if is_weight_op(n)]:
        assert isinstance(quantizers[weight_node(layer)], WeightFakeQuantize)
        assert isinstance(quantizers[origin(input_node(layer), pass_ops)], ActivationFakeQuantize)


# Tensors that are quantized, by the node that makes them.
PLACES: dict[str, dict[str, str]] = {
    "relu6": {
        "academic": "x hardtanh clamp relu6",
        "onnxruntime": "x hardtanh clamp relu6 conv2d_3",
        "openvino": "x hardtanh clamp relu6",
        "tensorrt": "x hardtanh clamp relu6",
    },
    "hardswish": {
        "academic": "x hardswish reshape",
        "onnxruntime": "x conv2d hardswish conv2d_1 silu",
        "openvino": "x hardswish silu",
        "tensorrt": "x hardswish silu",
    },
    "hardtanh": {
        "academic": "x hardtanh",
        "onnxruntime": "x conv2d hardtanh conv2d_1",
        "openvino": "x hardtanh",
        "tensorrt": "x hardtanh",
    },
    "residual": {
        "academic": "x relu relu_1 relu_2",
        "onnxruntime": "x relu relu_1 conv2d_2 relu_2 conv2d_3",
        "openvino": "x relu relu_1 relu_2",
        "tensorrt": "x relu relu_1 relu_2",
    },
    "downsample": {
        "academic": "x relu add",
        "onnxruntime": "x relu conv2d_1 conv2d_2 add conv2d_3",
        "openvino": "x relu conv2d_1 add",
        "tensorrt": "x relu conv2d_1 add",
    },
    "concat": {
        "academic": "x cat",
        "onnxruntime": "x relu conv2d_1 cat conv2d_2",
        "openvino": "x cat",
        "tensorrt": "x cat",
    },
    "pools": {
        "academic": "x avg_pool2d reshape",
        "onnxruntime": "x relu avg_pool2d relu_1 adaptive_avg_pool2d",
        "openvino": "x relu avg_pool2d relu_1 adaptive_avg_pool2d",
        "tensorrt": "x avg_pool2d adaptive_avg_pool2d",
    },
    "excitation": {
        "academic": "x mean relu_1 mean_1",
        "onnxruntime": "x relu mean relu_1 conv2d_2 hardsigmoid mul mean_1",
        "openvino": "x relu mean relu_1 mul mean_1",
        "tensorrt": "x mean relu_1 mean_1",
    },
    "shuffle": {
        "academic": "x pad",
        "onnxruntime": "x conv2d conv2d_1",
        "openvino": "x conv2d",
        "tensorrt": "x conv2d",
    },
    "numbers": {
        "academic": "x add_2",
        "onnxruntime": "x conv2d add_1 mean add_2 conv2d_1",
        "openvino": "x add_1 mean add_2",
        "tensorrt": "x add_1 mean add_2",
    },
}


@pytest.mark.parametrize(("net", "backend"), [(n, b) for n, places in PLACES.items() for b in places])
def test_places_are_those_documented(net: str, backend: str) -> None:
    assert quantized_tensors(placed(graph(net), recipe(backend))) == set(PLACES[net][backend].split())


def test_the_table_of_places_is_complete() -> None:
    assert set(PLACES) == set(NETS) and all(set(places) == set(BACKENDS) for places in PLACES.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", NETS)
def test_at_8_bits_every_backend_stays_close_to_float(net: str, backend: str) -> None:
    settings = recipe(backend)
    gm = calibrate(placed(graph(net), settings), IMAGES, settings)
    folded, _ = fold(graph(net))
    sqnr = compare(outputs(call(gm), IMAGES), None, outputs(call(folded), IMAGES)).sqnr_db
    assert sqnr is not None and 25 < sqnr < 80


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("net", ["residual", "downsample", "pools", "excitation", "shuffle"])
def test_units_are_the_same_in_every_backend(net: str, granularity: str) -> None:
    units = [partition(placed(graph(net), recipe(backend)), granularity) for backend in BACKENDS]
    layers = [[(u.name, u.layers) for u in found] for found in units]
    assert all(found == layers[0] for found in layers)


def test_bits_of_further_tensors() -> None:
    """Those of activations, and those of both ends where the caller gets the tensor."""
    gm = placed(graph("downsample"), recipe("onnxruntime", activation_bits=4, activation_first_last_bits=7))
    ends, inner = dict.fromkeys(["x", "add", "conv2d_3"], 7), dict.fromkeys(["relu", "conv2d_1", "conv2d_2"], 4)
    assert activation_bits(gm) == ends | inner


def test_float_activations_stay_float_everywhere() -> None:
    for backend in ("academic", "onnxruntime", "openvino"):
        assert not quantized_tensors(placed(graph("residual"), recipe(backend, activation_bits=None)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_those_the_runtime_takes(backend: str) -> None:
    gm = placed(graph("pools"), recipe(backend))
    specs = {n.op: getattr(gm, m.target).spec for m in gm.graph.nodes if m.op == "call_module" for n in m.args}
    signed = {"academic": (False, False), "tensorrt": (True, True)}.get(backend, (True, False))
    assert (specs["get_attr"].symmetric, specs["call_function"].symmetric) == signed
    assert specs["get_attr"].ch_axis == 0
    if backend == "tensorrt":
        assert (specs["call_function"].quant_min, specs["call_function"].quant_max) == (-128, 127)
