"""Quantize torchvision's ResNet-18 on an image folder, and show what became of it.

pip install ".[models]"
python examples/quantize_torchvision.py --images FOLDER                # pretrained weights, downloaded
python examples/quantize_torchvision.py --random --steps 2 --size 32   # runs anywhere: random weights and images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import quiesce
from quiesce.cli.tables import results_table
from quiesce.data import Samples, load_data
from quiesce.models import load_model
from quiesce.preprocess import override


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize torchvision's ResNet-18.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, help="folder of calibration images; pretrained weights")
    what.add_argument("--random", action="store_true", help="random weights and images, to see that it runs")
    parser.add_argument("--count", type=int, default=64, help="calibration images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="optimization steps per module (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder to save the network in")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    loaded = load_model("torchvision:resnet18", weights="random" if options.random else None)
    preprocessing = override(loaded.preprocessing, resize=options.size, crop=(options.size, options.size))
    if options.random:
        generator = torch.Generator().manual_seed(0)
        samples = Samples((torch.randn(options.count, 3, options.size, options.size, generator=generator),))
    else:
        samples = load_data(str(options.images), preprocessing, limit=options.count)

    # The merges of the paper's authors for this network. "loss" or "modcap" would choose them, for any network.
    recipe = quiesce.Recipe.preset(
        "qdrop-fast",
        weight_bits=4,
        activation_bits=4,
        granularity="scheme",
        scheme="resnet18",
        steps=options.steps,
        batch_size=16,
    )
    stored = None if preprocessing is None else preprocessing.to_dict()
    # No labels here: the calibration images serve to see how far the network agrees with its float self.
    quantized = quiesce.quantize(
        loaded.model, samples, recipe, evaluate=samples, name=loaded.name, preprocessing=stored
    )

    console = Console(width=140)
    console.print(results_table(quantized.result))
    for trial in (quantized.result.run.guard or {}).get("trials", []):
        verdict = "accepted" if trial["accepted"] else "rejected"
        errors = f"{trial['merged_error']:.4f} merged, {trial['unmerged_error']:.4f} unmerged"
        console.print(f"{' + '.join(trial['modules'])}: {verdict} (held-out error {errors})", highlight=False)
    if options.out is not None:
        console.print(f"saved to {quantized.save(options.out)}", highlight=False)


if __name__ == "__main__":
    main()
