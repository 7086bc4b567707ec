from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from quiesce.data import Samples
from quiesce.errors import RecipeError
from quiesce.graph.capture import capture
from quiesce.graph.partition import partition
from quiesce.oscillation.granularity import scheme_groups
from quiesce.oscillation.schemes import published_schemes, resolve_scheme

# The merged units of the authors' code, counted: network, modules in all, sizes of the merged units.
PUBLISHED = [
    ("resnet18", 10, [2, 2]),
    ("resnet50", 18, [2, 3, 2]),
    ("mobilenet_v2", 18, [2, 2, 3, 3, 2]),
    ("mobilenetv2_100", 18, [2, 2, 3, 3, 2]),
    ("regnetx_006", 18, [3, 2, 2]),
]
SLOW = {"resnet50", "mobilenetv2_100"}


def make(name: str) -> torch.nn.Module:
    model = (
        timm.create_model(name) if "_0" in name or "_1" in name else torchvision.models.get_model(name, weights=None)
    )
    return model.eval()


def test_every_published_list_is_checked_here() -> None:
    assert set(published_schemes()) == {name for name, _, _ in PUBLISHED}


@pytest.mark.parametrize(("network", "modules", "sizes"), PUBLISHED)
def test_published_units_have_the_published_sizes(network: str, modules: int, sizes: list[int]) -> None:
    scheme = published_schemes()[network]
    assert [len(unit) for unit in scheme] == sizes and max(sizes) <= 3
    assert resolve_scheme(network) == scheme


@pytest.mark.parametrize(
    ("network", "modules", "sizes"),
    [pytest.param(*row, marks=pytest.mark.long if row[0] in SLOW else ()) for row in PUBLISHED],
)
def test_published_lists_name_neighbouring_blocks_of_the_real_network(
    network: str, modules: int, sizes: list[int]
) -> None:
    graph = capture(make(network), Samples((torch.randn(2, 3, 64, 64),)))
    names = [unit.name for unit in partition(graph, "block")]
    assert len(names) == modules
    groups = scheme_groups(names, published_schemes()[network])
    assert [len(g) for g in groups if len(g) > 1] == sizes
    for unit in published_schemes()[network]:
        assert set(unit) <= set(names)


def test_an_unknown_published_list_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"'resnet-18' is no published scheme\. Did you mean 'resnet18'\?"):
        resolve_scheme("resnet-18")


def test_a_scheme_by_hand_is_passed_on() -> None:
    scheme = (("a", "b"),)
    assert resolve_scheme(scheme) is scheme
