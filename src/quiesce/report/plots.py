"""The report's figures, each returned as one SVG element that can stand alone or inside a page.

Colours go with markers, dashes and signs, so that nothing is told by colour alone. Text and axes take the colour of the
text around them (``currentColor``); equal input gives equal text.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from quiesce.precision.sensitivity import Sensitivity
from quiesce.result import Run, UnitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 960.0
"""Natural width in px; a page shows a figure at its container's width, but not below 3/4 of the natural one."""
_FONT = 13.0
_CHARACTER = 0.6 * _FONT
"""Width of a character in px, on the safe side."""
_INK = "#1b1f24"
_GRID = "#808080"
_COLOURS = ("#767676", "#0072b2", "#d55e00", "#00876c", "#b84a93", "#9a6b00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)))
_PLAIN_BAR, _MERGED_BAR = "#8fb4d0", "#0072b2"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "quiesce",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a module name may hold a dollar sign
    "axes.unicode_minus": True,
    "font.size": _FONT,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
OUTCOMES = {"accepted": "✓", "rejected": "✗", "taken back": "↩", "not tried": "?"}
"""What can become of a proposed merge, and the sign for it."""


def loss_over_modules(runs: Sequence[Run], relative: bool) -> str:
    """Draw the reconstruction loss over the modules, one line per run (as arXiv 2303.11906, Fig. 1).

    ``relative`` draws L_i / E‖f_i‖² instead of L_i. Runs of far higher loss get a panel of their own above the others.
    The y-axis is logarithmic where the values span more than a factor of 30 (a loss of 0 is left out there). A module
    that a run lacks is a gap; the last run's line is the thickest.
    """
    curves = [run.relative_losses if relative else run.module_losses for run in runs]
    names = module_order(curves)
    labels = run_labels(runs)
    columns = max(1, min(3, int(900 / (60 + _CHARACTER * max(map(len, labels), default=0)))))
    groups = _far_apart(curves)
    heights = [330.0] if len(groups) == 1 else [140.0, 280.0]
    height = sum(heights) + 22 * math.ceil(len(runs) / columns) + _name_height(names)
    with _figure(_figure_width(names), height) as figure:
        panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        lines: dict[int, Any] = {}
        for axes, members in zip(panels, groups, strict=True):
            for i in members:
                values = [curves[i].get(name, math.nan) for name in names]
                lines[i] = axes.plot(range(len(names)), values, **_line_look(i, last=i == len(runs) - 1))[0]
            _value_axis(axes, [v for i in members for v in curves[i].values()], "Lᵢ / E‖fᵢ‖²" if relative else "Lᵢ")
            _module_axis(axes, names)
        figure.align_ylabels(panels)
        handles = [lines[i] for i in range(len(runs))]
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=3.4)
        peaks = "; ".join(_peak(label, curve) for label, curve in zip(labels, curves, strict=True))
        what = "Relative reconstruction loss" if relative else "Reconstruction loss"
        return _svg(figure, f"{what} over {len(names)} modules. {peaks}.")


def capacities(run: Run) -> str:
    """Draw each module's capacity, the differentials between neighbours, and what became of each proposed merge.

    Merges are bars above the modules they join: solid with ✓ where accepted, an outline with ✗ where the guard rejected
    them, ↩ where its last comparison took them back, ? where they were not tried.
    """
    names = list(run.capacities)
    values = list(run.capacities.values())
    merges = merge_outcomes(run)
    placed = _lanes(merges, names)
    lane_count = 1 + max((lane for *_, lane in placed), default=0)
    joined = {name for modules, outcome in merges.items() if outcome == "accepted" for name in modules}
    heights = [26.0 * lane_count, 210.0, 110.0]
    with _figure(_figure_width(names), sum(heights) + 90 + _name_height(names)) as figure:
        lanes, bars, steps = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        colours = [_MERGED_BAR if name in joined else _PLAIN_BAR for name in names]
        bars.bar(range(len(names)), values, width=0.7, color=colours, edgecolor=_INK, linewidth=0.6)
        _value_axis(bars, values, "capacity", bars=True)
        pairs = [i + 0.5 for i, _ in enumerate(run.differentials)]
        steps.bar(pairs, run.differentials, width=0.35, color=_PLAIN_BAR, edgecolor=_INK, linewidth=0.6, hatch="////")
        steps.axhline(0, color=_INK, linewidth=0.8)
        steps.set_ylabel("differential")
        steps.grid(axis="y")
        _draw_lanes(lanes, placed, lane_count)
        _module_axis(steps, names)
        figure.align_ylabels([bars, steps])
        figure.legend(handles=_outcome_key(merges), loc="outside upper left", ncols=4)
        told = "; ".join(f"{' + '.join(modules)} {outcome}" for modules, outcome in merges.items()) or "none"
        return _svg(figure, f"Capacity of {len(names)} modules, from which merges were chosen. Merges: {told}.")


