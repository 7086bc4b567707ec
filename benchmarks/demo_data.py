"""The embedded images of Fashion-MNIST as data of sweeps: ``demo_data:calibration`` and ``demo_data:test``."""

from __future__ import annotations

import torch
from torch import Tensor

from quiesce.demo import load_images


def calibration(limit: int, seed: int) -> Tensor:
    """Return ``limit`` of the 1,024 images of the training set [N, 1, 28, 28], drawn by ``seed``."""
    images, _, _ = load_images()
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]]


def test() -> list[tuple[Tensor, Tensor]]:
    """Return the 2,000 images of the test set and their labels."""
    _, images, labels = load_images()
    return [(images, labels)]
