"""The report of a sweep: one page with a figure and a table for each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quiesce.outputs import write_text
from quiesce.report import plots
from quiesce.report.html import figure, fixed, template
from quiesce.sweep.table import Row, Spread, Summary

REPORT_FILE = "report.html"
DRAWN = {"top1": "top-1 %", "agreement": "agreement %", "sqnr_db": "SQNR dB"}
"""Metrics of the figure, and their labels."""


def write_sweep_report(
    summaries: Sequence[Summary], rows: Sequence[Row], versions: Mapping[str, str], folder: Path
) -> Path:
    """Write ``folder/report.html`` (aside, then renamed) and return its path.

    Raises:
        OutputError: the system can't write there.
    """
    path = folder / REPORT_FILE
    write_text(path, render(summaries, rows, versions))
    return path


def render(summaries: Sequence[Summary], rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Return the report as HTML text; equal results give equal text."""
    networks = {
        name: [s for s in summaries if s.network == name] for name in dict.fromkeys(s.network for s in summaries)
    }
    return template("sweep.html").render(
        networks=networks,
        rows=rows,
        failed=[row for row in rows if row.status == "failed"],
        seeds=len({row.seed for row in rows}),
        versions=versions,
        measured=lambda members: bool(panels(members)),
        draw=figure(lambda members: plots.metrics_over_bits(panels(members), float_values(members))),
        spread=spread,
    )


def panels(summaries: Sequence[Summary]) -> dict[str, dict[str, dict[str, Sequence[float]]]]:
    """Return values over seeds by metric, method and bits, of the metrics that some cell has."""
    found: dict[str, dict[str, dict[str, Sequence[float]]]] = {}
    for name, label in DRAWN.items():
        for summary in summaries:
            measured = summary.metrics[name]
            if measured is not None:
                found.setdefault(label, {}).setdefault(summary.method, {})[summary.bits] = measured.values
    return found


def float_values(summaries: Sequence[Summary]) -> dict[str, float]:
    """Return what the float network has, by the labels of :data:`DRAWN`."""
    known = [s.float_top1 for s in summaries if s.float_top1 is not None]
    return {DRAWN["top1"]: known[0]} if known else {}


def spread(value: Spread | None, decimals: int = 2) -> str:
    """Write mean ± sample standard deviation, or a dash where there is nothing."""
    if value is None or value.deviation is None:
        return fixed(None if value is None else value.mean, decimals)
    return f"{fixed(value.mean, decimals)} ± {fixed(value.deviation, decimals)}"