def unit_losses(run: Run) -> str:
    """Draw each unit's reconstruction loss over its optimization steps, one small panel per unit with its own scale."""
    records = run.unit_records
    columns = 4
    rows = max(1, math.ceil(len(records) / columns))
    row, top, bottom = 150.0, 42.0, 40.0
    height = rows * row + 6
    with _figure(_WIDTH, height, layout=None) as figure:
        panel = 174 / _WIDTH
        for i, record in enumerate(records):
            left = (54 + (i % columns) * 236) / _WIDTH
            base = height - (i // columns + 1) * row + bottom
            axes = figure.add_axes((left, base / height, panel, (row - top - bottom) / height))
            _unit_panel(axes, record, first_column=i % columns == 0, last=i + columns >= len(records))
        falls = "; ".join(_fall(record) for record in records if record.loss_curve)
        return _svg(figure, f"Loss over the optimization steps of {len(records)} units. {falls}.")


def sensitivities(found: Sensitivity) -> str:
    """Draw the output error of each layer quantized alone, on a logarithmic scale and in network order.

    Bars are weight and input as the recipe has them; markers are the weight alone, a series for each number of bits.
    """
    names = [row.layer for row in found.layers]
    bits = sorted({b for row in found.layers for b in row.weight_errors})
    with _figure(_figure_width(names), 360 + _name_height(names)) as figure:
        axes = figure.subplots()
        errors = [row.error for row in found.layers]
        bars: dict[str, Any] = {"color": _PLAIN_BAR, "edgecolor": _INK, "linewidth": 0.6, "label": "weight and input"}
        axes.bar(range(len(names)), errors, width=0.7, **bars)
        for i, b in enumerate(bits, 1):
            series = [row.weight_errors.get(b, math.nan) or math.nan for row in found.layers]
            look = {**_line_look(i, last=False), "linestyle": "none"}
            axes.plot(range(len(names)), series, label=f"weight alone, {b} bits", **look)
        _value_axis(
            axes, [*errors, *(e for row in found.layers for e in row.weight_errors.values())], "error", bars=True
        )
        _module_axis(axes, names)
        figure.legend(loc="outside upper left", ncols=5)
        worst = found.ranked[:3]
        told = ", ".join(f"{row.layer} ({number(row.error)})" for row in worst)
        return _svg(figure, f"Output error of each of {len(names)} layers quantized alone. Largest: {told}.")


def metrics_over_bits(
    panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], floats: Mapping[str, float]
) -> str:
    """Draw metrics over bits, a panel each, with a line for each method: its means over seeds, and their spread.

    Args:
        panels: values over seeds, by metric, method and bits. Bars are the sample standard deviation, small dots the
            seeds.
        floats: what the float network has, by metric: a dotted line.
    """
    columns = list(dict.fromkeys(name for methods in panels.values() for series in methods.values() for name in series))
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    labels = [short(name, 60) for name in names]
    rows = math.ceil(len(names) / max(1, min(3, int(900 / (60 + _CHARACTER * max(map(len, labels), default=0))))))
    with _figure(_WIDTH, 330 + 22 * rows) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        lines: dict[str, Any] = {}
        for axes, (metric, methods) in zip(grid, panels.items(), strict=True):
            for i, name in enumerate(names):
                series = methods.get(name, {})
                # Side by side, so that no bar hides another.
                shift = 0.5 * ((i + 0.5) / len(names) - 0.5)
                places = [columns.index(c) + shift for c in series]
                means = [statistics.fmean(values) for values in series.values()]
                spreads = [statistics.stdev(v) if len(v) > 1 else math.nan for v in series.values()]
                look = _line_look(i, last=False) | {"capsize": 3, "elinewidth": 1.4}
                lines[name] = axes.errorbar(places, means, spreads, **look)
                for place, values in zip(places, series.values(), strict=True):
                    axes.scatter([place] * len(values), values, s=7, color=look["color"], alpha=0.5)
            if metric in floats:
                axes.axhline(floats[metric], color=_INK, linewidth=1, linestyle=(0, (1, 2)))
                end = {"ha": "right", "va": "bottom", "fontsize": 11}
                axes.annotate("float", (1, floats[metric]), (0, 2), axes.get_yaxis_transform(), "offset points", **end)
            axes.set_xlim(-0.5, len(columns) - 0.5)
            axes.set_xticks(range(len(columns)), columns)
            axes.set_ylabel(metric)
            axes.grid(axis="y")
        figure.legend(
            [lines[name] for name in names],
            labels,
            loc="outside upper left",
            ncols=math.ceil(len(names) / rows) if rows else 1,
            handlelength=3.4,
        )
        first, methods = next(iter(panels.items()))
        told = "; ".join(
            f"{name}: " + ", ".join(f"{number(statistics.fmean(v))} at {c}" for c, v in series.items())
            for name, series in methods.items()
        )
        return _svg(figure, f"{', '.join(panels)} over bits, mean over seeds. {first}: {told}.")


