"""A sweep that shows how far it is: what the scripts that run many cells share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from quiesce.sweep.plan import Sweep
from quiesce.sweep.run import run_sweep
from quiesce.sweep.table import Row


def run_shown(sweep: Sweep, folder: Path, ended: Callable[[], None] = lambda: None) -> list[Row]:
    """Run the missing cells of ``sweep`` with a bar and its news on the terminal, and return the rows of all.

    ``ended`` is called whenever there is news, and once all has ended.

    Raises:
        SystemExit: cells have failed.
    """

    def tell(news: str) -> None:
        bar.console.print(news, highlight=False, markup=False)
        ended()

    with Progress() as bar:
        task = bar.add_task("starting", total=None)
        rows = run_sweep(
            sweep,
            folder,
            tell=tell,
            progress=lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total),
        )
    ended()
    failed = [row for row in rows if row.status != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} cells have failed, first {failed[0].name}: {failed[0].error}")
    return rows
