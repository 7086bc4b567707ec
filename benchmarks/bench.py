"""Run the tables of the evidence, cell by cell, and write the page of results.

    python benchmarks/bench.py run quick                 # one small network, minutes on two cores
    python benchmarks/bench.py run convergence           # or without names: all tables
    python benchmarks/bench.py page                      # docs/results.md and its figures, from the results
    python benchmarks/bench.py repeat quick KEY          # one cell again, compared with what is recorded
    python benchmarks/bench.py status

A table is a sweep file beside this script (``docs/sweep.md``), and its results are rows of
``results/NAME.json``, one a cell. A row that is there is never computed again, on whatever machine it was computed; so
a run that was killed goes on where it was. Rows name the preset and what differs from it: who changes a preset removes
the rows that rest on it. ``run --only PATTERN`` takes some cells of a table.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_page import EVIDENCE, check_page, write_page
from bench_rows import Row, identity, read_rows, write_rows
from quiesce.errors import QuiesceError
from quiesce.files import read_json
from quiesce.result import Result
from quiesce.sweep.cell import CELL_FILE, RESULT_FILE, deciding_versions
from quiesce.sweep.plan import Cell, Sweep, read_sweep
from quiesce.sweep.run import CELLS
from shown_sweep import run_shown

HERE = Path(__file__).parent
TABLES = (
    *("quick", "rates", "regularizer", "convergence"),
    *EVIDENCE,
    *("candidates", "granularities", "images", "batches", "capacity", "references", "full", "window"),
)
"""In the order in which they are worth running."""
RUNS = HERE.parent / "runs" / "bench"
MEASURED = (
    *("top1", "agreement", "sqnr_db", "peak_loss", "final_loss", "oscillation"),
    *("relative_peak_loss", "relative_final_loss", "relative_oscillation", "seconds", "measuring_seconds"),
    *("units", "module_losses", "relative_losses", "capacities", "proposed_merges", "guard"),
)
"""Entries of a run (docs/result.md) that are kept."""
WITHIN = 3.0
"""Pooled standard deviations between a cell and its repetition."""


def key(cell: dict[str, Any]) -> str:
    """Return 12 hexadecimal digits that stand for an identity."""
    return hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def rows_file(table: str) -> Path:
    return HERE / "results" / f"{table}.json"


def read_table(table: str) -> Sweep:
    return read_sweep(HERE / f"{table}.toml")


def missing(sweep: Sweep, rows: Sequence[Row]) -> list[Cell]:
    """Return the cells of ``sweep`` without a row."""
    known = [row["cell"] for row in rows]
    return [cell for cell in sweep.cells if identity(cell) not in known]


def compute(sweep: Sweep, cells: Sequence[Cell], folder: Path, keep: Callable[[Row], None]) -> None:
    """Run ``cells`` of ``sweep`` in ``folder``, and call ``keep`` with the row of each as it ends."""
    digests = {cell.digest(deciding_versions()): cell for cell in cells}
    kept: set[str] = set()

    def take() -> None:
        for path in sorted((folder / CELLS).glob("[!.]*-*")):
            digest = path.name.rpartition("-")[2]
            if digest in digests and digest not in kept:
                kept.add(digest)
                keep(row_of(digests[digest], path))

    run_shown(replace(sweep, cells=tuple(cells)), folder, take)


def row_of(cell: Cell, folder: Path) -> Row:
    """Return the row of a cell that ``folder`` has the files of."""
    result = Result.read(folder / RESULT_FILE)
    about = read_json(folder / CELL_FILE)
    measured = {name: rounded(getattr(result.run, name)) for name in MEASURED}
    return {
        "cell": identity(cell),
        "method": cell.method,
        "float_top1": result.float["top1"],
        "measured": measured,
        "inputs": about["inputs"],
        "versions": result.versions,
        "hardware": result.hardware,
        "date": time.strftime("%Y-%m-%d"),
    }


def rounded(value: Any) -> Any:
    """Return plain data with six digits of each number."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def run(tables: Sequence[str], only: str) -> None:
    """Compute the cells of ``tables`` that have no row."""
    for table in tables:
        sweep, rows = read_table(table), read_rows(rows_file(table))
        left = missing(sweep, rows)
        cells = [cell for cell in left if fnmatch.fnmatch(cell.name, only)]
        print(f"{table}: {len(sweep.cells) - len(left)} of {len(sweep.cells)} cells are there.")

        def keep(row: Row, table: str = table, rows: list[Row] = rows) -> None:
            rows.append(row)
            write_rows(rows_file(table), rows)

        if cells:
            compute(sweep, cells, RUNS / table, keep)


