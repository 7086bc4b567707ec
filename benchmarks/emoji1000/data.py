"""Emoji-1000 as data of the command line and of sweeps: ``emoji1000.data:calibration`` and so on."""

from __future__ import annotations

import torch
from torch import Tensor

from emoji1000.art import load_art
from emoji1000.render import normalize, rendered

POOL, TUNING, TEST = 8_192, 5_000, 10_000
"""Images: of the pool that calibration images are drawn from, and of the two sets to evaluate on."""


def calibration(limit: int, seed: int) -> Tensor:
    """Return ``limit`` images [N, 3, 64, 64] drawn from the pool by ``seed``."""
    images, _ = rendered(load_art(), "calibration", POOL)
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
    return normalize(images[order[:limit]])


def tuning() -> list[tuple[Tensor, Tensor]]:
    """Return 5,000 images and their labels, for choices."""
    images, labels = rendered(load_art(), "tuning", TUNING)
    return [(normalize(images), labels)]


def test() -> list[tuple[Tensor, Tensor]]:
    """Return 10,000 images and their labels, for final numbers only."""
    images, labels = rendered(load_art(), "test", TEST)
    return [(normalize(images), labels)]
