"""Train a small vision transformer on Fashion-MNIST, quantize it, and measure what each option of attention gives.

    apt install dataset-fashion-mnist
    pip install timm
    python benchmarks/vision_transformer.py train [--data FOLDER] [--epochs N] [--seed N]

The images are split as ``train_demo.py`` splits them: the tuning images serve for choices, the test set for final
numbers only. The weights are kept in float16, and it is those that every number is about.
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
from train_demo import DATA, augment, rate_factor, read_set, split, tensors, top1

from quiesce.demo import normalize

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights/vision_transformer.safetensors"
MODEL = "vit_tiny_patch16_224"
SHAPE = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 3}
BATCH, PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING, CLIP = 128, 1e-3, 0.05, 0.05, 1.0
RECIPE = {
    "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, batch {BATCH}, gradients clipped to norm {CLIP}",
    "learning_rate": f"linear to {PEAK_LR} in the first 10% of the steps, then cosine to 0",
    "loss": f"cross-entropy, label smoothing {LABEL_SMOOTHING}",
    "augmentation": "random mirroring, shifts by up to 2 pixels",
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
    """Train by AdamW with label smoothing; the rate follows :func:`train_demo.rate_factor`."""
    model = network().train()
    steps = epochs * (len(images) // BATCH)
    decayed = [p for p in model.parameters() if p.ndim == 2 or p.ndim == 4]
    plain = [p for p in model.parameters() if p.ndim == 1 or p.ndim == 3]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / steps))
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for epoch in range(epochs):
        start, total = time.perf_counter(), torch.zeros(())
        batches = torch.randperm(len(images))[: steps // epochs * BATCH].view(-1, BATCH)
        for batch in batches:
            loss = criterion(model(normalize(augment(images[batch]))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}, {seconds:.0f} s", flush=True)
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and quantize a small vision transformer.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files (default: %(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train", help="train the float network")
    training.add_argument("--epochs", type=int, default=24)
    training.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    train_and_write(options)


if __name__ == "__main__":
    main()
