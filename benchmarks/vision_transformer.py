"""Train a small vision transformer on Fashion-MNIST, quantize it, and measure what each option of attention gives.

    apt install dataset-fashion-mnist
    pip install timm
    python benchmarks/vision_transformer.py train [--epochs N] [--seed N]
    python benchmarks/vision_transformer.py tune
    python benchmarks/vision_transformer.py test

The images are split as ``train_demo.py`` splits them: the 2,000 tuning images serve for choices (``tune``: each option
of attention on and off), the 10,000 test images for final numbers only (``test``). Calibration images are 512 of the
training images, drawn by seed. The weights are kept in float16, and it is those that every number is about.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from quiesce import Recipe
from quiesce.demo import normalize
from quiesce.outputs import write_text
from quiesce.pipeline import run
from quiesce.preparation import prepare
from quiesce.result import hardware, versions
from train_demo import BATCH, DATA, LABEL_SMOOTHING, fit, read_set, split, tensors, top1

HERE = Path(__file__).parent
RESULTS = HERE / "results/vision_transformer.json"
WEIGHTS = HERE / "weights/vision_transformer.safetensors"
MODEL = "vit_tiny_patch16_224"
SHAPE: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 7,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
}
PEAK_LR, WEIGHT_DECAY, CLIP = 1e-3, 0.05, 1.0
RECIPE = {
    "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, batch {BATCH}, gradients clipped to norm {CLIP}",
    "learning_rate": f"linear to {PEAK_LR} in the first 10% of the steps, then cosine to 0",
    "loss": f"cross-entropy, label smoothing {LABEL_SMOOTHING}",
    "augmentation": "random mirroring, shifts by up to 2 pixels",
}


CALIBRATION, SEEDS = 512, (0, 1, 2)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "softmax log2": {"activations.softmax": "log2"},
    "softmax log-sqrt2": {"activations.softmax": "log-sqrt2"},
    "gelu twin": {"activations.gelu": "twin"},
    "layer norms reparameterized": {"activations.layer_norm": "reparameterized"},
    "twin and reparameterized": {"activations.gelu": "twin", "activations.layer_norm": "reparameterized"},
}
TUNED = ("nearest", "qdrop-fast")
RECONSTRUCTED = ("nearest", "brecq-fast", "qdrop-fast")
Rows = dict[str, tuple[tuple[str, ...], dict[str, Any]]]
"""Presets and settings, by name."""
TESTED: Rows = {
    "min-max": (("nearest",), {"weights.range": "minmax", "activations.range": "minmax"}),
    "defaults": (RECONSTRUCTED, {}),
    "twin and reparameterized": (TUNED, OPTIONS["twin and reparameterized"]),
}


def network() -> nn.Module:
    """Return the network without its trained weights: timm's ViT-tiny at 28 x 28, 6 blocks of width 96, 3 heads."""
    built: nn.Module = timm.create_model(MODEL, pretrained=False, **SHAPE)
    return built.eval()


def trained(path: Path = WEIGHTS) -> nn.Module:
    """Return the trained network, float32 from the float16 weights in ``path``."""
    loaded = network()
    loaded.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return loaded


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """Train by AdamW."""
    model = network().train()
    decayed = [p for p in model.parameters() if p.ndim == 2 or p.ndim == 4]
    plain = [p for p in model.parameters() if p.ndim == 1 or p.ndim == 3]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    fit(model, optimizer, images, labels, epochs, clip=CLIP)
    return model.eval()


