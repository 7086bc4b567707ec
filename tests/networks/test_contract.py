"""The quick networks of the catalogue; all of them run by ``make test-all-networks``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from catalogue import Entry, read_catalogue
from contract import (
    check_float_outputs,
    check_gradients,
    check_integers,
    check_sizes,
    check_units,
    check_weights,
    hold,
)
from quiesce.graph.partition import partition
from quiesce.preparation import Prepared, prepare
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers
from quiesce.reconstruct.loop import _Walk
from run import PAGE, RESULTS, page
from tiny import Chain, images, job, recipe

CATALOGUE = read_catalogue()
TIMM = "1.0.31"
"""Version of timm whose families are in the catalogue."""
HUGGING_FACE = {"vit", "deit", "swin", "dinov2", "clip_vision", "segformer", "mobilevit", "convnext"}


@pytest.mark.filterwarnings("ignore")  # of the libraries' own code
@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.quick], ids=lambda entry: entry.name)
def test_the_contract_holds(entry: Entry, tmp_path: Path) -> None:
    row = hold(entry, tmp_path)
    assert row.layers > 5 and row.units > 1


def test_every_family_is_in_the_catalogue() -> None:
    families = {library: {e.family for e in CATALOGUE if e.library == library} for library in ("timm", "transformers")}
    assert families["transformers"] >= HUGGING_FACE
    if timm.__version__ == TIMM:
        assert families["timm"] == set(timm.list_modules())


def test_networks_of_the_catalogue_are_in_their_libraries() -> None:
    vision = set(torchvision.models.list_models())
    known = {
        "timm": set(timm.list_models()),
        "torchvision": vision,
        "dense": vision,
        "transformers": set(dir(transformers)),
    }
    for entry in CATALOGUE:
        library, _, name = entry.model_name.partition(":")
        assert name in known[library], entry.model_name


def test_names_are_unique() -> None:
    assert len({e.name for e in CATALOGUE}) == len(CATALOGUE)


def test_the_page_is_that_of_the_results() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(CATALOGUE, rows)
    assert {e.name for e in CATALOGUE} == rows.keys()
    passed = sum(row["verdict"] == "passed" for row in rows.values())
    assert f"**{passed} of {len(CATALOGUE)}**" in (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")


# That the contract can be broken.

ENTRY = Entry("chain", "own:chain", 8)


@pytest.fixture
def prepared() -> Prepared:
    return prepare(Chain(), images(6), recipe(batch_size=4))


def test_another_function_is_found(prepared: Prepared) -> None:
    check_float_outputs(prepared.graph, Chain(), ENTRY)
    with pytest.raises(AssertionError, match="float outputs differ"):
        check_float_outputs(prepared.graph, Chain(seed=1), ENTRY)


def test_a_missing_layer_is_found(prepared: Prepared) -> None:
    model = Chain()
    check_weights(prepared, model, ENTRY)
    model.blocks.append(nn.Conv2d(8, 8, 1))
    with pytest.raises(AssertionError, match=r"not in the graph: \['blocks.4'\]"):
        check_weights(prepared, model, ENTRY)
    check_weights(prepared, model, replace(ENTRY, exceptions={"blocks.4": "added"}))


def test_a_float_layer_is_found(prepared: Prepared) -> None:
    gm = prepared.graph
    node = next(n for n in gm.graph.nodes if n.target == "stem_weight_quantizer")
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(AssertionError, match="weight of stem is not quantized"):
        check_weights(prepared, Chain(), ENTRY)


def test_units_that_do_not_chain_are_found(prepared: Prepared) -> None:
    units = partition(prepared.graph, "block")
    check_units(prepared.graph, units)
    with pytest.raises(AssertionError):
        check_units(prepared.graph, units[1:])
    first, *rest = units
    with pytest.raises(AssertionError):
        check_units(prepared.graph, [replace(first, stop=first.stop - 1), *rest])


def test_a_large_unit_is_found(prepared: Prepared) -> None:
    units = partition(prepared.graph, "block")
    check_sizes(units, ENTRY)
    layers = tuple(layer for unit in units[:3] for layer in unit.layers)
    large = [replace(units[0], layers=layers), *units[3:]]
    with pytest.raises(AssertionError, match="weight layers"):
        check_sizes(large, ENTRY)
    check_sizes(large, replace(ENTRY, large_unit="it is one on purpose"))


def test_a_dead_layer_is_found() -> None:
    model = Chain()
    torch.nn.init.zeros_(model.blocks[1].conv2.weight)
    torch.nn.init.zeros_(model.blocks[1].bn2.weight)
    settings = recipe(batch_size=4)
    dead = prepare(model, images(6), settings)
    unit = partition(dead.graph, "block")[2]
    walk = _Walk(job(dead, settings))
    walk.advance(unit.start)
    problem = walk._problem(unit)
    with pytest.raises(AssertionError, match="blocks_1_conv1_weight_quantizer"):
        check_gradients(problem, dead, settings, ENTRY, unit)


def test_integers_off_their_grid_are_found(prepared: Prepared) -> None:
    check_integers(prepared.graph)
    weight = fake_quantizers(prepared.graph)["blocks_0_conv1_weight_quantizer"]
    assert isinstance(weight, WeightFakeQuantize) and weight.spec.bits == 2
    weight.quantized[0] = 4
    with pytest.raises(AssertionError):
        check_integers(prepared.graph)
