"""The theorem of arXiv 2303.11906 (section 3.2) and its corollary, checked on networks that meet their conditions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from quiesce.graph.calibrate import calibrate
from quiesce.preparation import Prepared, prepare
from quiesce.recipe import LayerOverride
from quiesce.reconstruct.loop import measure_pass
from tiny import job, recipe

SEEDS = range(16)
DEPTH = 5
MIDDLE = 3
CHANNELS = 32
SETTINGS = recipe("nearest", weight_bits=4, activation_bits=8)


class Module(nn.Module):
    """Two layers of one width with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x)))


def equal_chain() -> nn.Module:
    ends = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
    return nn.Sequential(ends[0], ends[1], nn.Sequential(*[Module() for _ in range(DEPTH)]), ends[2]).eval()


def prepared_chain(*overrides: LayerOverride) -> Prepared:
    return prepare(equal_chain(), torch.randn(16, CHANNELS, 4, 4), replace(SETTINGS, layers=overrides))


def relative_losses(prepared: Prepared, seed: int) -> list[float]:
    """L_i / E‖f_i‖² of the chain's modules under nearest rounding at W4A8, with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    for tensor in prepared.graph.buffers(recurse=False):
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor, nonlinearity="relu")
    calibrate(prepared.graph, prepared.samples, SETTINGS)
    losses = measure_pass(job(prepared, SETTINGS)).losses
    named = dict(zip([m.name for m in prepared.modules], losses, strict=True))
    return [named[f"2.{i}"].relative for i in range(DEPTH)]


@pytest.fixture(scope="module")
def curves() -> list[list[float]]:
    prepared = prepared_chain()
    return [relative_losses(prepared, seed) for seed in SEEDS]


def test_relative_loss_rises_along_a_chain_of_equal_modules(curves: list[list[float]]) -> None:
    """E[L_{i+1}] ≥ E[L_i] for homogeneous neighbours of equal capacity: errors only accumulate.

    Conditions: every module has the same layers, shape and bits; weights are drawn independently, scaled so that the
    float signal keeps its variance (else the absolute loss follows the signal, which is why the relative one is
    compared); rounding does not adapt to the error that comes in. The theorem is about the expectation, so the mean
    over seeds is tested, not each network.
    """
    means = [mean(curve[i] for curve in curves) for i in range(DEPTH)]
    assert all(later > earlier for earlier, later in itertools.pairwise(means)), means


def test_a_module_of_less_capacity_makes_its_loss_jump(curves: list[list[float]]) -> None:
    """Corollary: fewer bits in one middle module amplify the error there, and nothing in front of it changes.

    Conditions as above, but for the one module's weight bits (2 instead of 4).
    """
    starved = prepared_chain(LayerOverride(pattern=f"2.{MIDDLE}.*", weight_bits=2))
    jumps, steps = [], []
    for seed, curve in zip(SEEDS, curves, strict=False):
        changed = relative_losses(starved, seed)
        assert changed[:MIDDLE] == curve[:MIDDLE]
        jumps.append(changed[MIDDLE] / changed[MIDDLE - 1])
        steps.append(curve[MIDDLE] / curve[MIDDLE - 1])
    assert min(jumps) > 2 * max(steps), (jumps, steps)
