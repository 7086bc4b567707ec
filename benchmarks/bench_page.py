"""The generated parts of docs/results.md, and its figures, from the rows of ``bench.py``.

Each part stands between two comments in the page, ``<!-- NAME -->`` and ``<!-- end of NAME -->``; the prose around them
is written by hand.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench_rows import (
    Key,
    Row,
    by_method,
    header,
    identity,
    key_of,
    line,
    lite_cells,
    read_rows,
    signed,
    spread,
    top1,
    whole,
)
from bench_studies import (
    STUDIED,
    amounts_table,
    draw_amounts,
    draw_granularities,
    granularities_table,
    ranking_table,
    references_table,
)
from quiesce.outputs import write_bytes, write_text
from quiesce.sweep.plan import Sweep

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
PAGE, IMAGES = DOCS / "results.md", DOCS / "images"
WEIGHTS = Path(__file__).parent / "weights"
LISTED = ("rates", "regularizer", "candidates", "capacity", "window")
"""Tables with a line for each combination of settings."""
FOLLOWING = "reconstruction.weight_step_size_lr"
"""Not listed: it goes with the rounding."""
BASES = ("brecq-fast", "qdrop-fast")
DROPPED = "loss-descent, overlap 1, drop 0.25"
"""Only a step on the way to ``best-fast``."""
NARROW, WIDE = (f"loss-descent, overlap {overlap}, drop 0.25, push 3" for overlap in (1, 2))
"""``best-fast``: for networks without depthwise convolutions, and with them (the preset's ``overlap = "auto"``)."""
WITHOUT_DEPTHWISE = ("ResNet-18", "RegNetX-600MF")
BASE_OF_BEST = ("qdrop-fast", "block")
EASY = ("quick",)
EVIDENCE = (
    *("emoji_mobilenetv2_050", "emoji_resnet18", "emoji_regnetx_600mf"),
    *("emoji_mobilenetv2_035", "emoji_mobilenetv2_075", "emoji_mobilenetv2_100"),
)
"""Tables of the README's table."""
PLAINLY_MERGED = ("modcap", "loss", "loss-descent", "scheme", "block, overlap 1", "loss-descent, overlap 1")
MERGED = (*PLAINLY_MERGED, DROPPED, NARROW, WIDE)
"""Granularities beside blocks."""
RESULTS = Path(__file__).parent / "results"
REFERENCES = RESULTS / "reference_codes.json"
WIDTH = 120
LEAST_POINTS, STANDARD_ERRORS = 0.3, 2.0
"""Two methods differ when their paired mean difference over seeds exceeds both."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "quiesce",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_page(rows: Mapping[str, Sequence[Row]], tables: Mapping[str, Sweep]) -> None:
    """Write the figures, and the generated parts of the page and of the README."""
    draw("convergence.svg", lambda figure: draw_convergence(figure, rows["convergence"]))
    draw("granularities.svg", lambda figure: draw_granularities(figure, rows["granularities"], rows[STUDIED]))
    draw("amounts.svg", lambda figure: draw_amounts(figure, amounts_rows(rows)))
    for name in (*EASY, *EVIDENCE):
        draw(f"losses-{name}.svg", lambda figure, own=rows[name]: draw_losses(figure, own, "W2A4"))
    write_text(PAGE, page(rows, tables))
    write_text(README, readme(rows))


def check_page(rows: Mapping[str, Sequence[Row]], tables: Mapping[str, Sweep]) -> None:
    """Check that the page and the README show these results."""
    for path, text in ((PAGE, page(rows, tables)), (README, readme(rows))):
        if text != path.read_text(encoding="utf-8"):
            raise SystemExit(f"{path.name} shows other results; run `python benchmarks/bench.py page`.")


def page(rows: Mapping[str, Sequence[Row]], tables: Mapping[str, Sweep]) -> str:
    """Return the page with its generated parts made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in generated(rows, tables).items():
        text = replaced(text, name, part)
    return text


def generated(rows: Mapping[str, Sequence[Row]], tables: Mapping[str, Sweep]) -> dict[str, str]:
    """Return the page's generated parts by name."""
    parts = {
        "networks": networks_table(),
        "convergence": convergence_table(rows["convergence"], tables["convergence"]),
        "granularities": granularities_table(rows["granularities"], rows[STUDIED]),
        "images": "",
        "batches": amounts_table(amounts_rows(rows)),
        "references": references_table(read_rows(REFERENCES), rows["references"], best_rows(rows[STUDIED], "W2A4")),
        "full": full_table(rows["full"], [row for name in (*EASY, *EVIDENCE) for row in rows[name]]),
        "ranking": ranking_table([rows[name] for name in EVIDENCE]),
        "lites": lites_table(),
    }
    for name in LISTED:
        parts[name] = list_table(rows[name])
    for name in (*EASY, *EVIDENCE):
        parts[name] = f"{method_table(rows[name], tables[name])}\n\n{merging_table(rows[name], tables[name])}"
    covered = {name: coverage(rows[name], sweep) for name, sweep in tables.items()}
    return parts | {name: f"{text}\n\n{parts[name]}".rstrip() for name, text in covered.items()}


def best_of(network: str) -> tuple[str, str]:
    """Return what the preset ``best-fast`` is on a network."""
    return "brecq-fast", NARROW if network in WITHOUT_DEPTHWISE else WIDE


def best_rows(rows: Sequence[Row], bits: str) -> list[Row]:
    """Return the rows of `best` at ``bits``."""
    return [row for row in rows if key_of(row["cell"]) == (bits, *best_of(row["cell"]["network"]["label"]))]


def amounts_rows(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [*rows["images"], *rows["batches"]]


def readme(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return the README with its table made anew."""
    return replaced(README.read_text(encoding="utf-8"), "evidence", evidence_table(rows))


def evidence_table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Return top-1 of the methods in their usual granularity, a line for each network and bits that `best` has run."""
    usual: dict[str, str | None] = {"nearest": None, "adaround-fast": "layer", **dict.fromkeys(BASES, "block")}
    lines = [header(["Network", "W/A", "Float", *[f"`{name}`" for name in (*usual, "best-fast")]], left=2)]
    for own in (rows[table] for table in EVIDENCE if rows[table]):
        done = by_method(own)
        label, float_top1 = own[0]["cell"]["network"]["label"], f"{own[0]['float_top1']:.2f}"
        methods = [*usual.items(), best_of(label)]
        for bits in ("W4A4", "W2A4", "W3A3", "W2A2"):
            found = [spread(list(top1(done.get((bits, *method), {})).values())) for method in methods]
            if found[-1]:
                lines.append(line([label, bits, float_top1, *found]))
    return "\n".join(lines)


def replaced(text: str, name: str, part: str) -> str:
    """Return ``text`` with what stands between the comments of ``name`` replaced by ``part``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"the page has no place for {name!r}; give it {begin.strip()} and {end.strip()}.")
    return pattern.sub(lambda _: f"{begin}{part}\n{end}", text)


def draw(name: str, paint: Any) -> None:
    """Write the figure that ``paint`` draws."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        paint(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        write_bytes(IMAGES / name, file.getvalue())


def networks_table() -> str:
    """Return what is known of the trained networks."""
    lines = [header(["Network", "Parameters", "Training images", "Hours", "Top-1 %, tuning", "Top-1 %, test"], left=1)]
    for path in sorted(WEIGHTS.glob("emoji1000_*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        hours = sum(stage[-1]["seconds"] for stage in record["log"]) / 3600
        values = [f"{record['parameters']:,}", f"{record['images']:,}", f"{hours:.1f}"]
        accuracy = [f"{record['top1'][part]:.2f}" for part in ("tuning", "test")]
        lines.append(line([f"`{record['network']}`", *values, *accuracy]))
    return "\n".join(lines)


def lites_table() -> str:
    """Return how far the EfficientNet-Lites agree with their float selves."""
    titles = ["Network", "W/A", "Method", "Agreement %", "…where float is sure %", "SQNR dB", "Labelled %"]
    lines = [header([*titles, "Peak loss", "Units", "Seconds"], left=3)]
    for path in sorted(RESULTS.glob("efficientnet_lite*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        name, sure = record["model"].rpartition("_")[2].capitalize(), record["crops"]["evaluation_confident"]
        labelled = whole(record["float"]["labelled_top1"])
        lines.append(line([name, "32/32", "float", "100", f"100 of {sure}", "", labelled, "", "", ""]))
        lines += [line([name, *lite_cells(row)]) for row in record["rows"]]
    return "\n".join(lines)


def coverage(rows: Sequence[Row], sweep: Sweep) -> str:
    """Tell how much of the table is there, what float has, and on what it was measured."""
    if not rows:
        return f"None of the {len(sweep.cells)} cells has been run."
    on_cpu = [row for row in rows if row["hardware"]["device"] == "cpu"]
    machines = sorted({str(row["hardware"]["cpu"]) for row in on_cpu})
    hours = sum(row["measured"]["seconds"] for row in on_cpu) / 3600
    threads = sorted({row["hardware"]["threads"] for row in on_cpu})
    left = "; the others are empty" if len(rows) < len(sweep.cells) else ""
    floats = {row["cell"]["network"]["label"]: f"{row['float_top1']:.2f} %" for row in rows}
    different = set(floats.values())  # one network by several names, such as its numbers of images, has the same
    top1 = ", ".join(different if len(different) == 1 else (f"{floats[name]} ({name})" for name in sorted(floats)))
    text = (
        f"{len(rows)} of {len(sweep.cells)} cells have been run{left}. Float top-1 is {top1}. "
        f"It took {hours:.1f} hours of {'/'.join(map(str, threads))} thread on {'; '.join(machines)}."
    )
    if gpus := {row["hardware"]["gpu"] for row in rows if row not in on_cpu}:
        text += f" Of the cells {len(rows) - len(on_cpu)} ran on {'; '.join(sorted(gpus))}, besides."
    return textwrap.fill(text, WIDTH)


def method_table(rows: Sequence[Row], sweep: Sweep) -> str:
    """Return top-1, mean and standard deviation over seeds, by method and bits."""
    done = by_method(rows)
    columns = list(dict.fromkeys(cell.bits for cell in sweep.cells))
    methods, best = methods_of(sweep), best_of(sweep.cells[0].network.label)
    lines = [header(["Method", "Granularity", *columns, "Seconds"], left=2)]
    for preset, granularity in methods:
        cells = [done.get((bits, preset, granularity), {}) for bits in columns]
        own_rows = [row for own in cells for row in own.values() if row["hardware"]["device"] == "cpu"]
        seconds = [row["measured"]["seconds"] for row in own_rows]
        shown = f"{statistics.fmean(seconds):.0f}" if seconds else ""
        values = [spread(list(top1(own).values())) for own in cells]
        names = ("`best-fast`", "") if (preset, granularity) == best else (f"`{preset}`", granularity or "–")
        lines.append(line([*names, *values, shown]))
    return "\n".join(lines)


def methods_of(sweep: Sweep) -> list[tuple[str, str | None]]:
    return sorted({key_of(identity(cell))[1:] for cell in sweep.cells}, key=method_order)


def method_order(method: tuple[str, str | None]) -> tuple[int, int]:
    preset, granularity = method
    presets = ["nearest", "adaround-fast", *BASES]
    granularities = [None, "layer", "block", *MERGED]
    return presets.index(preset), granularities.index(granularity)


def merging_table(rows: Sequence[Row], sweep: Sweep) -> str:
    """Return what each granularity, and ``best``, adds to its base: points of top-1, and the share of the drop."""
    done = by_method(rows)
    columns = list(dict.fromkeys(cell.bits for cell in sweep.cells))
    best = best_of(sweep.cells[0].network.label)
    methods = methods_of(sweep)
    tables = []
    for preset in BASES:
        merged = [(preset, own) for own in PLAINLY_MERGED if (preset, own) in methods]
        lines = [header([f"On `{preset}`", *columns], left=1)]
        for other in [*merged, best]:
            shown = []
            for bits in columns:
                base, better = (top1(done.get((bits, *method), {})) for method in ((preset, "block"), other))
                shown.append(gain(base, better, rows[0]["float_top1"] if rows else math.nan))
            lines.append(line(["`best-fast`" if other == best else other[1], *shown]))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def gain(base: Mapping[int, float], other: Mapping[int, float], float_top1: float) -> str:
    """Write the mean difference over common seeds, its standard error, and the share of the base's drop that is gone.

    A difference beyond noise is bold.
    """
    seeds = sorted(base.keys() & other.keys())
    if not seeds:
        return ""
    mean, error = paired(base, other)
    drop = float_top1 - statistics.fmean(base[seed] for seed in seeds)
    share = f", {100 * mean / drop:.0f} %" if drop > LEAST_POINTS else ""
    text = f"{mean:+.1f}{'' if math.isnan(error) else f' ± {error:.1f}'}{share}".replace("-", "−")
    return f"**{text}**" if differs(mean, error) else text


def paired(base: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float]:
    """Return the mean difference over common seeds and its standard error (NaN for a single seed)."""
    differences = [other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error


def differs(mean: float, error: float) -> bool:
    """Return whether a difference is beyond noise."""
    return abs(mean) > LEAST_POINTS and abs(mean) > STANDARD_ERRORS * error


def list_table(rows: Sequence[Row]) -> str:
    """Return top-1 and SQNR of each combination of settings that has been run."""
    keys = {key for row in rows for key in row["cell"]["settings"]} - {FOLLOWING}
    varied = {key for key in keys if len({str(row["cell"]["settings"].get(key)) for row in rows}) > 1}
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cell = row["cell"]
        kept = [f"{key.rpartition('.')[2]}={value}" for key, value in cell["settings"].items() if key in varied]
        place = (cell["network"]["label"], cell["bits"], ", ".join([f"`{cell['preset']}`", *kept]))
        found.setdefault(place, []).append(row)
    several = len({network for network, _, _ in found}) > 1
    lines = [header([*["Network"] * several, "W/A", "Method", "Top-1 %", "SQNR dB"], left=2 + several)]
    for network, bits, method in sorted(found):
        own = found[network, bits, method]
        top1s, sqnrs = ([row["measured"][name] for row in own] for name in ("top1", "sqnr_db"))
        values = [spread(top1s), f"{statistics.fmean(sqnrs):.1f}"]
        lines.append(line([*[network] * several, bits, method, *values]))
    return "\n".join(lines)


def full_table(rows: Sequence[Row], reduced: Sequence[Row]) -> str:
    """Return top-1 at the presets' own steps, beside that of the same seed in the tables of few steps."""
    few = {place_of(row): row for row in reduced}
    lines = [header(["Network", "W/A", "Method", "200 steps", "20,000 steps", "Gain"], left=3)]
    for row in sorted(rows, key=place_of):
        network, (bits, preset, _), seed = place_of(row)
        reduced_of = {"qdrop": BASE_OF_BEST, "brecq": ("brecq-fast", "block"), "best": best_of(network)}
        beside = few.get((network, (bits, *reduced_of[preset]), seed))
        found = row["measured"]["top1"]
        few_steps = None if beside is None else beside["measured"]["top1"]
        values = ("", "") if few_steps is None else (f"{few_steps:.2f}", signed(found - few_steps))
        lines.append(line([network, bits, f"`{preset}`", values[0], f"{found:.2f}", values[1]]))
    return "\n".join(lines)


def place_of(row: Row) -> tuple[str, Key, int]:
    return row["cell"]["network"]["label"], key_of(row["cell"]), row["cell"]["seed"]


def convergence_table(rows: Sequence[Row], sweep: Sweep) -> str:
    """Return top-1 over the steps of a module."""
    curves = convergence(rows)
    steps = sorted({cell.recipe.reconstruction.steps for cell in sweep.cells if cell.recipe.reconstruction})
    lines = [header(["Method", *[f"{step:,} steps" for step in steps]], left=1)]
    for preset, curve in curves.items():
        lines.append(line([f"`{preset}`", *[spread(curve.get(step, [])) for step in steps]]))
    return "\n".join(lines)


def convergence(rows: Sequence[Row]) -> dict[str, dict[int, list[float]]]:
    """Return top-1 over seeds, by preset and steps."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: str(row["cell"]["preset"])):
        steps = row["cell"]["settings"].get("reconstruction.steps", 500)
        found.setdefault(row["cell"]["preset"], {}).setdefault(steps, []).append(row["measured"]["top1"])
    return found


def draw_convergence(figure: Figure, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    for preset, curve in convergence(rows).items():
        steps = sorted(curve)
        axes.plot(steps, [statistics.fmean(curve[step]) for step in steps], marker="o", label=preset)
    axes.set_xscale("log")
    axes.set_xlabel("steps of a module")
    axes.set_ylabel("top-1 % of the tuning images")
    if rows:
        axes.legend(frameon=False)


def draw_losses(figure: Figure, rows: Sequence[Row], bits: str) -> None:
    """Draw relative losses over modules, mean over seeds: the two bases, each with its granularities, and ``best``."""
    done = by_method(rows)
    panels = figure.subplots(1, len(BASES), sharey=True)
    for axes, preset in zip(panels, BASES, strict=True):
        for granularity in ("block", *PLAINLY_MERGED):
            draw_curve(axes, done.get((bits, preset, granularity), {}).values(), granularity)
        axes.set_title(f"{preset}, {bits}", fontsize=10)
    draw_curve(panels[0], best_rows(rows, bits), "best-fast")
    panels[0].set_ylabel("module loss / E‖f‖²")
    if panels[0].lines:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)


def draw_curve(axes: Axes, rows: Collection[Row], label: str) -> None:
    """Draw relative losses over modules, mean over ``rows``; nothing where there are none."""
    if not rows:
        return
    losses = [row["measured"]["relative_losses"] for row in rows]
    names = list(losses[0])
    means = [statistics.fmean(loss[name] for loss in losses) for name in names]
    axes.plot(range(len(names)), means, marker=".", linewidth=1.2, label=label)
    axes.set_xticks(range(len(names)), [name.split("+")[0].split("(")[0] for name in names], rotation=90, fontsize=8)