def train_and_write(options: argparse.Namespace) -> None:
    """Train, and write the weights in float16 and how they were made."""
    torch.manual_seed(options.seed)
    images, labels = read_set(options.data, "train")
    test, test_labels = read_set(options.data, "t10k")
    parts = split(len(images), options.seed)
    start = time.perf_counter()
    model = train(*tensors(images, labels, parts["training"]), epochs=options.epochs)
    seconds = time.perf_counter() - start
    options.weights.parent.mkdir(parents=True, exist_ok=True)
    options.weights.write_bytes(save({name: tensor.half() for name, tensor in model.state_dict().items()}))
    model = trained(options.weights)
    accuracy = {
        "validation": top1(model, *tensors(images, labels, parts["validation"])),
        "tuning": top1(model, *tensors(images, labels, parts["tuning"])),
        "test": top1(model, *tensors(test, test_labels, slice(None))),
    }
    print(", ".join(f"{name} top-1 {value:.2f} %" for name, value in accuracy.items()))
    record = {
        "script": "benchmarks/vision_transformer.py",
        "data": "Fashion-MNIST",
        "model": {"timm": MODEL, **SHAPE},
        "images": {name: len(index) for name, index in parts.items()},
        "recipe": RECIPE,
        "epochs": options.epochs,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "top1": accuracy,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
    }
    options.weights.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def drawn(images: np.ndarray, training: np.ndarray, seed: int) -> Tensor:
    """Return the normalized calibration images of ``seed``."""
    index = np.random.default_rng(seed).choice(training, CALIBRATION, replace=False)
    return normalize(torch.from_numpy(images[index]))


def measure(
    presets: tuple[str, ...], settings: dict[str, Any], seed: int, calibration: Tensor, images: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Quantize with each preset from one calibrated start, and return a row each."""
    recipes = [Recipe.preset(preset, seed=seed, **settings) for preset in presets]
    prepared = prepare(trained(), calibration, recipes[0], evaluate=[(normalize(images), labels)])
    rows = []
    for recipe in recipes:
        (done,), _ = run(prepared, recipe)
        row = {"preset": recipe.name, "seed": seed, "top1": done.top1, "sqnr_db": done.sqnr_db, "seconds": done.seconds}
        rows.append(row)
        print(settings, row, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds."""
    top1, sqnr = ([row[key] for row in rows] for key in ("top1", "sqnr_db"))
    return {"top1": float(np.mean(top1)), "top1_std": float(np.std(top1, ddof=1)), "sqnr_db": float(np.mean(sqnr))}


def by_preset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    presets = dict.fromkeys(row["preset"] for row in rows)
    return {
        preset: {**summary(own), "seeds": own}
        for preset in presets
        for own in [[r for r in rows if r["preset"] == preset]]
    }


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each option by itself on the tuning images."""
    images, labels = read_set(options.data, "train")
    tuning = tensors(images, labels, split(len(images), 0)["tuning"])
    rows: Rows = {name: (TUNED, OPTIONS[name]) for name in options.rows or OPTIONS}
    return measure_all(rows, SEEDS[: options.seeds], images, tuning)


def test(options: argparse.Namespace) -> dict[str, Any]:
    """Measure nearest rounding and reconstruction on the test images."""
    images, _ = read_set(options.data, "train")
    rows = {name: TESTED[name] for name in options.rows or TESTED}
    return measure_all(rows, SEEDS, images, tensors(*read_set(options.data, "t10k"), slice(None)))


def measure_all(
    rows: Rows,
    seeds: tuple[int, ...],
    images: np.ndarray,
    evaluation: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Measure the presets and settings of each row with calibration images of each seed, drawn from ``images``."""
    training = split(len(images), 0)["training"]
    calibrations = {seed: drawn(images, training, seed) for seed in seeds}
    found: dict[str, Any] = {"float": {"top1": top1(trained(), *evaluation)}}
    for name, (presets, settings) in rows.items():
        done = [r for seed, x in calibrations.items() for r in measure(presets, settings, seed, x, *evaluation)]
        found[name] = {"settings": settings, **by_preset(done)}
    return found


def write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Put the rows of one part into the file of all."""
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    about = {"versions": versions(), "hardware": hardware(torch.device("cpu")), "calibration_images": CALIBRATION}
    known[options.part] = known.get(options.part, {}) | about | found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(known, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and quantize a small vision transformer.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train", help="train the float network")
    training.add_argument("--epochs", type=int, default=24)
    training.add_argument("--seed", type=int, default=0)
    tuning = parts.add_parser("tune", help="measure each option on the tuning images")
    tuning.add_argument("--rows", nargs="+", choices=list(OPTIONS), help="only these")
    tuning.add_argument("--seeds", type=int, default=2)
    testing = parts.add_parser("test", help="measure on the test images")
    testing.add_argument("--rows", nargs="+", choices=list(TESTED), help="only these")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.part == "train":
        train_and_write(options)
    else:
        write(options, tune(options) if options.part == "tune" else test(options))


if __name__ == "__main__":
    main()
