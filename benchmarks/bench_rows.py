"""Rows of the evidence by method, and the pieces that tables are written of."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quiesce.files import flat, read_json
from quiesce.outputs import write_text
from quiesce.recipe import Recipe
from quiesce.sweep.plan import Cell

Row = dict[str, Any]
Key = tuple[str, str, str | None]
"""Bits, preset, and granularity with its overlap, and a drop and a push that are not the preset's."""


def identity(cell: Cell) -> dict[str, Any]:
    """Return what tells a cell from others: network, data, preset, and the settings that are not the preset's."""
    recipe = cell.recipe
    usual = flat(Recipe.preset(recipe.name).to_dict())
    settings = {key: value for key, value in flat(recipe.to_dict()).items() if value != usual[key] and key != "seed"}
    network = {key: getattr(cell.network, key) for key in ("label", "model", "weights", "calibration", "evaluate")}
    data = {"network": network, "images": cell.network.images, "bits": cell.bits, "preset": recipe.name}
    return json.loads(json.dumps(data | {"settings": settings, "seed": recipe.seed}))  # type: ignore[no-any-return]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a results file; none where there is no file yet."""
    return read_json(path)["rows"] if path.exists() else []


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, one a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_text(path, f'{{"rows": [\n{lines}\n]}}\n')


def by_method(rows: Sequence[Row]) -> dict[Key, dict[int, Row]]:
    """Return the rows by method, then by seed."""
    found: dict[Key, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(key_of(row["cell"]), {})[row["cell"]["seed"]] = row
    return found


def key_of(cell: Mapping[str, Any]) -> Key:
    """Return the method of a cell's :func:`identity`."""
    settings = cell["settings"]
    usual = {"nearest": None, "adaround-fast": "layer"}
    method = settings.get("granularity.method", usual.get(cell["preset"], "block"))
    told = {
        "overlap": settings.get("granularity.overlap"),
        "drop": settings.get("reconstruction.drop_prob"),
        "push": settings.get("reconstruction.decision_push"),
    }
    also = [f"{name} {value:g}" for name, value in told.items() if value is not None]
    return cell["bits"], cell["preset"], ", ".join([method, *also]) if also else method


def top1(rows: Mapping[int, Row]) -> dict[int, float]:
    return {seed: row["measured"]["top1"] for seed, row in rows.items()}


def header(names: Sequence[str], left: int) -> str:
    """Return the first two lines of a table, ``left`` columns aligned left and the others right."""
    return line(names) + "\n|" + "---|" * left + "--:|" * (len(names) - left)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """Write mean ± sample standard deviation."""
    if not values:
        return ""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def whole(value: float | None) -> str:
    """Write a number that may not have been measured, without decimals."""
    return "–" if value is None else f"{value:.0f}"


def lite_cells(row: Row) -> list[str]:
    """Return a row of ``efficientnet_lite.py`` as the cells of a table."""
    return [
        f"{row['weight_bits']}/{row['activation_bits']}",
        row["method"],
        f"{row['agreement']:.1f} ± {row['agreement_standard_error']:.1f}",
        f"{row['agreement_confident']:.1f}",
        f"{row['sqnr_db']:.1f}".replace("-", "−"),
        whole(row["labelled_top1"]),
        f"{row['peak_loss']:,.4g}",
        str(len(row["units"])),
        f"{row['seconds']:.0f}",
    ]