def merge_outcomes(run: Run) -> dict[tuple[str, ...], str]:
    """Map each merge that was proposed or tried to a key of :data:`OUTCOMES`, in the order of proposal."""
    trials = {tuple(t["modules"]): bool(t["accepted"]) for t in (run.guard or {}).get("trials", [])}
    proposed = [tuple(modules) for modules in run.proposed_merges]

    def outcome(modules: tuple[str, ...]) -> str:
        if trials.get(modules) is False:
            return "rejected"
        if any(set(modules) <= set(unit) for unit in run.units):
            return "accepted"
        return "taken back" if modules in trials else "not tried"

    return {modules: outcome(modules) for modules in [*proposed, *trials]}


def module_order(curves: Sequence[dict[str, float]]) -> list[str]:
    """Return all module names once: in the order of the longest curve, then what the others add."""
    return list(dict.fromkeys(name for curve in sorted(curves, key=len, reverse=True) for name in curve))


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name each run by preset and granularity, and by bits, seed and number where only these tell runs apart."""
    several_bits = len({(run.weight_bits, run.activation_bits) for run in runs}) > 1
    several_seeds = len({run.seed for run in runs}) > 1
    labels = []
    for run in runs:
        parts = [run.preset] + ([run.granularity] if run.granularity else [])
        parts += [bits(run)] if several_bits else []
        parts += [f"seed {run.seed}"] if several_seeds else []
        labels.append(short(" · ".join(parts), 60))
    return [f"{x} ({labels[: i + 1].count(x)})" if labels.count(x) > 1 else x for i, x in enumerate(labels)]


def bits(run: Run) -> str:
    """Return the bit-widths in the field's notation, ``W2A4``; float activations are ``A32``."""
    return f"W{run.weight_bits}A{32 if run.activation_bits is None else run.activation_bits}"


def number(value: float | None) -> str:
    """Write ``value`` with three significant digits, powers of ten only where it is very small or large."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


@contextmanager
def _figure(width: float, height: float, layout: Any = "constrained") -> Iterator[Figure]:
    """Give a figure of ``width`` × ``height`` px in this module's style, whatever the user's matplotlib style is."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Text stays text: the reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width / 72, height / 72), layout=layout)
        figure.patch.set_visible(False)
        yield figure


