"""The networks of Emoji-1000: architectures of the paper at 64 x 64 pixels, with the second halving left out.

Without that, the last features of a 64 x 64 image would have 2 x 2 places; so they have 4 x 4.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
import torchvision
from safetensors.torch import load_file
from torch import nn

from emoji1000.art import CLASSES

WEIGHTS = Path(__file__).parents[1] / "weights"


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 without the pooling behind its first convolution."""
    network: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
    network.maxpool = nn.Identity()
    return network.eval()


def resnet50() -> nn.Module:
    """torchvision's ResNet-50 without the pooling behind its first convolution."""
    network: nn.Module = torchvision.models.resnet50(num_classes=CLASSES)
    network.maxpool = nn.Identity()
    return network.eval()


def mobilenetv2_100() -> nn.Module:
    return _mobilenetv2(1.0)


def mobilenetv2_075() -> nn.Module:
    return _mobilenetv2(0.75)


def mobilenetv2_050() -> nn.Module:
    return _mobilenetv2(0.5)


def mobilenetv2_035() -> nn.Module:
    return _mobilenetv2(0.35)


def _mobilenetv2(width: float) -> nn.Module:
    """torchvision's MobileNetV2 with the stride of its second stage set to 1."""
    network: nn.Module = torchvision.models.mobilenet_v2(num_classes=CLASSES, width_mult=width, dropout=0.0)
    _unstride(network.get_submodule("features.2"))
    return network.eval()


def regnetx_600mf() -> nn.Module:
    """timm's RegNetX-600MF with the stride of its first stage set to 1."""
    network: nn.Module = timm.create_model("regnetx_006", pretrained=False, num_classes=CLASSES)
    _unstride(network.get_submodule("s1"))
    return network.eval()


def _unstride(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build
    for build in (
        resnet18,
        resnet50,
        mobilenetv2_100,
        mobilenetv2_075,
        mobilenetv2_050,
        mobilenetv2_035,
        regnetx_600mf,
    )
}


def weights_file(name: str) -> Path:
    """Return where the trained weights of network ``name`` are kept: float16, batch-norm statistics float32."""
    return WEIGHTS / f"emoji1000_{name}.safetensors"


def trained(name: str) -> nn.Module:
    """Return network ``name`` with its trained weights, as float32, in evaluation mode."""
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights_file(name)))
    return network
