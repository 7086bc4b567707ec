"""Oscillation: the reconstruction loss of every original module, and how far it swings between neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quiesce.graph.ops import Hyperparameters, hyperparameters, weight_node
from quiesce.graph.place import weight_layers
from quiesce.graph.unit import Unit
from quiesce.memory import Rows
from quiesce.processes import ALONE, Processes

IMAGES_AT_ONCE = 8
"""Images of a stream that are compared at a time."""


@dataclass(frozen=True)
class ModuleLoss:
    """L_i of one module (arXiv 2303.11906, eq. 3), absolute and as a share of its float output's energy."""

    absolute: float
    """E‖f_i(X_i; W_i) − f̂_i(X̂_i; Ŵ_i)‖²: summed over channels, averaged over images and positions."""
    relative: float
    """The same divided by E‖f_i(X_i; W_i)‖²."""


@dataclass(frozen=True)
class Oscillation:
    """What a curve of module losses comes to."""

    peak: float
    final: float
    oscillation: float
    """Σ (L_i − L_{i+1})² over neighbouring modules."""


def module_loss(
    teacher: Mapping[str, Rows],
    student: Mapping[str, Rows],
    produced: Sequence[str],
    processes: Processes = ALONE,
) -> ModuleLoss:
    """Compare the two streams behind a module on the tensors it ``produced``; one passed through is not its own.

    Tensors are [images, channels, ...], of which ``processes`` have others; masks and indices are left out.
    """
    absolute = energy = 0.0
    for name in produced:
        target = teacher[name]
        if not target.is_floating_point():
            continue
        channels = target.shape[1] if target.ndim > 1 else 1
        noise, power, entries = squares(student[name], target, processes)
        positions = entries / channels
        absolute += noise / positions
        energy += power / positions
    return ModuleLoss(absolute, absolute / energy if energy > 0 else 0.0)


def squares(student: Rows, teacher: Rows, processes: Processes) -> tuple[float, float, float]:
    """Return Σ (ŷ − y)² and Σ y² over all entries, and their number, those of other ``processes`` included.

    Summed in float64, few images in memory at a time.
    """
    sums = torch.tensor([0.0, 0.0, math.prod(teacher.shape)], dtype=torch.float64)
    for first in range(0, len(teacher), IMAGES_AT_ONCE):
        part = slice(first, first + IMAGES_AT_ONCE)
        target = teacher[part]
        sums[:2] += torch.stack([_sum_of_squares(student[part] - target), _sum_of_squares(target)]).cpu()
    noise, power, entries = processes.sum(sums).tolist()
    return noise, power, entries


def _sum_of_squares(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64)


def summarize(losses: Sequence[float]) -> Oscillation:
    """Return peak, final value and oscillation of the losses of modules in network order."""
    if not losses:
        return Oscillation(0.0, 0.0, 0.0)
    swings = [(a - b) ** 2 for a, b in itertools.pairwise(losses)]
    return Oscillation(max(losses), losses[-1], sum(swings))


def homogeneous(gm: fx.GraphModule, first: Unit, second: Unit) -> bool:
    """True when two modules are topologically homogeneous (arXiv 2303.11906, definition 1).

    They have the same number of weight layers with, in order, the same hyper-parameters (kind, stride, dilation,
    groups) except kernel size and channels; padding follows the kernel, a depthwise layer's groups follow its channels.
    """
    return _shape_of(gm, first) == _shape_of(gm, second)


def _shape_of(gm: fx.GraphModule, unit: Unit) -> list[Hyperparameters]:
    layers = weight_layers(gm)
    return [hyperparameters(layers[name], weight_node(layers[name]).meta["val"].shape) for name in unit.layers]
