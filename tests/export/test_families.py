"""ONNX files of many families of networks compute what the simulation does, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import quiesce
from quiesce.data import Samples
from quiesce.export.parity import check_parity
from tiny import images, recipe

SIZES = {
    "timm:resnet10t": 64,
    "timm:mobilenetv2_035": 64,
    "timm:regnetx_002": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "timm:convnext_atto": 64,
    # the rest takes minutes
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
QUICK = list(SIZES)[:5]


def network(name: str) -> nn.Module:
    """Random weights, also where training starts from a constant: there a wrong layer would change nothing."""
    library, _, kind = name.partition(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(kind, num_classes=10)
    else:
        options = {"init_weights": False} if kind == "googlenet" else {}
        model = torchvision.models.get_model(kind, num_classes=10, **options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.min() == parameter.max():
                is_factor = parameter.numel() == max(parameter.shape, default=1) and not key.endswith("bias")
                parameter.uniform_(*((0.5, 1.5) if is_factor else (-0.3, 0.3)))
    return with_statistics(model.eval(), images(6, seed=3, size=SIZES[name]))


@torch.no_grad()
def with_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """The network with batch-norm statistics of ``x``, so that values neither grow nor fade from layer to layer."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.train()
    model(x)
    return model.eval()


def quantized(name: str, **settings: object) -> tuple[quiesce.QuantizedModel, Samples]:
    """The network, and other images than those it was calibrated on, of which some values are beyond its grids."""
    size = SIZES[name]
    chosen = recipe("nearest", **{"activation_bits": 8, **settings})
    model = quiesce.quantize(network(name), images(6, size=size), chosen)
    return model, Samples((1.5 * images(5, seed=9, size=size),))


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")  # levit keeps a cache
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in SIZES])
def test_packed_weights(name: str, tmp_path: Path) -> None:
    model, x = quantized(name, weight_bits=2 if name in QUICK[:2] else 4)
    path = model.export_onnx(tmp_path / "network.onnx").path
    found = check_parity(model.graph_module, path, x, layer_images=4)
    assert found.values > 10_000
    assert found.farthest < 1e-3  # float32 rounds long sums
    assert found.mismatches <= found.values * 1e-6
    # A tie that is broken differently is carried on, far in a network of random weights; a wrong layer is at 0 dB.
    assert found.sqnr_db is None or found.sqnr_db > 10
    assert found.output_error < 1e-4
    assert found.top1_differs == found.top1_differs_at_tie


@pytest.mark.parametrize(
    "name",
    [
        *("timm:resnet10t", "timm:mobilenetv2_035"),
        *(
            pytest.param(n, marks=pytest.mark.long)
            for n in SIZES
            if n.split(":")[1].startswith(
                ("regnetx", "mobilenetv3", "dense", "ghost", "efficientnet_b0", "vgg", "googl")
            )
        ),
    ],
)
def test_integer_kernels(name: str, tmp_path: Path) -> None:
    model, x = quantized(name, weight_bits=8, backend="onnxruntime")
    path = model.export_onnx(tmp_path / "network.onnx", compat=True).path
    found = check_parity(model.graph_module, path, x, layer_images=4)
    assert found.farthest < 1e-3
    assert found.mismatches <= found.values * 1e-6
    assert found.sqnr_db is None or found.sqnr_db > 10
