"""What a runtime computes on integers, when it is given a network that was quantized for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_onnx import operators_run
from torch import Tensor, nn

import quiesce
from quiesce.export.onnx import export_onnx
from quiesce.quant.fake_quantize import ActivationFakeQuantize
from quiesce.recipe import Recipe
from small_nets import Lambda, conv

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _residual(self: Any, x: Tensor) -> Tensor:
    x = F.relu6(self.stem(x))
    return self.head((self.b(F.hardswish(self.a(x))) + x).relu())


def _branches(self: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(self.stem(x).relu(), 2)
    x = torch.cat([F.silu(self.a(x)), self.b(F.pad(x, (1, 1, 1, 1)))[:, :, 1:-1, 1:-1]], 1)
    return self.head(x)


def _excitation(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x).relu()
    gate = F.hardsigmoid(self.b(self.a(F.adaptive_avg_pool2d(x, 1)).relu()))
    return self.head(x * gate)


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Lambda(
        _residual, stem=conv(3, 4), a=conv(4, 4, padding=1), b=conv(4, 4, padding=1, groups=4), head=conv(4, 2)
    ),
    "branches": lambda: Lambda(
        _branches, stem=conv(3, 4), a=conv(4, 4, padding=1), b=conv(4, 4, padding=1), head=conv(8, 2)
    ),
    "excitation": lambda: Lambda(_excitation, stem=conv(3, 4), a=conv(4, 2, 1), b=conv(2, 4, 1), head=conv(4, 2)),
}


def exported(net: str, backend: str, folder: Path) -> Path:
    torch.manual_seed(5)
    recipe = Recipe.preset("nearest", backend=backend, weight_bits=8, activation_bits=8)
    quantized = quiesce.quantize(NETS[net]().eval(), IMAGES, recipe)
    path = folder / "network.onnx"
    export_onnx(quantized.graph_module, recipe, path)
    return path


# What the runtime has on integers besides convolutions. Activation functions are computed in float between quantizers.
BESIDES = {"residual": "QLinearAdd", "branches": "QLinearConcat", "excitation": "QLinearMul"}


@pytest.mark.parametrize("net", NETS)
def test_onnxruntime_has_integer_kernels_for_all_convolutions(net: str, tmp_path: Path) -> None:
    kernels = operators_run(exported(net, "onnxruntime", tmp_path), tmp_path)
    assert kernels["QLinearConv"] == 4 and kernels[BESIDES[net]] == 1, kernels
    assert not {"Conv", "FusedConv", "Add", "Concat"} & set(kernels)


@pytest.mark.parametrize("net", NETS)
def test_openvino_computes_all_convolutions_on_integers(net: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(str(exported(net, "openvino", tmp_path)))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    nodes = openvino.Core().compile_model(model, "CPU", settings).get_runtime_model().get_ordered_ops()
    info = [node.get_rt_info() for node in nodes]
    kinds = [tuple(i[key].astype(str) for key in ("layerType", "runtimePrecision")) for i in info if "layerType" in i]
    precisions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert len(precisions) == 4 and set(precisions) <= {"u8", "i8"}, kinds


def test_learned_grids_behind_a_relu6_end_at_6(tmp_path: Path) -> None:
    """Above 6 the runtime would have to cut off within the grid, and computes in float instead."""
    settings = {"weight_bits": 8, "activation_bits": 8, "steps": 30, "batch_size": 8, "step_size_lr": 0.01}
    ends = {}
    for backend in ("academic", "onnxruntime"):
        torch.manual_seed(5)
        net = nn.Sequential(conv(3, 4), nn.ReLU6(), conv(4, 4), nn.ReLU6(), conv(4, 2)).eval()
        recipe = Recipe.preset("brecq-fast", backend=backend, **settings)
        quantized = quiesce.quantize(net, 4 * IMAGES, recipe)
        quantizers = [q for q in quantized.graph_module.modules() if isinstance(q, ActivationFakeQuantize)]
        ends[backend] = max(float(q.scale * (255 - q.zero_point)) for q in quantizers[1:3])
    assert ends["academic"] > 6.01, "nothing was learned that would have to be held back"
    assert ends["onnxruntime"] <= 6 + 1e-6
    path = quantized.export_onnx(tmp_path / "network.onnx").path
    assert operators_run(path, tmp_path)["QLinearConv"] == 3
