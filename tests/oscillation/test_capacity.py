from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from quiesce.data import Samples
from quiesce.graph.backends import BACKENDS
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.partition import partition
from quiesce.graph.place import annotate, insert
from quiesce.graph.unit import Unit
from quiesce.oscillation.capacity import modcap
from quiesce.recipe import LayerOverride, Recipe
from tiny import Assorted, Residual, recipe


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(4), Residual(4, 6, stride=2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def placed(settings: Recipe) -> tuple[fx.GraphModule, list[Unit]]:
    folded, _ = fold(capture(Staged().eval(), Samples((torch.randn(2, 3, 16, 16),))))
    graph = insert(folded, annotate(folded, BACKENDS["academic"], settings))
    return graph, partition(graph, "block")


# Weights per layer; biases are not counted. Second block: conv1 and shortcut have stride 2.
STEM, CONV = 3 * 4 * 9, 4 * 4 * 9
CONV1, SHORTCUT, CONV2 = 4 * 6 * 9, 4 * 6, 6 * 6 * 9
HEAD = 6 * 5


@pytest.mark.parametrize("alpha", [1.6, 1.0, 2.0])
def test_modcap_is_parameters_times_bits_times_alpha(alpha: float) -> None:
    graph, units = placed(recipe("brecq", weight_bits=3))
    assert [u.name for u in units] == ["stem", "blocks.0", "blocks.1", "head"]
    expected = [
        STEM * 8 * alpha,
        2 * CONV * 3,
        CONV1 * 3 * alpha + SHORTCUT * 3 * alpha + CONV2 * 3,
        HEAD * 8,
    ]
    assert modcap(graph, units, alpha) == pytest.approx(expected)


def test_modcap_follows_bit_overrides() -> None:
    overrides = (LayerOverride(pattern="blocks.1.conv?", weight_bits=5), LayerOverride(pattern="head", weight_bits=4))
    graph, units = placed(recipe("brecq", weight_bits=2, layers=overrides))
    assert modcap(graph, units, 1.6) == pytest.approx(
        [STEM * 8 * 1.6, 2 * CONV * 2, CONV1 * 5 * 1.6 + SHORTCUT * 2 * 1.6 + CONV2 * 5, HEAD * 4]
    )


def test_a_layer_left_float_counts_with_its_floats() -> None:
    graph, units = placed(recipe("brecq", weight_bits=3, leave_float=["blocks.1.conv1", "head"]))
    assert modcap(graph, units, 1.6) == pytest.approx(
        [STEM * 8 * 1.6, 2 * CONV * 3, CONV1 * 32 * 1.6 + SHORTCUT * 3 * 1.6 + CONV2 * 3, HEAD * 32]
    )


def test_a_computed_weight_has_no_parameters() -> None:
    folded, _ = fold(capture(Assorted(), Samples((torch.randn(2, 3, 8, 8),))))
    graph = insert(folded, annotate(folded, BACKENDS["academic"], recipe("brecq")))
    capacities = modcap(graph, partition(graph, "layer"), 1.6)
    names = [u.name for u in partition(graph, "layer")]
    assert dict(zip(names, capacities, strict=True))["make+conv2d_9"] == 8 * 72 * 2


def test_modcap_counts_each_layer_once() -> None:
    """Layer units of a block add up to the block, and no layer is in two."""
    graph, units = placed(recipe("brecq"))
    layers = partition(graph, "layer")
    assert sum(modcap(graph, layers, 1.6)) == pytest.approx(sum(modcap(graph, units, 1.6)))
    assert len(layers) == 7