def _svg(figure: Figure, description: str) -> str:
    """Return the figure as an ``<svg>`` element of no fixed size, with ``description`` for screen readers."""
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    width = figure.get_figwidth() * 72
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": _printable(description),
        "stroke-linejoin": "round",
        "style": f"width: 100%; min-width: {0.75 * width:.0f}px",
    }
    text = ElementTree.tostring(root, encoding="unicode")
    # Of the font, keep weight and size; the family is the page's.
    text = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    return _unique_ids(text.replace(_INK, "currentColor"))


def _strip(element: ElementTree.Element) -> None:
    """Drop namespaces (HTML has none), metadata, style rules that would reach the whole page, and blank text."""
    for child in list(element):
        child.tag = child.tag.rpartition("}")[2]
        if child.tag in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child)
    element.tag = element.tag.rpartition("}")[2]
    for key in [k for k in element.attrib if k.startswith("{")]:
        element.attrib[key.rpartition("}")[2]] = element.attrib.pop(key)
    if element.tag != "text" and element.text and element.text.isspace():
        element.text = None
    if element.tail and element.tail.isspace():
        element.tail = "\n"


def _unique_ids(svg: str) -> str:
    """Keep only ids that are referred to, with a checksum of the figure in front: several figures share a page."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    prefix = f"q{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)


def _figure_width(names: Sequence[str]) -> float:
    return max(_WIDTH, 15.0 * len(names) + 80)


def _name_angle(names: Sequence[str]) -> int:
    slot = (_figure_width(names) - 80) / max(1, len(names))
    if _CHARACTER * max((len(short(name)) for name in names), default=0) < slot:
        return 0
    return 45 if slot > 2 * _FONT else 90


def _name_height(names: Sequence[str]) -> float:
    length = _CHARACTER * max((len(short(name)) for name in names), default=0)
    return _FONT + length * math.sin(math.radians(_name_angle(names)))


def short(name: str, most: int = 26) -> str:
    """Return ``name``, its middle left out where it is longer than ``most`` characters (both ends tell apart)."""
    name = _printable(name)
    tail = (most - 1) * 2 // 3
    return name if len(name) <= most else f"{name[: most - 1 - tail]}…{name[-tail:]}"


def _printable(text: str) -> str:
    """Replace what XML can't hold (control characters, lone surrogates)."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _module_axis(axes: Axes, names: Sequence[str]) -> None:
    angle = _name_angle(names)
    axes.set_xlim(-0.6, max(0.6, len(names) - 0.4))
    alignment: dict[str, Any] = {"ha": "right", "va": "center" if angle == 90 else "top", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), [short(n) for n in names], rotation=angle, **(alignment if angle else {}))
    axes.grid(axis="x")


