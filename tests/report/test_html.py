from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from quiesce.errors import FileFormatError, OutputError
from quiesce.report.html import render, write_report
from quiesce.result import Result

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """A page's elements, texts by element, and what is left open (which should be nothing)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data):
        self.words += data
        if self.rows and any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data

    def values(self, name: str) -> list[str | None]:
        return [value for _, n, value in self.attributes if n == name]


def page_of(result: Result) -> Page:
    page = Page(render(result))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return page_of(finished)


def summary(page: Page) -> str:
    start = page.words.index("The network that was kept")
    return " ".join(page.words[start : page.words.index("Runs", start)].split())


def test_sections_and_landmarks(page):
    sections = [value for tag, name, value in page.attributes if tag == "section" and name == "id"]
    assert sections == ["runs", "losses", "capacity", "guard", "units", "recipe", "environment"]
    assert {f"#{s}" for s in sections} == {v for t, n, v in page.attributes if (t, n) == ("a", "href")}
    assert page.tags["h1"] == page.tags["main"] == page.tags["title"] == 1
    assert page.tags["svg"] == page.tags["figure"] == page.tags["figcaption"] == 5
    assert ("html", "lang", "en") in page.attributes
    assert "width=device-width, initial-scale=1" in page.values("content")


def test_ids_are_unique_and_references_hit(page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {v[1:] for v in page.values("href")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)


def test_page_asks_for_nothing(page, finished):
    text = render(finished)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed"}
    assert all(value.startswith("#") for value in page.values("href") + page.values("src"))
    assert set(page.values("xmlns")) == {"http://www.w3.org/2000/svg"}
    rest = text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in rest and "https:" not in rest and "@import" not in rest


def test_table_holds_all_runs_float_first(page, finished):
    rows = page.rows[:8]
    assert [row[0] for row in rows[1:]] == ["float", "nearest", "adaround", "brecq", "qdrop", "qdrop", "qdropkept"]
    assert len({len(row) for row in rows}) == 1
    kept = rows[-1]
    assert kept[1:6] == ["loss", "2/4", "88.20", "1.85", "92.61"]
    assert kept[10] == str(len(finished.run.units))
    assert rows[1][3] == "90.05"
    assert rows[2][1] == rows[2][10] == "–"


def test_summary_names_the_kept_run(page, result):
    text = summary(page)
    assert "is qdrop · loss at W2A4: 88.20 % top-1, 1.85 points below float (90.05 %)" in text
    assert "92.61 % of the images." in text
    result.float = {"top1": 88.0}
    assert "0.20 points above float" in summary(page_of(result))


def test_summary_says_when_the_guard_kept_the_blocks(page, result):
    assert "plain block result" not in summary(page)
    result.run.guard["kept"] = "block"
    assert "plain block result" in summary(page_of(result))


def test_guard_table(page):
    assert ["features.3 + features.4", "0.412", "0.455", "−9.5", "✓ accepted"] in page.rows
    assert ["features.6 + features.7", "0.521", "0.449", "16.0", "✗ rejected"] in page.rows
    assert ["Finished network, merged against blocks", "1.31", "1.42", "−7.7", "merged kept"] in page.rows
    assert "2 of 12 units were taken over from the block pass, which saved 4.2 s" in page.words
    assert "The guard was off" in page.words  # the modcap run


def test_guard_without_trials_or_final(result):
    result.run.guard = {"holdout": 128, "trials": [], "final": None, "kept": "merged"}
    page = page_of(result)
    assert "Nothing was tried." in page.words
    assert "Proposed but not tried: features.6 + features.7." in page.words


def test_recipe_versions_and_hardware(page):
    for word in ("step_size_lr", "max_modules", "4e-05", "2.15.0", "Some Processor @ 2.00GHz"):
        assert word in page.words


def test_without_labels(result):
    result.float = {"top1": None}
    for run in result.runs:
        run.top1 = run.agreement = run.sqnr_db = None
    page = page_of(result)
    assert summary(page) == "The network that was kept is qdrop · loss at W2A4."
    assert page.rows[7][3:7] == ["–"] * 4
    assert "None" not in page.words
    result.run.agreement = 50.0
    assert summary(page_of(result)).endswith("at W2A4: the same answer as the float network on 50.00 % of the images.")


def test_single_nearest_run(result):
    result.runs = result.runs[:1]
    page = page_of(result)
    assert page.tags["svg"] == 2
    for words in ("No run chose its merges by capacity.", "nothing to guard", "nothing was optimized"):
        assert words in page.words


def test_bare_result(result):
    bare = replace(result.runs[0], module_losses={}, relative_losses={}, activation_bits=None)
    page = page_of(Result(model="m", float={}, runs=[bare], recipe={}, versions={}, hardware={}))
    assert "No run measured the loss of its modules." in page.words
    assert page.rows[2][2] == "2/32"


def test_different_module_sets(result):
    result.runs[0].module_losses = {"other": 3.0}
    rows = [row for row in page_of(result).rows if row[0] == "other"]
    assert rows == [["other", "3.00", *["–"] * 5]]


def test_units_cut_off_undecided_are_named(result):
    assert "undecided when they were cut off" not in render(result)
    result.run.unit_records[0].undecided = 0.05
    result.run.unit_records[1].undecided = 0.0684
    told = render(result)
    assert f"In 1 of {len(result.run.unit_records)} units more than 5 % of the roundings were undecided" in told
    assert f"{result.run.unit_records[1].modules[0]} 6.8 %." in told


def test_hostile_names_are_escaped(result):
    hostile = '<script>alert("x")</script>'
    result.model = hostile
    run = result.run
    run.preset = run.granularity = hostile
    run.module_losses = {hostile: 1.0, "<b>": 2.0}
    run.relative_losses = run.capacities = run.module_losses
    run.differentials = [1.0]
    run.units = run.proposed_merges = [[hostile, "<b>"]]
    run.guard["trials"] = [{"modules": [hostile, "<b>"], "merged_error": 0.1, "unmerged_error": 0.0, "accepted": True}]
    run.unit_records = [replace(run.unit_records[0], modules=[hostile, "<b>"])]
    result.recipe = {hostile: hostile, "part": {hostile: [hostile]}}
    result.versions = result.hardware = {hostile: hostile}
    page = page_of(result)
    assert not page.tags.keys() & {"script", "b"}
    assert hostile in page.words
    assert "<script" not in render(result)


def test_output_is_deterministic_and_survives_json(result, tmp_path):
    read = Result.read(result.write(tmp_path / "result.json"))
    first = write_report(result, tmp_path / "a.html").read_bytes()
    assert write_report(read, tmp_path / "b.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html", "result.json"]


def test_sixty_modules(long_result, tmp_path):
    path = write_report(long_result, tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert "features.60" in page.words


def test_lone_surrogates_do_not_break_the_file(result, tmp_path):
    result.model = "odd \ud800 name"
    assert "odd ? name" in write_report(result, tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_runs_is_an_error(result):
    result.runs = []
    with pytest.raises(FileFormatError, match="no run"):
        render(result)


def test_unwritable_path_is_an_error_and_leaves_nothing(result, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"missing/report\.html can't be written"):
        write_report(result, tmp_path / "missing" / "report.html")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(result, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
