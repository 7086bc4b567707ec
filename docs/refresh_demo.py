"""Put the demo's table into docs/results.md and its figure into docs/images: python docs/refresh_demo.py [runs/demo]"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from quiesce.report.plots import loss_over_modules
from quiesce.result import Result, Run

ROOT = Path(__file__).parents[1]
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
    page = ROOT / "docs/results.md"
    marked = re.compile(r"(<!-- demo table -->\n).*?(<!-- end of demo table -->)", re.DOTALL)
    text = marked.sub(lambda m: f"{m[1]}{table(result)}\n{m[2]}", page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    reconstructed = [run for run in result.runs if run.granularity is not None]  # nearest is off the scale
    # A page shows the figure in the colour of its text; alone, on dark pages too, it needs a ground of its own.
    figure = loss_over_modules(reconstructed, relative=False).replace('style="', 'style="background: white; ', 1)
    (ROOT / "docs/images/loss-over-modules.svg").write_text(figure, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
