"""Decide by the loss what learning has left undecided.

A rounding that the loss holds between two integers is cut off to the nearer one when learning ends. In a unit of a few
hundred weights a single one of those can double the loss: so the least decided ones are tried both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quiesce.quant.fake_quantize import WeightFakeQuantize
from quiesce.reconstruct.batches import Batch, Problem
from quiesce.reconstruct.losses import reconstruction_loss

DECIDED = 0.02
"""Doubt up to which a rounding counts as decided."""
BATCHES = 4
"""Batches that the loss is taken on."""
ROUNDS = 3
"""Most times that each weight is tried: what is best for one changes as others are turned."""


@dataclass
class Doubt:
    """A weight that could be rounded otherwise."""

    quantizer: WeightFakeQuantize
    place: tuple[int, ...]
    """Where in the weight it is."""
    other: Tensor
    """The integer it is not rounded to []."""

    def turn(self) -> None:
        """Round it the other way; twice leaves it as it was."""
        now = self.quantizer.quantized[self.place].clone()
        self.quantizer.quantized[self.place] = self.other
        self.other = now


def undecided(quantizers: Sequence[WeightFakeQuantize], most: int) -> list[Doubt]:
    """Return the weights whose learned rounding is least decided, ``most`` at most, the least decided one first."""
    found: list[tuple[float, Doubt]] = []
    for quantizer in quantizers:
        rounding = quantizer.rounding
        if rounding is None or most == 0:
            continue
        rejected = rounding.rejected()
        doubts = torch.where(rejected == rounding.harden(), 0.0, rounding.doubt()).flatten()
        largest, places = doubts.topk(min(most, doubts.numel()))
        for doubt, place in zip(largest.tolist(), places, strict=True):
            if doubt > DECIDED:
                index = tuple(int(i) for i in torch.unravel_index(place, rejected.shape))
                found.append((doubt, Doubt(quantizer, index, rejected[index].clone())))
    found.sort(key=lambda pair: -pair[0])
    return [doubt for _, doubt in found[:most]]


@torch.no_grad()
def settle(problem: Problem, doubts: Sequence[Doubt], images: Tensor, at_a_time: int) -> int:
    """Turn those of ``doubts``, one after another, that lower the loss of the hardened unit on ``images``.

    Args:
        images: numbers of images [n], of which ``at_a_time`` are worked on at once.

    Returns:
        How many weights are rounded otherwise than before.
    """
    if not doubts:
        return 0
    turned = [False] * len(doubts)
    least, useless = _loss(problem, images, at_a_time), 0
    for i in [*range(len(doubts))] * ROUNDS:
        doubts[i].turn()
        loss = _loss(problem, images, at_a_time)
        if loss < least:
            least, turned[i], useless = loss, not turned[i], 1  # turned back, it would be worse again
        else:
            doubts[i].turn()
            useless += 1
        if useless == len(doubts):
            break
    return sum(turned)


def _loss(problem: Problem, images: Tensor, at_a_time: int) -> float:
    """Return the reconstruction loss on ``images``, those of all processes together."""
    total = torch.zeros((), dtype=problem.targets[0].dtype, device=problem.device)
    for part in torch.split(images, at_a_time):
        batch = Batch.of(problem, part)
        outputs = problem.module(*batch.quantized_inputs)
        total += reconstruction_loss(outputs, batch.targets, batch.weights) * (len(part) / len(images))
    problem.processes.mean_([total])
    return float(total)
