from __future__ import annotations

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quiesce import Recipe
from quiesce.report import plots
from quiesce.result import Result, Run
from quiesce.sweep.plan import Cell, Network
from quiesce.sweep.report import DRAWN, panels, render, spread, write_sweep_report
from quiesce.sweep.table import Row, Spread, Summary, done_row, failed_row, summarize

VERSIONS = {"quiesce": "0.1.0", "torch": "2.14"}


def made(networks: int = 2, methods: int = 2, seeds: int = 3, labels: bool = True) -> tuple[list[Summary], list[Row]]:
    """A sweep of made-up numbers: each method a point below the one before, two bits ten points below four."""
    draw = random.Random(0)
    cells, rows = [], []
    for i in range(networks):
        network = Network(model=f"timm:net<{i}>", calibration="x")
        for bits in (2, 4):
            for m in range(methods):
                for seed in range(seeds):
                    recipe = Recipe.preset("qdrop", weight_bits=bits, drop_prob=m / 20, seed=seed)
                    cells.append(Cell(network, recipe, {"drop_prob": m / 20}))
                    top1 = 60 + 5 * bits - m + draw.gauss(0, 0.3)
                    run = Run("qdrop", "block", bits, 4, seed, top1=top1 if labels else None, agreement=top1 + 5)
                    run.sqnr_db, run.seconds = 5.0 * bits, 100.0
                    result = Result("net", {"top1": 82.0 if labels else None}, [run], {}, {}, {})
                    rows.append(done_row(cells[-1], result, 1, "cells/x"))
    rows[-1] = failed_row(cells[-1], "Traceback (most recent call last):\n  …\nMemoryError: <all>", 1)
    return summarize(cells, rows), rows


class Page(HTMLParser):
    """A page's table rows, and what is left open (which should be nothing)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data


def test_the_page_holds_means_spreads_and_failures() -> None:
    summaries, rows = made()
    text = render(summaries, rows, VERSIONS)
    page = Page(text)
    assert page.open == []
    tables = {(row[0], row[1]): row for row in page.rows}
    first = summaries[0]
    top1 = first.metrics["top1"]
    assert top1 is not None and top1.deviation is not None
    row = tables["qdrop / block, drop_prob = 0.0", "W2A4"]
    assert row[2] == "3" and f"{top1.mean:.2f} ± {top1.deviation:.2f}" in [r[3] for r in page.rows if len(r) > 3]
    assert tables["float", "W32A32"][3] == "82.00"
    assert ["timm:net<1> W4A4 qdrop / block, drop_prob = 0.05 seed 2", "1", "MemoryError: <all>"] in page.rows
    assert "24 cells" in text and "<strong>1 failed.</strong>" in text and text.count("<svg") == 2
    assert not re.search(r"<script|https?://(?!www.w3.org)", text)


def test_equal_results_give_an_equal_page(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pages = [write_sweep_report(*made(), VERSIONS, tmp_path / "a").read_text(encoding="utf-8") for _ in range(2)]
    assert pages[0] == pages[1]


def test_nothing_evaluated_and_nothing_finished() -> None:
    cell = Cell(Network(model="m:n", calibration="x"), Recipe.preset("qdrop"), {})
    rows = [failed_row(cell, "no", 3)]
    text = render(summarize([cell], rows), rows, VERSIONS)
    assert Page(text).open == [] and "<svg" not in text and "Nothing was evaluated" in text


def test_only_metrics_that_were_measured_are_drawn() -> None:
    assert list(panels(made(labels=False)[0])) == [DRAWN["agreement"], DRAWN["sqnr_db"]]


@pytest.mark.parametrize(("networks", "methods", "seeds"), [(1, 1, 1), (1, 12, 2)])
def test_the_figure_names_methods_bits_and_metrics(networks: int, methods: int, seeds: int) -> None:
    summaries, _ = made(networks, methods, seeds)
    svg = plots.metrics_over_bits(panels(summaries), {DRAWN["top1"]: 82.0})
    root = ElementTree.fromstring(svg)
    told = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*DRAWN.values(), *{s.method for s in summaries if s.seeds}, "W2A4", "float"} <= told
    assert str(root.get("aria-label")).startswith("top-1 %, agreement %, SQNR dB over bits, mean over seeds. top-1 %: ")


def test_spreads() -> None:
    assert spread(None) == "–" and spread(Spread(1.234, None, (1.234,))) == "1.23"
    assert spread(Spread(-1.5, 0.25, (-1.75, -1.25)), 1) == "−1.5 ± 0.2"
