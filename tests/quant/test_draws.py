from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quiesce.quant.draws import Draws
from quiesce.quant.kernels import random_bytes


def drawn(images: Tensor, like: Tensor, *, seed: int = 3, step: int = 5, number: int = 2) -> Tensor:
    """Bytes of each image, [images, bytes]."""
    draws = Draws(seed, torch.device("cpu"))
    draws.begin(torch.tensor(step), images)
    return random_bytes(draws.key(number, like), like.numel(), fused=False).view(len(images), -1)


@given(st.permutations(range(6)), st.integers(1, 5))
def test_an_images_bytes_do_not_depend_on_its_batch(order: list[int], first: int) -> None:
    images = torch.tensor(order) + 100
    whole = drawn(images, torch.empty(6, 3, 5))
    parts = [drawn(part, torch.empty(len(part), 3, 5)) for part in (images[:first], images[first:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(drawn(images.sort().values, torch.empty(6, 3, 5)), whole[images.argsort()])


def test_seeds_steps_tensors_and_images_draw_differently() -> None:
    images, like = torch.arange(4), torch.empty(4, 1000)
    first = drawn(images, like)
    others = (
        drawn(images, like, seed=4),
        drawn(images, like, step=6),
        drawn(images, like, number=3),
        drawn(images, like, number=-2),
        drawn(images + 4, like),
        first.roll(1, 0),
    )
    for other in others:
        assert (first == other).float().mean() < 0.02


def test_bytes_are_spread_evenly() -> None:
    counts = torch.bincount(drawn(torch.arange(64), torch.empty(64, 1024)).flatten().long(), minlength=256)
    expected = 64 * 1024 / 256
    chi_squared = ((counts - expected).square() / expected).sum()
    assert 160 < chi_squared < 360  # 255 degrees of freedom, about 4.5 deviations


def test_a_tensor_without_an_axis_of_images_has_bytes_too() -> None:
    draws = Draws(0, torch.device("cpu"))
    draws.begin(torch.tensor(0), torch.arange(4))
    for like in (torch.empty(()), torch.empty(3, 7), torch.empty(5, 4).T):
        assert random_bytes(draws.key(0, like), like.numel(), fused=False).shape == (like.numel(),)
