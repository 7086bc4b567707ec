from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest

from quiesce.precision.sensitivity import LayerSensitivity, Sensitivity
from quiesce.report import plots

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parse(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("relative", [False, True])
def test_loss_figure_names_every_run_and_module(result, relative):
    svg = plots.loss_over_modules(result.runs, relative)
    told = texts(svg)
    assert set(plots.run_labels(result.runs)) <= set(told)
    assert set(result.run.module_losses) <= set(told)
    assert any("E‖fᵢ‖²" in text for text in told) == relative


def test_figures_scale_and_speak(result):
    for svg in (
        plots.loss_over_modules(result.runs, False),
        plots.capacities(result.run),
        plots.unit_losses(result.run),
    ):
        root = parse(svg)
        assert root.get("viewBox")
        assert "width" not in root.attrib
        assert "width: 100%" in root.get("style")
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 40


def test_sensitivities_are_told_by_layer_and_bits():
    rows = [
        LayerSensitivity("stem", (), 10, 10, 8, 8, 1e-5, 0.0, {2: 0.1, 8: 0.0}),
        LayerSensitivity("a$b", (), 10, 10, 2, 4, 0.2, 0.1, {2: 0.15}),
    ]
    svg = plots.sensitivities(Sensitivity(rows, 4, 12, 3.0, 1.0, {}))
    assert {"stem", "a$b", "weight alone, 2 bits", "weight alone, 8 bits"} <= set(texts(svg))
    assert "Largest: a$b (0.200), stem (1.00e−5)" in parse(svg).get("aria-label")


def test_figures_are_deterministic_and_dateless(result):
    again = [plots.loss_over_modules(result.runs, False) for _ in range(2)]
    assert again[0] == again[1]
    assert "<metadata" not in again[0]
    assert not re.search(r"20\d\d-\d\d", again[0])


def test_figures_do_not_share_ids_or_styles(result):
    first, second = plots.loss_over_modules(result.runs, False), plots.loss_over_modules(result.runs, True)
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for svg, known in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)) == set(known)
        assert "<style" not in svg


def test_the_users_own_style_is_neither_used_nor_changed(result):
    plain = plots.loss_over_modules(result.runs, False)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert plots.loss_over_modules(result.runs, False) == plain
        assert dict(matplotlib.rcParams) == before


def test_runs_of_far_higher_loss_get_their_own_panel(result):
    assert texts(plots.loss_over_modules(result.runs, False)).count("Lᵢ") == 1  # the other one says "log scale"
    assert plots._far_apart([run.module_losses for run in result.runs]) == [[0], [1, 2, 3, 4, 5]]
    assert plots._far_apart([run.module_losses for run in result.runs[1:]]) == [[0, 1, 2, 3, 4]]


def test_axis_is_logarithmic_only_where_losses_span_much(result):
    run = result.run
    flat = replace(run, module_losses={"a": 1.0, "b": 2.0})
    steep = replace(run, module_losses={"a": 1.0, "b": 2000.0, "c": 0.0})
    assert "Lᵢ" in texts(plots.loss_over_modules([flat], False))
    assert "Lᵢ, log scale" in texts(plots.loss_over_modules([steep], False))


