"""Run the paper's table on ImageNet, and print what comes out beside the published numbers.

    python benchmarks/imagenet.py --imagenet FOLDER --out runs/imagenet --gpus 1
    python benchmarks/imagenet.py --imagenet FOLDER --out runs/small --networks resnet18 --bits 2/4 --steps 1000

FOLDER has ``train`` and ``val``, each with a sub-folder per class. Networks come with the weights of their library;
``--weights NAME=FILE`` takes others, such as the checkpoints that the references publish, by name or, where names
differ, in order. Where float differs from the published network, compare the drops, which are printed too.

The published merged rows optimize on 4,096 images (ResNet-50: 2,048) in batches of 256, the base rows on 1,024 in
batches of 32: ``--images 4096 --batch-size 256`` does so for all rows, so that granularity and data stay apart.
Calibration images are centre crops; the references take random ones. Cells that are in ``--out`` are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quiesce.files import read_json
from quiesce.outputs import write_text
from quiesce.sweep.plan import read_sweep
from quiesce.sweep.table import Summary, summarize
from shown_sweep import run_shown

NETWORKS = {
    "resnet18": ("torchvision:resnet18", "resnet18"),
    "resnet50": ("torchvision:resnet50", "resnet50"),
    "mobilenetv2_100": ("torchvision:mobilenet_v2", "mobilenet_v2"),
    "mobilenetv2_075": ("timm:mobilenetv2_075", "mobilenetv2_100"),
    "mobilenetv2_050": ("timm:mobilenetv2_050", "mobilenetv2_100"),
    "mobilenetv2_035": ("timm:mobilenetv2_035", "mobilenetv2_100"),
    "regnetx_600mf": ("timm:regnetx_006", "regnetx_006"),
}
"""By name: the network, and the published list of merges for it."""
PREPARATION = {"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PUBLISHED = Path(__file__).parent / "published.json"
"""Top-1 on ImageNet as arXiv 2303.11906 prints it, by bits, method and network."""
METHODS: dict[str, tuple[str, str | None]] = {
    "nearest": ("nearest", None),
    "AdaRound": ("adaround", "layer"),
    "BRECQ": ("brecq", "block"),
    "QDrop": ("qdrop", "block"),
    **{
        f"{base} + {granularity}": (base.lower(), granularity)
        for base in ("BRECQ", "QDrop")
        for granularity in ("modcap", "loss", "loss-descent", "scheme")
    },
}
"""By name: preset and granularity."""
FAST_BELOW = 2_000
"""Steps below which the rates of the ``-fast`` presets are taken."""
PRINTED_AS = {"BRECQ + loss": "MRECG+BRECQ", "QDrop + loss": "MRECG+QDrop"}
"""Methods that the paper calls otherwise."""


def sweep_text(name: str, options: argparse.Namespace) -> str:
    """Return the sweep file of network ``name``."""
    model, scheme = NETWORKS[name]
    network: dict[str, Any] = {
        "model": model,
        "name": name,
        "calibration": str(options.imagenet / "train"),
        "evaluate": str(options.imagenet / "val"),
        "images": options.images,
        **PREPARATION,
    }
    if name in options.weights:
        network |= {"weights": options.weights[name], "weights_by_order": options.by_order}
    if options.evaluate_images:
        network["evaluate_images"] = options.evaluate_images
    lines = ["[[network]]", *settings(network)]
    for method in options.methods:
        preset, granularity = METHODS[method]
        grid: dict[str, Any] = {"preset": preset, "bits": options.bits, "seed": options.seeds}
        if granularity is not None:
            learned = preset if options.steps >= FAST_BELOW else f"{preset}-fast"
            grid |= {"preset": learned, "granularity": granularity, "steps": options.steps}
            grid |= {"batch_size": options.batch_size}
        if granularity == "scheme":
            grid["scheme"] = scheme
        lines += ["", "[[grid]]", *settings(grid)]
    return "\n".join([*lines, "", "[ray]", *settings({"cpus": options.cpus, "gpus": options.gpus}), ""])


def settings(table: dict[str, Any]) -> list[str]:
    """Return lines of TOML; plain values are written in it as in JSON."""
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


def run(name: str, options: argparse.Namespace) -> list[Summary]:
    """Run the missing cells of one network, and return means over seeds."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.toml"
    write_text(path, sweep_text(name, options))
    sweep = read_sweep(path)
    rows = run_shown(sweep, options.out / name)
    return summarize(sweep.cells, rows)


def table_of(name: str, summaries: Sequence[Summary], bits: Sequence[str]) -> Table:
    """Return ours beside what is published: top-1 and its drop from float, in per cent."""
    published = read_json(PUBLISHED)
    float_top1 = next((s.float_top1 for s in summaries if s.float_top1 is not None), None)
    there = published["float"].get(name)
    table = Table(title=f"{name}: float {shown(float_top1)} % here, {shown(there)} % published")
    table.add_column("Method")
    for pair in bits:
        table.add_column(f"{pair} here")
        table.add_column("drop", justify="right")
        table.add_column("published", justify="right")
        table.add_column("drop", justify="right")
    for method, (preset, granularity) in METHODS.items():
        cells: list[str] = []
        for pair in bits:
            own = ours(summaries, preset, granularity, pair)
            theirs = published["top1"].get(pair, {}).get(PRINTED_AS.get(method, method), {}).get(name)
            mean = None if own is None else own[0]
            spread = f"{own[0]:.2f} ± {own[1]:.2f}" if own is not None and own[1] is not None else shown(mean)
            cells += [spread, shown(drop(float_top1, mean)), shown(theirs), shown(drop(there, theirs))]
        if any(cells):
            table.add_row(method, *cells)
    return table


def ours(
    summaries: Sequence[Summary], preset: str, granularity: str | None, bits: str
) -> tuple[float, float | None] | None:
    """Return mean and standard deviation of our top-1, None where nothing was run."""
    weights, activations = bits.split("/")
    for summary in summaries:
        base, _, merged = summary.method.partition(",")[0].partition(" / ")
        found = (base.removesuffix("-fast"), merged or None, summary.bits)
        top1 = summary.metrics["top1"]
        if found == (preset, granularity, f"W{weights}A{activations}") and top1 is not None:
            return top1.mean, top1.deviation
    return None


def drop(whole: float | None, part: float | None) -> float | None:
    return None if whole is None or part is None else whole - part


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def named_file(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if name not in NETWORKS or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE with a name of {', '.join(NETWORKS)}")
    return name, str(Path(file).resolve())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the paper's table on ImageNet.")
    parser.add_argument("--imagenet", type=Path, required=True, help="folder with train and val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is there is kept")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--bits", nargs="+", default=["4/4", "2/4", "3/3", "2/2"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--weights", nargs="+", default=[], type=named_file, metavar="NAME=FILE")
    parser.add_argument("--by-order", action="store_true", help="take the tensors of --weights in order, not by name")
    parser.add_argument("--images", type=int, default=1024, help="calibration images (default: %(default)s)")
    parser.add_argument("--evaluate-images", type=int, help="evaluate on fewer images than all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20_000, help="of a module (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cpus", type=int, default=1, help="cores of a run")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a run, or a share of one")
    options = parser.parse_args(arguments)
    options.weights = dict(options.weights)
    options.imagenet = options.imagenet.resolve()
    return options


def main() -> None:
    options = parse()
    for name in options.networks:
        Console().print(table_of(name, run(name, options), options.bits))


if __name__ == "__main__":
    main()
