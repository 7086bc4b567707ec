from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiesce.result import Result, Run
from quiesce.sweep.plan import Cell, Network, Sweep
from quiesce.sweep.table import Row, done_row, failed_row, summarize, write_table

Read = Callable[..., Sweep]


def result(top1: float | None, losses: dict[str, float] | None = None) -> Result:
    run = Run("qdrop", "block", 2, 4, 0, top1=top1, agreement=50.0, sqnr_db=1.5, seconds=3.0)
    run = replace(run, module_losses=losses or {}, peak_loss=2.0, oscillation=4.0)
    return Result("net", {"top1": 90.0}, [run], {}, {}, {})


def cells_of(seeds: Sequence[int]) -> list[Cell]:
    from quiesce import Recipe

    network = Network(model="m:n", calibration="m:d")
    return [Cell(network, Recipe.preset("qdrop", seed=seed), {}) for seed in seeds]


def test_rows_say_what_was_run_and_measured(read: Read) -> None:
    cell = read(("seed = [0, 1]", "seed = [0, 1]\ndrop_prob = [0.5, 0.25]")).cells[1]
    row = done_row(cell, result(80.0, {"a": 1.0}), 2, "cells/x")
    expected = {"network": "net", "bits": "W2A4", "preset": "brecq-fast", "granularity": "block", "seed": 0}
    expected |= {"tries": 2, "top1": 80.0, "float_top1": 90.0, "peak_loss": 2.0, "folder": "cells/x", "error": None}
    expected |= {"method": "brecq-fast / block, drop_prob = 0.25", "drop_prob": 0.25, "status": "done"}
    assert expected.items() <= row.to_dict().items()
    failed = failed_row(cell, "no", 1).to_dict()
    assert list(failed) == list(row.to_dict())
    assert (failed["status"], failed["error"], failed["top1"]) == ("failed", "no", None)


def test_losses_that_were_not_measured_are_no_zeros(read: Read) -> None:
    row = done_row(read().cells[0], result(80.0), 1, "cells/x")
    assert row.peak_loss is None and row.oscillation is None


def test_both_files_hold_the_same_table(read: Read, tmp_path: Path) -> None:
    cells = read(('"2/4"', '"2/4"'), ("[grid]", "[grid]\nleave_float = ['a*', 'b, \"c\"']")).cells
    rows = [done_row(c, result(80.0 + i), 1, f"cells/{i}") for i, c in enumerate(cells[:-1])]
    rows.append(failed_row(cells[-1], 'a, "b"\nc', 3))
    write_table(rows, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == [row.to_dict() for row in rows]
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{k: "" if v is None else str(v) for k, v in row.to_dict().items()} for row in rows]
    assert not list(tmp_path.glob("*.partial*"))


def test_a_table_without_rows(tmp_path: Path) -> None:
    write_table([], tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == ""


@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_means_and_sample_deviations(values: list[float]) -> None:
    cells = cells_of(range(len(values)))
    rows = [done_row(cell, result(value), 1, "x") for cell, value in zip(cells, values, strict=True)]
    (summary,) = summarize(cells, rows)
    top1 = summary.metrics["top1"]
    assert top1 is not None and summary.seeds == tuple(range(len(values))) and summary.float_top1 == 90.0
    assert top1.mean == pytest.approx(sum(values) / len(values))
    if len(values) == 1:
        assert top1.deviation is None
    else:
        squares = sum((v - top1.mean) ** 2 for v in values) / (len(values) - 1)
        assert top1.deviation == pytest.approx(squares**0.5, abs=1e-9)
    assert statistics.median(top1.values) == statistics.median(values)


def test_failed_cells_are_counted_and_in_no_mean() -> None:
    cells = cells_of([0, 1, 2])
    rows = [done_row(cells[0], result(70.0), 1, "x"), failed_row(cells[1], "no", 1)]
    rows.append(done_row(cells[2], result(80.0), 1, "x"))
    (summary,) = summarize(cells, rows)
    assert summary.failed == 1 and summary.seeds == (0, 2)
    assert summary.metrics["top1"] is not None and summary.metrics["top1"].mean == 75.0
    (none,) = summarize(cells[:1], [failed_row(cells[0], "no", 1)])
    assert none.seeds == () and set(none.metrics.values()) == {None}


def test_a_metric_that_a_cell_lacks_has_no_mean() -> None:
    cells = cells_of([0, 1])
    rows: list[Row] = [done_row(cells[0], result(70.0), 1, "x"), done_row(cells[1], result(None), 1, "x")]
    (summary,) = summarize(cells, rows)
    assert summary.metrics["top1"] is None and summary.metrics["agreement"] is not None


def test_summaries_are_by_network_then_bits_then_method(read: Read) -> None:
    second = '[[network]]\nname = "other"\nmodel = "sweep_source:net2"\n[grid]'
    cells = read(("[grid]", second)).cells
    found = [(s.network, s.bits, s.method) for s in summarize(cells, [failed_row(c, "no", 1) for c in cells])]
    methods = ["brecq-fast / block", "qdrop-fast / block"]
    assert found == [(n, b, m) for n in ("net", "other") for b in ("W2A4", "W4A32") for m in methods]