def _value_axis(axes: Axes, values: Sequence[float], label: str, bars: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    positive = [v for v in values if v > 0]
    spread = max(positive, default=1.0) / min(positive, default=1.0)
    if spread > 30:
        axes.set_yscale("log", nonpositive="clip" if bars else "mask")
        if bars:  # the smallest keeps some height
            axes.set_ylim(bottom=min(positive) / 2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 1000 else (1.0,)))
        axes.minorticks_off()
        label += ", log scale"
    elif min(values, default=0.0) >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _tick(value: float, _: int | None = None) -> str:
    """Write a tick's value without trailing zeros."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")


def _lanes(merges: dict[tuple[str, ...], str], names: Sequence[str]) -> list[tuple[int, int, str, int]]:
    """Place each merge as (first module, last module, outcome, lane) so that no two bars touch."""
    position = {name: i for i, name in enumerate(names)}
    placed: list[tuple[int, int, str, int]] = []
    for modules, outcome in merges.items():
        where = [position[name] for name in modules if name in position]
        if where:
            first, last = min(where), max(where)
            taken = {lane for a, b, _, lane in placed if a <= last and first <= b}
            placed.append((first, last, outcome, next(lane for lane in range(len(merges)) if lane not in taken)))
    return placed


def _draw_lanes(axes: Axes, placed: Sequence[tuple[int, int, str, int]], count: int) -> None:
    for first, last, outcome, lane in placed:
        accepted = outcome == "accepted"
        axes.barh(lane, last - first + 0.7, 0.72, left=first - 0.35, **_outcome_look(outcome))
        sign = OUTCOMES[outcome]
        colour = "white" if accepted else _INK
        axes.text((first + last) / 2, lane, sign, ha="center", va="center", color=colour, fontweight="bold")
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("merges", rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, labelbottom=False)


def _far_apart(curves: Sequence[dict[str, float]]) -> list[list[int]]:
    """Split the curves at the widest gap between their medians, higher ones first, if it is a factor of 8 or more."""
    medians = {i: statistics.median(curve.values()) if curve else 0.0 for i, curve in enumerate(curves)}
    ranked = sorted((i for i in medians if medians[i] > 0), key=medians.__getitem__)
    gap, cut = max(((medians[b] / medians[a], medians[b]) for a, b in pairwise(ranked)), default=(1.0, 0.0))
    if gap < 8:
        return [list(medians)]
    return [[i for i in medians if medians[i] >= cut], [i for i in medians if medians[i] < cut]]


def _line_look(i: int, last: bool) -> dict[str, Any]:
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "linewidth": 2.6 if last else 1.6,
        "markersize": 6 if last else 5,
        "zorder": 3 if last else 2,
    }


def _outcome_look(outcome: str) -> dict[str, Any]:
    if outcome == "accepted":
        return {"facecolor": _MERGED_BAR, "edgecolor": _MERGED_BAR, "linewidth": 1.4}
    dashes = {"rejected": (0, (4, 2)), "taken back": (0, (1, 1.5)), "not tried": "-"}
    colour = {"rejected": "#d55e00", "taken back": "#9a6b00", "not tried": "#767676"}
    return {"facecolor": "none", "edgecolor": colour[outcome], "linewidth": 1.8, "linestyle": dashes[outcome]}


def _outcome_key(merges: dict[tuple[str, ...], str]) -> list[Any]:
    from matplotlib.patches import Patch

    present = [outcome for outcome in OUTCOMES if outcome in merges.values()]
    return [Patch(**_outcome_look(outcome), label=f"{OUTCOMES[outcome]} {outcome}") for outcome in present]


def _unit_panel(axes: Axes, record: UnitRecord, first_column: bool, last: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = [point[0] for point in record.loss_curve]
    losses = [point[1] for point in record.loss_curve]
    axes.plot(steps, losses, color=_COLOURS[1], marker="o" if len(steps) == 1 else None, linewidth=1.8)
    axes.set_xlim(0, max(record.steps, 1))
    axes.set_ylim(0, 1.08 * max(losses, default=1.0) or 1.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(2, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_tick))
    axes.tick_params(labelsize=11)
    axes.grid()
    title = short(" + ".join(record.modules), 27)
    axes.annotate(title, (0, 1), (0, 22), "axes fraction", "offset points", fontsize=12, fontweight="bold")
    axes.annotate(_fate(record), (0, 1), (0, 7), "axes fraction", "offset points", fontsize=11)
    if first_column:
        axes.set_ylabel("loss", fontsize=11)
    if last:
        axes.set_xlabel("step", fontsize=11)


def _fate(record: UnitRecord) -> str:
    curve = record.loss_curve
    if not record.steps:
        return "nothing to learn"
    told = [f"{number(curve[0][1])} → {number(curve[-1][1])}" if curve else "no curve recorded"]
    return ", ".join(told + (["reused"] if record.reused else [f"{record.seconds:.1f} s"]))


def _fall(record: UnitRecord) -> str:
    first, last = record.loss_curve[0][1], record.loss_curve[-1][1]
    return f"{' + '.join(record.modules)}: {number(first)} to {number(last)}"


def _peak(label: str, curve: dict[str, float]) -> str:
    if not curve:
        return f"{label}: not measured"
    name = max(curve, key=curve.__getitem__)
    falls = sum(a > b for a, b in pairwise(curve.values()))
    return f"{label}: peak {number(curve[name])} at {name}, {falls} falls"
