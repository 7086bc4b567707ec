"""Weight bits chosen by layer, at a mean of 3, against 3 bits everywhere, on the embedded demo network.

    pip install ".[mixed]"
    python benchmarks/mixed.py

Each seed draws its own calibration images from those of the demo, and is the recipe's. Bits are chosen on these images
alone; the 2,000 test images are only measured on. Rows are written as soon as they are there, and a second run goes on
behind the last one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quiesce import Recipe, choose_bits
from quiesce.demo import load_images, load_network
from quiesce.outputs import write_text
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.result import hardware, versions

OUT = Path(__file__).parent / "results" / "mixed.json"
PRESETS = {"nearest": {}, "brecq-fast": {"steps": 200}, "qdrop-fast": {"steps": 200}}
SEEDS = (0, 1, 2)
CHOICES = {"3 everywhere": None, "mean of 3, from 2 to 8": range(2, 9), "mean of 3, from 2, 3 and 4": (2, 3, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="calibration images of each seed")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {"images": options.images, "versions": versions(), "hardware": hardware(torch.device("cpu")), "rows": []}
    if options.out.exists():
        record["rows"] = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    known = {(row["seed"], row["bits"], row["preset"]) for row in record["rows"]}
    for row in measure(options.images, known):
        record["rows"].append(row)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print({key: value for key, value in row.items() if key != "layers"}, flush=True)
    print(table(record["rows"]))


def measure(images: int, known: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    calibration, test, labels = load_images()
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        samples = calibration[torch.randperm(len(calibration), generator=generator)[:images]]
        for bits, choices in CHOICES.items():
            if all((seed, bits, preset) in known for preset in PRESETS):
                continue
            base = Recipe.preset("nearest", weight_bits=3, activation_bits=4, seed=seed)
            made = None
            if choices is not None:
                made = choose_bits(load_network(), samples, base, average_bits=3, bits=choices)
                base = made.recipe
            prepared = prepare(load_network(), samples, base, evaluate=[(test, labels)], holdout=0)
            for preset, settings in PRESETS.items():
                if (seed, bits, preset) in known:
                    continue
                recipe = Recipe.preset(
                    preset, weight_bits=3, activation_bits=4, seed=seed, layers=base.layers, **settings
                )
                (result,), _ = run(prepared, recipe)
                yield {
                    "seed": seed,
                    "bits": bits,
                    "preset": preset,
                    "top1": result.top1,
                    "agreement": result.agreement,
                    "sqnr_db": result.sqnr_db,
                    "peak_loss": result.peak_loss,
                    "seconds": result.seconds,
                    "layers": None if made is None else made.bits,
                    "error": None if made is None else made.error,
                    "measuring_seconds": None if made is None else made.sensitivity.seconds,
                }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the range of top-1."""
    lines = [
        "| Method | Weight bits | Top-1 % | …of each seed | SQNR dB | Peak module loss |",
        "|---|---|--:|---|--:|--:|",
    ]
    for preset in PRESETS:
        for bits in CHOICES:
            some = [row for row in rows if (row["preset"], row["bits"]) == (preset, bits)]
            if not some:
                continue
            top1, sqnr, peak = ([row[key] for row in some] for key in ("top1", "sqnr_db", "peak_loss"))
            lines.append(
                f"| `{preset}` | {bits} | {statistics.mean(top1):.2f} | {', '.join(f'{t:.2f}' for t in top1)} "
                f"| {statistics.mean(sqnr):.1f} | {statistics.mean(peak):.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
