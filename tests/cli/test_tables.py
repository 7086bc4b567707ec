"""Tables for a terminal: what is in their cells."""

from __future__ import annotations

from rich.console import Console

from quiesce.cli.tables import results_table
from tiny import example_result


def test_results_table() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(results_table(example_result()))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    assert rows == [
        ["float", "–", "32/32", "–", "–", "–", "–", "–", "–", "–"],
        ["nearest", "–", "2/32", "–", "–", "–", "–", "–", "–", "0.0"],
        ["qdrop", "loss", "2/4", "71.26", "80.00", "12.3", "0.1235", "0.5", "2", "61.2"],
    ]
