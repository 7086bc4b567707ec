"""The table of a sweep: a row for each cell that has run, files of it, and means over seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quiesce.outputs import write_text
from quiesce.result import Result
from quiesce.sweep.plan import Cell

CSV_FILE, JSONL_FILE = "results.csv", "results.jsonl"
METRICS = ("top1", "agreement", "sqnr_db", "peak_loss", "oscillation", "seconds")
"""Columns of which means are taken over seeds."""


@dataclass(frozen=True)
class Row:
    """A cell and what came of it. Units are those of docs/result.md."""

    network: str
    bits: str
    method: str
    preset: str
    granularity: str | None
    weight_bits: int
    activation_bits: int | None
    seed: int
    status: str
    """``done`` or ``failed``."""
    tries: int
    """Times that the cell was begun, 1 unless workers were lost."""
    float_top1: float | None = None
    top1: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    peak_loss: float | None = None
    oscillation: float | None = None
    seconds: float | None = None
    error: str | None = None
    folder: str | None = None
    """Of the cell, in the folder of the sweep."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Other settings that the sweep varies."""

    @property
    def name(self) -> str:
        """As that of the cell."""
        return f"{self.network} {self.bits} {self.method} seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the varied settings among the others."""
        data = asdict(self)
        axes, last = data.pop("axes"), {name: data.pop(name) for name in ("folder", "error")}
        return {**data, **axes, **last}


def done_row(cell: Cell, result: Result, tries: int, folder: str) -> Row:
    """Return the row of a cell that has a result."""
    run = result.run
    measured = {name: getattr(run, name) for name in METRICS}
    if not run.module_losses:
        measured |= {"peak_loss": None, "oscillation": None}
    return Row(
        **_head(cell), status="done", tries=tries, float_top1=result.float.get("top1"), folder=folder, **measured
    )


def failed_row(cell: Cell, error: str, tries: int) -> Row:
    """Return the row of a cell that has none."""
    return Row(**_head(cell), status="failed", tries=tries, error=error)


def _head(cell: Cell) -> dict[str, Any]:
    recipe = cell.recipe
    return {
        "network": cell.network.label,
        "bits": cell.bits,
        "method": cell.method,
        "preset": recipe.name,
        "granularity": None if recipe.granularity is None else recipe.granularity.method,
        "weight_bits": recipe.weights.bits,
        "activation_bits": recipe.activations.bits,
        "seed": recipe.seed,
        "axes": cell.axes,
    }


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """Write results.csv and results.jsonl, each aside and renamed.

    Raises:
        OutputError: the system can't write there.
    """
    data = [row.to_dict() for row in rows]
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in data]
    write_text(folder / JSONL_FILE, "".join(f"{line}\n" for line in lines))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(data[0]) if data else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in data)
    write_text(folder / CSV_FILE, text.getvalue())


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n − 1); None for a single seed."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """What cells that differ in their seeds alone have measured."""

    network: str
    bits: str
    method: str
    seeds: tuple[int, ...]
    """Of the cells that are done."""
    failed: int
    float_top1: float | None
    metrics: dict[str, Spread | None]
    """By the names of :data:`METRICS`; None where a cell did not measure it."""


def summarize(cells: Iterable[Cell], rows: Iterable[Row]) -> list[Summary]:
    """Return means over seeds, in the order in which networks, bits and methods first come."""
    groups: dict[str, list[Row]] = {}
    for cell, row in zip(cells, rows, strict=True):
        groups.setdefault(cell.group, []).append(row)
    made = [_summary(members) for members in groups.values()]
    networks, bits = ([*dict.fromkeys(getattr(s, name) for s in made)] for name in ("network", "bits"))
    return sorted(made, key=lambda s: (networks.index(s.network), bits.index(s.bits)))


def _summary(rows: Sequence[Row]) -> Summary:
    done = [row for row in rows if row.status == "done"]
    return Summary(
        network=rows[0].network,
        bits=rows[0].bits,
        method=rows[0].method,
        seeds=tuple(row.seed for row in done),
        failed=len(rows) - len(done),
        float_top1=next((row.float_top1 for row in done), None),
        metrics={name: _spread([getattr(row, name) for row in done]) for name in METRICS},
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, tuple(known))
