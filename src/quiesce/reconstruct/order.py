"""The images of each step: drawn from all there are, or from a window that moves over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 4
"""Times that an image comes into the window, if it takes part in as many steps: what comes last is not to decide alone
(docs/results.md)."""
USES = 32
"""Steps that an image takes part in on average while it is in the window, if there are steps for more rounds."""


@dataclass(frozen=True)
class Order:
    """The images of all steps, and which of them the window holds at each: numbers, all on the CPU."""

    images: Tensor
    """Of each step [steps, batch], none twice in one."""
    places: Tensor
    """Where in the window they are [steps, batch]."""
    visits: Tensor
    """Images in the order in which they come into the window [visits]: number v comes to the place v % size, where the
    one that has been there longest leaves."""
    first: Tensor
    """Number of the earliest visit that the window holds in each step [steps], never falling."""
    size: int
    """Images in the window."""


def draw_order(
    images: int,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    window: int | None = None,
    together: int = 1,
) -> Order:
    """Draw the batches of all steps from ``images``; neighbours ``together`` stay together.

    A ``window`` of fewer images takes in all of them in random order, as many at a time as a batch has, evenly over the
    steps: ``ROUNDS`` times, or once for each ``USES`` that are made of an image. Where there is none it holds all.
    """
    clips, batch = images // together, batch_size // together
    size = clips if window is None else min(clips, window // together)
    uses = steps * batch // clips
    rounds = max(1, min(ROUNDS, uses), uses // USES) if size < clips else 1
    # The same order in each round: so the window holds no image twice.
    visits = torch.randperm(clips, generator=generator).repeat(rounds) if size < clips else torch.arange(clips)
    groups = -(-(len(visits) - size) // batch)
    first = (torch.arange(steps) * (groups + 1) // steps * batch).clamp(max=len(visits) - size)
    drawn = torch.stack([torch.randperm(size, generator=generator)[:batch] for _ in range(steps)]) + first.unsqueeze(1)
    return Order(
        _each(visits[drawn], together),
        _each(drawn % size, together),
        _each(visits, together),
        first * together,
        size * together,
    )


def _each(clips: Tensor, together: int) -> Tensor:
    """Return the numbers of the images of ``clips`` [..., n] as [..., n · together]."""
    return (clips.unsqueeze(-1) * together + torch.arange(together)).flatten(-2)
