"""Put the demo's table and figure into docs/results.md: ``python benchmarks/demo_page.py [runs/demo]``"""

from __future__ import annotations

import sys
from pathlib import Path

from bench_page import IMAGES, PAGE, replaced
from quiesce.outputs import write_text
from quiesce.report.plots import loss_over_modules
from quiesce.result import Result, Run

HEAD = (
    "| Method | Granularity | Top-1 % | Peak loss | Oscillation | Units | Seconds |",
    "|---|---|--:|--:|--:|--:|--:|",
)


def table(result: Result) -> str:
    """Return the page's table: the float network, one row a run, one an exported file."""
    rows = [f"| float | | {result.float['top1']:.2f} | | | | |"]
    kept = result.run
    files = [
        f"| {kept.preset}, `{export.file}` in {export.runtime} | {kept.granularity} | {export.top1:.2f} | | | | |"
        for export in result.exports
    ]
    return "\n".join([*HEAD, *rows, *map(row, result.runs), *files])


def row(run: Run) -> str:
    cells = [run.preset, run.granularity or "–", f"{run.top1:.2f}", f"{run.peak_loss:.1f}", f"{run.oscillation:.0f}"]
    return f"| {' | '.join([*cells, str(len(run.units)), f'{run.seconds:.0f}'])} |"


def main(folder: Path) -> None:
    result = Result.read(folder / "result.json")
    write_text(PAGE, replaced(PAGE.read_text(encoding="utf-8"), "demo table", table(result)))
    reconstructed = [run for run in result.runs if run.granularity is not None]  # nearest is off the scale
    # A page shows the figure in the colour of its text; alone, on dark pages too, it needs a ground of its own.
    figure = loss_over_modules(reconstructed, relative=False).replace('style="', 'style="background: white; ', 1)
    write_text(IMAGES / "loss-over-modules.svg", figure)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
