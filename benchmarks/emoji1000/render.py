"""The images of Emoji-1000: drawn in batches from seeds, so that nothing but seeds has to be kept.

An image shows one large emoji, turned, scaled, stretched and shifted, over a coloured background; another one is partly
behind it, and a small one in front. Brightness, contrast, colours and pixel noise vary. The class is that of the large
one. Images come in blocks of 250, each from its own seed; the blocks of training, calibration, tuning and test are
disjoint. They have as many pixels as the art that is given: 64 x 64, or fewer to train on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from emoji1000.art import CLASSES, STYLES

BLOCK = 250
"""Images of one seed."""
PARTS = {"training": 0, "calibration": 1, "tuning": 2, "test": 3}
_PART = 1 << 29
"""Block ``i`` of part ``p`` has the seed ``p * 2**29 + i``; torch's generator takes no more than 32 bits of a seed."""
STRENGTH = 1.4
"""How hard the benchmark's images are; chosen once, for a float top-1 of ResNet-18 between 70 and 80 %, and frozen."""
MEAN, STD = 0.5, 0.25
"""Of every channel, by which pixels in [0, 1] are normalized."""


@dataclass(frozen=True)
class Placing:
    """Bounds of how an emoji lies in the image."""

    sides: tuple[float, float]
    """Of its side, in sides of the image; uniform in the logarithm."""
    turn: float
    """Either way, in degrees."""
    centres: tuple[float, float]
    """Of its distance from the middle along either axis, in halves of the image's side."""
    smaller: bool = True
    """Made smaller in easier images."""

    def eased(self, strength: float) -> Placing:
        """Return the bounds for images of ``strength`` 0 to 1."""
        low, high = self.sides
        if self.smaller:
            return replace(self, sides=(low * strength, high * strength))
        nearer = (self.centres[0], self.centres[1] * strength)
        return Placing((high * (low / high) ** strength, high), self.turn * strength, nearer, self.smaller)


LARGE = Placing(sides=(0.45, 1.0), turn=45, centres=(0, 0.25), smaller=False)
BEHIND = Placing(sides=(0.4, 0.9), turn=180, centres=(0.4, 0.8))
FRONT = Placing(sides=(0.2, 0.35), turn=180, centres=(0.2, 0.8))
STRETCH = 0.25
"""Range of the logarithm of an emoji's width over its height."""
BRIGHTNESS, CONTRAST, COLOUR, GRAIN, NOISE = 0.15, 0.5, 0.2, 0.15, 0.08


def normalize(images: Tensor) -> Tensor:
    """Return uint8 images [N, 3, 64, 64] as the networks take them: float32, in [-2, 2]."""
    return images.float().div_(255).sub_(MEAN).div_(STD)


def rendered(art: Tensor, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` images [N, 3, 64, 64] uint8 of ``part`` and their labels [N] int64."""
    blocks = [render(art, part, index) for index in range(math.ceil(count / BLOCK))]
    return torch.cat([b[0] for b in blocks])[:count], torch.cat([b[1] for b in blocks])[:count]


def render(art: Tensor, part: str, index: int, strength: float = STRENGTH) -> tuple[Tensor, Tensor]:
    """Return block ``index`` of ``part``: images [250, 3, H, H] uint8 and labels [250] int64.

    ``art`` [1000, 2, 4, H, H] may lie on any device; random numbers are drawn on the CPU, so that images differ between
    devices by rounding at most. A smaller ``strength``, for the beginning of training, gives easier images: jitter,
    noise and the other emoji's sizes are multiplied by it, and below 1 the large one's turns and shifts.
    """
    draw = _Draw(Generator().manual_seed(PARTS[part] * _PART + index), art.device)
    labels = draw.integers(CLASSES)
    others = [(labels + 1 + draw.integers(CLASSES - 1)) % CLASSES for _ in range(2)]
    image = _background(draw, art.shape[-1])
    image = _over(image, _glyphs(art, others[0], draw, BEHIND.eased(strength)))
    image = _over(image, _glyphs(art, labels, draw, LARGE.eased(min(1.0, strength))))
    image = _over(image, _glyphs(art, others[1], draw, FRONT.eased(strength)))
    return (_jittered(image, draw, strength) * 255).round().to(torch.uint8), labels


class _Draw:
    """Random numbers of one block, each a tensor [250, ...]."""

    def __init__(self, generator: Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def integers(self, bound: int) -> Tensor:
        return torch.randint(bound, (BLOCK,), generator=self.generator).to(self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((BLOCK, *shape), generator=self.generator).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((BLOCK, *shape), generator=self.generator).to(self.device)


def _background(draw: _Draw, pixels: int) -> Tensor:
    """Return [N, 3, H, H] of that many pixels: few random colours, one running into the other."""
    coarse = interpolate(draw.uniform(0, 1, 3, 4, 4), size=(pixels, pixels), mode="bilinear", align_corners=True)
    fine = interpolate(draw.normal(3, 16, 16), size=(pixels, pixels), mode="bilinear", align_corners=True)
    return coarse + draw.uniform(0, GRAIN, 1, 1, 1) * fine


def _glyphs(art: Tensor, classes: Tensor, draw: _Draw, placing: Placing) -> Tensor:
    """Return emoji of ``classes`` [N, 4, H, W] in [0, 1], each in a random style and place."""
    chosen = art[classes, draw.integers(len(STYLES))].float() / 255
    side = draw.uniform(math.log(placing.sides[0]), math.log(placing.sides[1])).exp()
    stretch = draw.uniform(-STRETCH / 2, STRETCH / 2).exp()
    angle = draw.uniform(-placing.turn, placing.turn).deg2rad()
    away = draw.uniform(*placing.centres, 2) * (2 * draw.uniform(0, 1, 2).round() - 1)
    cosine, sine = angle.cos(), angle.sin()
    inverse = torch.stack(  # from places in the image to places in the glyph
        [
            torch.stack([cosine, sine], 1) / (side * stretch)[:, None],
            torch.stack([-sine, cosine], 1) / (side / stretch)[:, None],
        ],
        1,
    )
    matrix = torch.cat([inverse, -inverse @ away[:, :, None]], 2)
    grid = affine_grid(matrix, list(chosen.shape), align_corners=False)
    return grid_sample(chosen, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _over(image: Tensor, glyphs: Tensor) -> Tensor:
    """Lay ``glyphs`` [N, 4, H, W], premultiplied, over ``image`` [N, 3, H, W]."""
    return glyphs[:, :3] + (1 - glyphs[:, 3:]) * image


def _jittered(image: Tensor, draw: _Draw, strength: float) -> Tensor:
    """Vary contrast, brightness and the channels' strengths, and add noise; the result is in [0, 1]."""
    contrast = (strength * draw.uniform(-CONTRAST, CONTRAST, 1, 1, 1)).exp()
    colours = (strength * draw.uniform(-COLOUR, COLOUR, 3, 1, 1)).exp()
    brightness = strength * draw.uniform(-BRIGHTNESS, BRIGHTNESS, 1, 1, 1)
    noise = strength * draw.uniform(0, NOISE, 1, 1, 1) * draw.normal(3, *image.shape[2:])
    return ((image * colours - MEAN) * contrast + MEAN + brightness + noise).clamp(0, 1)