def repeat(table: str, wanted: str) -> None:
    """Compute one cell again, and tell how far its top-1 is from the recorded one."""
    sweep, rows = read_table(table), read_rows(rows_file(table))
    recorded = next((row for row in rows if key(row["cell"]) == wanted), None)
    cell = next((cell for cell in sweep.cells if key(identity(cell)) == wanted), None)
    if recorded is None or cell is None:
        raise SystemExit(f"{table} has no cell {wanted} with a result; `status` lists the keys.")
    again: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        compute(sweep, [cell], Path(folder) / "repeated", again.append)
    then, now = recorded["measured"]["top1"], again[0]["measured"]["top1"]
    spread = pooled_deviation(rows)
    good = abs(now - then) <= WITHIN * spread
    print(
        f"{cell.name}: top-1 {then:.2f} % recorded, {now:.2f} % now; {abs(now - then):.2f} is "
        f"{'within' if good else 'MORE THAN'} {WITHIN:g} pooled standard deviations of {spread:.2f}."
    )
    sys.exit(0 if good else 1)


def pooled_deviation(rows: Sequence[Row]) -> float:
    """Return the standard deviation of top-1 over seeds, pooled over all groups of cells that differ by seed alone."""
    variances = [statistics.variance(values) for values in groups(rows).values() if len(values) > 1]
    return statistics.mean(variances) ** 0.5 if variances else 0.0


def groups(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return top-1 over seeds of the cells that differ by seed alone."""
    found: dict[str, list[float]] = {}
    for row in rows:
        name = json.dumps(row["cell"] | {"seed": None}, sort_keys=True)
        found.setdefault(name, []).append(row["measured"]["top1"])
    return found


def status() -> None:
    """Print all cells that have results, with their keys, and how many have none."""
    for table in TABLES:
        rows = read_rows(rows_file(table))
        left = len(missing(read_table(table), rows))
        print(f"{table}: {len(rows)} rows, {left} cells without")
        for row in rows:
            cell = row["cell"]
            name = f"{cell['network']['label']} {cell['bits']} {row['method']} seed {cell['seed']}"
            print(f"  {key(cell)}  {row['measured']['top1']:6.2f} %  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tables of the evidence and write the page of results.")
    parts = parser.add_subparsers(dest="part", required=True)
    running = parts.add_parser("run", help="compute what is missing")
    running.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)} (default: all)")
    running.add_argument("--only", default="*", metavar="PATTERN", help="only cells of such names, as `status` shows")
    again = parts.add_parser("repeat", help="compute one cell again and compare")
    again.add_argument("table", choices=TABLES)
    again.add_argument("key")
    paging = parts.add_parser("page", help="write docs/results.md and its figures from the results")
    paging.add_argument("--check", action="store_true", help="only check that the page shows the results")
    parts.add_parser("status", help="list the cells that have results")
    options = parser.parse_args()
    if options.part == "run":
        unknown = set(options.tables) - set(TABLES)
        if unknown:
            parser.error(f"there is no table {min(unknown)}; choose of {', '.join(TABLES)}.")
        run(options.tables or TABLES, options.only)
    elif options.part == "repeat":
        repeat(options.table, options.key)
    elif options.part == "status":
        status()
    else:
        write = check_page if options.check else write_page
        write({table: read_rows(rows_file(table)) for table in TABLES}, {table: read_table(table) for table in TABLES})


if __name__ == "__main__":
    try:
        main()
    except QuiesceError as error:
        raise SystemExit(str(error)) from None
