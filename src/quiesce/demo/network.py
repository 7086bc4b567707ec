"""The demo network: a small MobileNetV2 (Sandler et al., CVPR 2018) for 28 x 28 grey images."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Stage(NamedTuple):
    """A row of blocks: expansion factor, output channels, number of blocks, stride of the first one."""

    expansion: int
    channels: int
    blocks: int
    stride: int


STEM_CHANNELS = 8
LAST_CHANNELS = 128
STAGES = (  # 28 x 28 -> 14 -> 14 -> 7 -> 7 -> 4
    Stage(1, 12, 1, 2),
    Stage(4, 16, 2, 1),
    Stage(4, 24, 3, 2),
    Stage(4, 40, 3, 1),
    Stage(4, 56, 2, 2),
)


class ConvBN(nn.Sequential):
    """Convolution ("same" padding, no bias), batch-norm, and ReLU6 unless ``linear``."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        activation = [] if linear else [nn.ReLU6()]
        super().__init__(conv, nn.BatchNorm2d(outputs), *activation)


class InvertedResidual(nn.Module):
    """Expand (left out for ``expansion`` 1), filter depthwise, project; with a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [ConvBN(inputs, hidden, 1)]
        depthwise = ConvBN(hidden, hidden, 3, stride=stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, ConvBN(hidden, outputs, 1, linear=True))
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_skip else y


class DemoNet(nn.Module):
    """Images [N, 1, 28, 28] to logits [N, ``classes``].

    ``features`` holds the stem, the blocks and the last 1 x 1 convolution, as in torchvision's MobileNetV2.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvBN(1, STEM_CHANNELS, 3)]
        channels = STEM_CHANNELS
        for stage in STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                layers.append(InvertedResidual(channels, stage.channels, stage.expansion, stride))
                channels = stage.channels
        layers.append(ConvBN(channels, LAST_CHANNELS, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(LAST_CHANNELS, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits
