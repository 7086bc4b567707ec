"""Parts of docs/results.md on single questions: which granularities are good, how many images, what capacity tells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from bench_rows import Row, by_method, header, key_of, line, signed, spread

STUDIED = "emoji_mobilenetv2_050"
"""The table that random granularities are compared with."""
STUDIED_METHOD = ("W2A4", "brecq-fast")
OURS = {
    "block": "blocks",
    "scheme": "scheme",
    "modcap": "modcap",
    "loss": "loss",
    "loss-descent": "loss-descent",
    "loss-descent, overlap 1": "loss-descent, overlap 1",
}
"""Granularities that are shown among the random ones."""
CODES = {"BRECQ": "–", "Genie": "0.5"}
"""What the published codes drop that have no setting for it."""
COMPARED = {"network": "mobilenetv2_050", "bits": "2/4", "steps": 200}
"""What the published codes ran on; a row of something else tells what."""
QUANTITIES: dict[str, Callable[[Row], float]] = {
    "largest module loss": lambda row: peak(row["measured"]["module_losses"]),
    "largest relative module loss": lambda row: peak(row["measured"]["relative_losses"]),
    "loss of the last module": lambda row: list(row["measured"]["module_losses"].values())[-1],
    "number of units": lambda row: len(row["measured"]["units"]),
    "top-1 %": lambda row: row["measured"]["top1"],
}


def peak(losses: Mapping[str, float]) -> float:
    """Return the largest loss in front of the last module, whose output, the logits, is of another size."""
    return max(list(losses.values())[:-1])


def granularities_table(rows: Sequence[Row], known: Sequence[Row]) -> str:
    """Return the rank correlations between quantities of random granularities, and where the methods' own stand.

    ``known`` are rows of the same network with the methods' granularities; those of the random ones' seed are taken.
    """
    if len(rows) < 3:
        return ""
    values = {name: [get(row) for row in rows] for name, get in QUANTITIES.items()}
    lines = [header(["Rank correlation with", "loss of the last module", "top-1"], left=1)]
    for name in list(QUANTITIES)[:-1]:
        against = ("loss of the last module", "top-1 %")
        shown = ["–" if other == name else correlation(values[name], values[other]) for other in against]
        lines.append(line([name, *shown]))
    lines += ["", header(["Granularity", "Units", "Largest", "Last", "Top-1 %", "Random ones below"], left=1)]
    names = ("number of units", "largest module loss", "loss of the last module", "top-1 %")
    for label, row in ours(rows, known).items():
        units, largest, last, top1 = (QUANTITIES[name](row) for name in names)
        below = sum(value < top1 for value in values["top-1 %"])
        lines.append(line([label, f"{units}", f"{largest:.0f}", f"{last:.0f}", f"{top1:.2f}", f"{below}"]))
    middle = [statistics.median(values[name]) for name in names]
    lines.append(line(["random, medians", *(f"{v:.0f}" for v in middle[:3]), f"{middle[3]:.2f}", ""]))
    best = max(rows, key=QUANTITIES["top-1 %"])
    highest = [QUANTITIES[name](best) for name in names]
    lines.append(line(["random, best", *(f"{v:.0f}" for v in highest[:3]), f"{highest[3]:.2f}", f"{len(rows) - 1}"]))
    return "\n".join(lines)


def ours(rows: Sequence[Row], known: Sequence[Row]) -> dict[str, Row]:
    """Return the rows of the methods' granularities, of the seed that the random ones have."""
    seed, found = rows[0]["cell"]["seed"], by_method(known)
    methods = {label: found.get((*STUDIED_METHOD, name), {}) for name, label in OURS.items()}
    return {label: own[seed] for label, own in methods.items() if seed in own}


def correlation(first: Sequence[float], second: Sequence[float]) -> str:
    return f"{spearmanr(first, second).statistic:+.2f}".replace("-", "−")


def draw_granularities(figure: Figure, rows: Sequence[Row], known: Sequence[Row]) -> None:
    """Draw the largest module loss against the last one's, and that against top-1."""
    panels = figure.subplots(1, 2)
    pairs = (("largest module loss", "loss of the last module"), ("loss of the last module", "top-1 %"))
    for axes, (across, up) in zip(panels, pairs, strict=True):
        x, y = QUANTITIES[across], QUANTITIES[up]
        axes.scatter([x(r) for r in rows], [y(r) for r in rows], s=16, color="0.6", label="random")
        if rows:
            for number, (label, row) in enumerate(ours(rows, known).items()):
                axes.scatter(x(row), y(row), s=40, marker="osD^vP"[number], color=f"C{number}", label=label)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    if rows:
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)


def amounts_table(rows: Sequence[Row]) -> str:
    """Return top-1 by calibration images and batch, without and with merged units."""
    found = amounts(rows)
    lines = [header(["Images", "Batch", "blocks", "loss-descent", "Difference"], left=0)]
    for (images, batch), methods in sorted(found.items()):
        plain, merged = methods.get("block", []), methods.get("loss-descent", [])
        both = plain and merged
        difference = signed(statistics.fmean(merged) - statistics.fmean(plain)) if both else ""
        lines.append(line([f"{images:,}", f"{batch}", spread(plain), spread(merged), difference]))
    return "\n".join(lines)


def amounts(rows: Sequence[Row]) -> dict[tuple[int, int], dict[str | None, list[float]]]:
    """Return top-1 over seeds by images and batch, then by granularity."""
    found: dict[tuple[int, int], dict[str | None, list[float]]] = {}
    for row in rows:
        batch = row["cell"]["settings"].get("reconstruction.batch_size", 32)
        methods = found.setdefault((row["cell"]["images"], batch), {})
        methods.setdefault(key_of(row["cell"])[2], []).append(row["measured"]["top1"])
    return found


def draw_amounts(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw top-1 over the calibration images at batches of 32, and over the batch."""
    found, panels = amounts(rows), figure.subplots(1, 2, sharey=True)
    for colour, method in (("C0", "block"), ("C1", "loss-descent")):
        by_images = {images: own[method] for (images, batch), own in found.items() if batch == 32 and method in own}
        draw_curve(panels[0], by_images, method, f"{colour}o-")
        for images, style in ((1024, "o-"), (4096, "s--")):
            by_batch = {batch: own[method] for (n, batch), own in found.items() if n == images and method in own}
            draw_curve(panels[1], by_batch, f"{method}, {images:,} images", colour + style)
    panels[0].set_xlabel("calibration images (batches of 32)")
    panels[1].set_xlabel("images in a batch")
    panels[0].set_ylabel("top-1 %")
    places = {images for images, _ in found}, {batch for _, batch in found}
    for axes, own in zip(panels, places, strict=True):
        if axes.lines:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(own), [f"{place:,}" for place in sorted(own)])
            axes.legend(frameon=False, fontsize=8)


def draw_curve(axes: Axes, values: Mapping[int, Sequence[float]], label: str, style: str) -> None:
    if values:
        places = sorted(values)
        axes.plot(places, [statistics.fmean(values[place]) for place in places], style, label=label)


def ranking_table(tables: Sequence[Sequence[Row]]) -> str:
    """Return, by network, how ModCap ranks modules and pairs beside the losses of a block pass."""
    columns = ["Network", "W/A", "Modules", "Pairs by difference", "Pairs that fall", "Top quarter shared"]
    lines = [header(columns, left=2)]
    for rows in tables:
        found = by_method(rows)
        for (bits, preset, granularity), own in found.items():
            blocks = found.get((bits, preset, "block"), {})
            if granularity != "modcap" or not blocks:
                continue
            capacities = list(next(iter(own.values()))["measured"]["capacities"].values())
            losses = [list(row["measured"]["module_losses"].values()) for row in blocks.values()]
            means = [statistics.fmean(values) for values in zip(*losses, strict=True)]
            label = next(iter(own.values()))["cell"]["network"]["label"]
            lines.append(line([f"{label}, `{preset}`", bits, *ranking(capacities, means)]))
    return "\n".join(lines)


def ranking(capacities: Sequence[float], losses: Sequence[float]) -> list[str]:
    """Return the rank correlations of capacities and losses, over modules, over the sizes and over the signed
    differences of neighbours, and how many of the quarter of pairs that differ most the two share."""
    falls = [[a - b for a, b in pairwise(values)] for values in (capacities, losses)]
    sizes = [[abs(value) for value in values] for values in falls]
    top = -(-len(sizes[0]) // 4)
    chosen = [set(sorted(range(len(s)), key=lambda i, s=s: -s[i])[:top]) for s in sizes]  # type: ignore[misc]
    shared = f"{len(chosen[0] & chosen[1])} of {top}"
    return [correlation(capacities, losses), correlation(*sizes), correlation(*falls), shared]


def references_table(theirs: Sequence[Row], ours: Sequence[Row], best: Sequence[Row]) -> str:
    """Return top-1 and seconds of the published codes, of ours with the same λ, and of `best`."""
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in theirs:
        drop = f"{row['drop_prob']:g}" if "drop_prob" in row else CODES[row["code"]]
        unlike = [str(row[key]) for key, usual in COMPARED.items() if row[key] != usual]
        place = ", ".join([row["code"], *unlike]), drop, f"{row['lam']:g}"
        found.setdefault(place, []).append((row["top1"], sum(row["seconds"].values())))
    for row in ours:
        preset, settings = row["cell"]["preset"], row["cell"]["settings"]
        drop = {"brecq-fast": "0", "qdrop-fast": "0.5"}[preset]
        place = f"ours, `{preset}`", drop, f"{settings['reconstruction.regularizer_weight']:g}"
        found.setdefault(place, []).append((row["measured"]["top1"], row["measured"]["seconds"]))
    found["ours, `best-fast`", "0.25", "relative"] = [(r["measured"]["top1"], r["measured"]["seconds"]) for r in best]
    lines = [header(["Code", "Drop", "λ", "Top-1 %", "Seeds", "Seconds"], left=3)]
    for place, own in sorted(found.items()):
        top1s, seconds = zip(*own, strict=True)
        lines.append(line([*place, spread(top1s), f"{len(own)}", f"{statistics.fmean(seconds):.0f}"]))
    return "\n".join(lines)
