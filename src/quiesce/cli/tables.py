"""Tables of what the commands found, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from quiesce.analysis import Analysis
    from quiesce.evaluate import Metrics
    from quiesce.export.inspect import Inventory
    from quiesce.export.parity import Parity
    from quiesce.precision.assignment import MixedPrecision
    from quiesce.precision.sensitivity import Sensitivity
    from quiesce.result import Result, Run
    from quiesce.sweep.plan import Sweep
    from quiesce.sweep.table import Summary

NONE = "–"


def results_table(result: Result) -> Table:
    """Return the table of a result: one row for the float network and one for each run."""
    table = Table(title=f"{result.model}, seed {result.run.seed}")
    for name in ("method", "granularity", "bits W/A"):
        table.add_column(name)
    for name in ("top-1 %", "agree %", "SQNR dB", "peak loss", "oscillation", "units", "seconds"):
        table.add_column(name, justify="right")
    table.add_row("float", NONE, "32/32", _fixed(result.float.get("top1"), 2), *[NONE] * 6)
    for run in result.runs:
        table.add_row(*_result_row(run))
    for export in result.exports:
        if export.runtime is not None:
            row = _result_row(result.run)
            table.add_row(f"{export.file} in {export.runtime}", *row[1:3], _fixed(export.top1, 2), *[NONE] * 6)
    return table


def _result_row(run: Run) -> list[str]:
    measured = bool(run.module_losses)
    return [
        run.preset,
        run.granularity or NONE,
        f"{run.weight_bits}/{run.activation_bits or 32}",
        _fixed(run.top1, 2),
        _fixed(run.agreement, 2),
        _fixed(run.sqnr_db, 1),
        f"{run.peak_loss:.4g}" if measured else NONE,
        f"{run.oscillation:.4g}" if measured else NONE,
        str(len(run.units)) if run.units else NONE,
        _fixed(run.seconds, 1),
    ]


def cells_table(plan: Sweep, kept: set[str]) -> Table:
    """Return the cells of a sweep, each finished (its name in ``kept``) or to run."""
    table = Table("network", "bits", "method", "seed", "")
    for cell in plan.cells:
        state = "finished" if cell.name in kept else "to run"
        table.add_row(cell.network.label, cell.bits, cell.method, str(cell.recipe.seed), state)
    return table


def sweep_table(summaries: list[Summary]) -> Table:
    """Return means and standard deviations over the seeds of each network, number of bits and method."""
    from quiesce.sweep.report import spread

    table = Table("network", "bits W/A", "method", title="Means ± sample standard deviations over seeds")
    for name in ("seeds", "top-1 %", "agree %", "SQNR dB", "peak loss", "oscillation", "seconds", "failed"):
        table.add_column(name, justify="right")
    decimals = {"top1": 2, "agreement": 2, "sqnr_db": 2, "peak_loss": 1, "oscillation": 0, "seconds": 1}
    for number, row in enumerate(summaries):
        if row.float_top1 is not None and row.network not in {s.network for s in summaries[:number]}:
            table.add_row(row.network, "W32A32", "float", NONE, _fixed(row.float_top1, 2), *[NONE] * 6)
        values = [spread(row.metrics[name], places) for name, places in decimals.items()]
        failed = str(row.failed) if row.failed else NONE
        table.add_row(row.network, row.bits, row.method, str(len(row.seeds)), *values, failed)
    return table


def metrics_table(metrics: Metrics, model: str, folder: Path) -> Table:
    """Return the top-1 of the network ``model`` that is in ``folder``."""
    table = Table("network", "images", "top-1 %", title=f"{folder}")
    table.add_row(model, str(metrics.images), _fixed(metrics.top1, 2))
    return table


def analysis_table(analysis: Analysis, name: str) -> Table:
    """Return the blocks of a network, and which of them are merged into which unit."""
    table = Table(title=f"{name}: blocks {len(analysis.modules)}, merged units {len(analysis.merges)}")
    table.add_column("block")
    for column in ("weight layers", "capacity", "differential to next"):
        table.add_column(column, justify="right")
    table.add_column("merged unit")
    unit_of = {module: f"{i}" for i, unit in enumerate(analysis.merges, 1) for module in unit}
    differentials = [f"{d:.3f}" for d in analysis.differentials]
    for i, module in enumerate(analysis.modules):
        capacity = analysis.capacities.get(module)
        table.add_row(
            module,
            str(len(analysis.layers[module])),
            NONE if capacity is None else f"{capacity:,.0f}",
            differentials[i] if i < len(differentials) else NONE,
            unit_of.get(module, ""),
        )
    return table


def sensitivity_table(found: Sensitivity, name: str) -> Table:
    """Return the error of each layer quantized alone, the most sensitive first."""
    table = Table(title=f"{name}: output error of each layer quantized alone, on {found.images:,} held-out images")
    table.add_column("layer")
    bits = sorted({b for row in found.layers for b in row.weight_errors})
    for column in ("weights", "bits W/A", "error", "SQNR dB", "input alone", *(f"W{b} alone" for b in bits)):
        table.add_column(column, justify="right")
    for row in found.ranked:
        alone = [row.weight_errors.get(b) for b in bits]
        table.add_row(
            row.layer,
            f"{row.weights:,}",
            f"{row.weight_bits}/{row.input_bits or 32}",
            f"{row.error:.3g}",
            _fixed(row.sqnr_db, 1),
            *(NONE if value is None else f"{value:.3g}" for value in (row.input_error, *alone)),
        )
    table.caption = f"{found.passes:.1f} forward passes over these images, {found.seconds:.1f} s"
    return table


def mixed_table(made: MixedPrecision) -> Table:
    """Return the bits that each layer was given."""
    table = Table(title=f"Chosen bits: {made.cost}")
    table.add_column("layer")
    for column in ("weights", "bits", "error alone"):
        table.add_column(column, justify="right")
    for row in made.sensitivity.layers:
        bits = made.bits[row.layer]
        table.add_row(row.layer, f"{row.weights:,}", str(bits), f"{row.weight_errors[bits]:.3g}")
    return table


def parity_table(parity: Parity) -> Table:
    """Return how the answers of an exported file differ from those of the network."""
    table = Table("the file in ONNX Runtime, against the simulation", "", title=f"{parity.images:,} images")
    table.add_row("largest difference of an output", f"{parity.largest_difference:.3g} of {parity.largest_output:.3g}")
    table.add_row("SQNR of the outputs, dB", _fixed(parity.sqnr_db, 1))
    table.add_row("images with another top-1", f"{parity.top1_differs}")
    table.add_row("… where a rounding tie was broken the other way", f"{parity.top1_differs_at_tie}")
    table.add_row("integers compared, layer by layer", f"{parity.values:,}")
    table.add_row("… that differ at a rounding tie", f"{parity.ties_broken:,}")
    table.add_row("… that differ elsewhere", f"{parity.mismatches:,}")
    table.add_row("farthest from a tie of those that differ, steps", f"{parity.farthest:.2g}")
    return table


def layers_table(inventory: Inventory) -> Table:
    """Return what is stored for each layer of a file."""
    table = Table("layer", "shape", title=inventory.path)
    for column in ("bits", "stored bits", "scales", "integers, bytes", "scales and zero points, bytes"):
        table.add_column(column, justify="right")
    for row in inventory.layers:
        numbers = (row.bits, row.stored_bits, row.scales, row.integer_bytes, row.grid_bytes)
        table.add_row(row.layer, " × ".join(map(str, row.shape)), *[f"{n:,}" for n in numbers])
    return table


def totals_table(inventory: Inventory) -> Table:
    """Return the bytes of a file beside what it needs, and beside float32 and 8-bit weights."""
    totals = inventory.totals
    table = Table("", title="Totals")
    for column in ("bytes", "the file in relation to it"):
        table.add_column(column, justify="right")
    table.add_row("file", f"{inventory.file_bytes:,}", "")
    needed = "integers at their bits, scales, zero points, biases"
    table.add_row(needed, f"{inventory.needed_bytes:,}", f"{totals['file_to_needed']:.3f} × as large")
    for name in ("float32", "int8"):
        table.add_row(
            f"{name} weights", f"{totals[f'{name}_bytes']:,}", f"{totals[f'smaller_than_{name}']:.2f} × smaller"
        )
    return table


def _fixed(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
