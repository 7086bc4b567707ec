"""ONNX files of many families of networks compute what the simulation does, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import quiesce
from quiesce.data import Samples
from quiesce.export.parity import Parity, check_parity
from random_weights import randomized, with_statistics
from tiny import images, recipe

SIZES = {
    "timm:resnet10t": 64,
    "timm:mobilenetv2_035": 64,
    "timm:regnetx_002": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "timm:convnext_atto": 64,
    "timm:vit_tiny_patch16_224": 224,
    "timm:mobilenetv3_small_050": 64,
    "timm:tf_efficientnet_lite0": 64,
    "timm:efficientnet_b0": 64,
    "timm:densenet121": 64,
    "timm:deit_tiny_distilled_patch16_224": 224,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:mixer_s32_224": 224,
    "timm:repvgg_a0": 64,
    "timm:ghostnet_050": 64,
    "timm:hrnet_w18_small": 64,
    "timm:dla46_c": 64,
    "timm:res2net50_14w_8s": 64,
    "timm:vgg11": 64,
    "timm:inception_v3": 96,
    "timm:semnasnet_075": 64,
    "timm:tinynet_e": 64,
    "timm:lcnet_035": 64,
    "timm:hardcorenas_a": 64,
    "timm:rexnet_100": 64,
    "timm:efficientvit_b0": 64,
    "timm:levit_128s": 224,
    "timm:poolformer_s12": 64,
    "timm:edgenext_xx_small": 64,
    "timm:mobilevit_xxs": 64,
    "timm:fastvit_t8": 64,
    "timm:xception41": 64,
    "timm:dpn48b": 64,
    "timm:selecsls42": 64,
    "timm:cspresnet50": 64,
    "timm:resnest14d": 64,
    "timm:skresnet18": 64,
    "timm:nf_regnet_b0": 64,
    "timm:mnasnet_small": 64,
    "torchvision:googlenet": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:mobilenet_v2": 64,
}
TWO_BITS = ("timm:resnet10t", "timm:mobilenetv2_035", "timm:regnetx_002", "timm:vit_tiny_patch16_224")
ROUGH = ("timm:levit_128s",)
"""With random weights their attention scores are in the thousands. The last bit of such a score is a thousandth of a
probability, and float32 is as far from float64 in PyTorch too."""
INTEGER_KERNELS = (
    "timm:resnet10t",
    "timm:mobilenetv2_035",
    "timm:regnetx_002",
    "timm:mobilenetv3_small_050",
    "timm:densenet121",
    "timm:ghostnet_050",
    "timm:efficientnet_b0",
    "timm:vgg11",
    "torchvision:googlenet",
)


def but_for(quick: list[str], names: Iterable[str]) -> list[Any]:
    """Names as parameters, of which only the quick ones are in every run."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


def network(name: str) -> nn.Module:
    """Random weights, also where training starts from a constant: there a wrong layer would change nothing."""
    library, _, kind = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(kind, num_classes=10)
    else:
        options = {"init_weights": False} if kind == "googlenet" else {}
        model = torchvision.models.get_model(kind, num_classes=10, **options)
    return with_statistics(randomized(model), Samples((images(6, seed=3, size=SIZES[name]),)))


def quantized(name: str, **settings: object) -> tuple[quiesce.QuantizedModel, Samples]:
    """The network, and other images than those it was calibrated on, of which some values are beyond its grids."""
    size = SIZES[name]
    chosen = recipe("nearest", **{"activation_bits": 8, **settings})
    model = quiesce.quantize(network(name), images(6, size=size), chosen)
    return model, Samples((1.5 * images(5, seed=9, size=size),))


def assert_same(found: Parity, *, rough: bool = False) -> None:
    """No integer differs but at rounding ties, nor do the outputs that are made of these integers.

    From end to end a tie that was broken differently is carried on, far in a network of random weights, so that the
    outputs' distance from the simulation's says nothing about a layer.
    """
    assert found.values > 10_000
    assert found.farthest < (1e-2 if rough else 1e-3)  # float32 rounds long sums
    assert found.mismatches <= found.values * (1e-5 if rough else 1e-6)
    assert found.output_error < 1e-5
    assert found.top1_differs == found.top1_differs_at_tie


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")  # levit keeps a cache
@pytest.mark.parametrize("name", but_for(["timm:resnet10t", "timm:mobilenetv2_035", "timm:convnext_atto"], SIZES))
def test_weights_of_few_bits(name: str, tmp_path: Path) -> None:
    model, x = quantized(name, weight_bits=2 if name in TWO_BITS else 4)
    for compat in (False, True):
        path = model.export_onnx(tmp_path / f"compat-{compat}.onnx", compat=compat).path
        assert_same(check_parity(model.graph_module, path, x, batch_size=4), rough=name in ROUGH)


@pytest.mark.parametrize("name", but_for(["timm:resnet10t"], INTEGER_KERNELS))
def test_integer_kernels(name: str, tmp_path: Path) -> None:
    model, x = quantized(name, weight_bits=8, backend="onnxruntime")
    path = model.export_onnx(tmp_path / "network.onnx", compat=True).path
    assert_same(check_parity(model.graph_module, path, x, batch_size=4))