def test_module_sets_may_differ(result):
    one = replace(result.run, module_losses={"b": 1.0, "c": 2.0})
    other = replace(result.run, module_losses={"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0})
    assert plots.module_order([one.module_losses, other.module_losses]) == ["a", "b", "c", "d"]
    assert {"a", "b", "c", "d"} <= set(texts(plots.loss_over_modules([one, other], False)))


def test_names_are_drawn_as_they_are(result):
    run = replace(
        result.run, preset="_odd", module_losses={"a$x$": 1.0, "日本": 2.0, "nul\x00\ud800": 1.5, "<b>&": 3.0}
    )
    told = texts(plots.loss_over_modules([run], False))
    assert {"a$x$", "日本", "nul\ufffd\ufffd", "<b>&", "_odd · loss"} <= set(told)


def test_long_names_keep_both_ends():
    assert plots.short("features.1") == "features.1"
    shortened = plots.short("backbone.stage3.blocks.11.attention.projection")
    assert len(shortened) == 26
    assert shortened.startswith("backbone") and shortened.endswith("projection")


def test_long_networks_stay_legible(long_result):
    svg = plots.loss_over_modules(long_result.runs, False)
    assert set(long_result.run.module_losses) <= set(texts(svg))
    width = float(parse(svg).get("viewBox").split()[2])
    assert width / 60 > plots._FONT


def test_empty_runs_draw(result):
    empty = replace(result.run, module_losses={}, capacities={}, differentials=[], unit_records=[])
    for svg in (plots.loss_over_modules([empty], False), plots.capacities(empty), plots.unit_losses(empty)):
        parse(svg)


def test_outcomes_of_merges(result):
    run = result.run
    assert list(plots.merge_outcomes(run).values()) == ["accepted", "rejected"]
    blocks = replace(run, units=[[name] for name in run.module_losses], guard={**run.guard, "kept": "block"})
    assert list(plots.merge_outcomes(blocks).values()) == ["taken back", "rejected"]
    untried = replace(run, proposed_merges=[["features.8", "features.9"]], guard=None)
    assert plots.merge_outcomes(untried) == {("features.8", "features.9"): "not tried"}
    assert list(plots.merge_outcomes(result.runs[4]).values()) == ["accepted"]


def test_outcomes_have_signs_of_their_own(result):
    told = texts(plots.capacities(result.run))
    assert {"✓", "✗", "✓ accepted", "✗ rejected"} <= set(told)
    assert "↩" not in told
    assert len(set(plots.OUTCOMES.values())) == len(plots.OUTCOMES)


def test_overlapping_merges_get_lanes():
    names = ["a", "b", "c", "d", "e"]
    placed = plots._lanes(
        {("a", "b"): "rejected", ("b", "c"): "accepted", ("d", "e"): "accepted", ("x", "y"): "rejected"}, names
    )
    assert placed == [(0, 1, "rejected", 0), (1, 2, "accepted", 1), (3, 4, "accepted", 0)]


def test_capacities_on_a_log_scale_keep_their_bars(result):
    scores = {"a": 1.0, "b": 100.0, "c": 1e6}
    svg = plots.capacities(replace(result.run, capacities=scores, differentials=[0.1, -1.0]))
    assert "capacity, log scale" in texts(svg)
    # A bar is a closed path with four corners; a bar that lost its foot is a stroke.
    heights = [
        path.get("d").count("L") for path in parse(svg).iter(f"{SVG}path") if plots._PLAIN_BAR in path.get("style", "")
    ]
    assert heights.count(3) >= 3


def test_unit_panels_tell_first_and_last_loss(result):
    told = texts(plots.unit_losses(result.run))
    assert "features.3 + features.4" in told
    assert sum("reused" in text for text in told) == 2
    run = replace(result.run, unit_records=[replace(result.run.unit_records[0], loss_curve=[])])
    assert any("no curve recorded" in text for text in texts(plots.unit_losses(run)))


def test_labels_tell_runs_apart(result):
    runs = result.runs
    assert plots.run_labels(runs)[:2] == ["nearest", "adaround · layer"]
    assert plots.run_labels([runs[5], runs[5]]) == ["qdrop · loss (1)", "qdrop · loss (2)"]
    assert plots.run_labels([runs[5], replace(runs[5], seed=3)]) == ["qdrop · loss · seed 0", "qdrop · loss · seed 3"]
    assert plots.run_labels([runs[0], replace(runs[0], activation_bits=None)]) == ["nearest · W2A4", "nearest · W2A32"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.2345, "1.23"),
        (12345.6, "12,346"),
        (-0.05, "−0.0500"),
        (1.5e7, "1.50e7"),
        (2e-6, "2.00e−6"),
    ],
)
def test_numbers(value, text):
    assert plots.number(value) == text
