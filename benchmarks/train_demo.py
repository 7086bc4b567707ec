"""Train the demo network on Fashion-MNIST and write the assets of ``quiesce.demo``.

    apt install dataset-fashion-mnist
    python benchmarks/train_demo.py [--data FOLDER] [--out FOLDER] [--tuning FILE] [--epochs N] [--seed N]

The 60,000 training images are split by seed: 2,000 for tuning (experiments with quantization), 3,000 for validation
(choices made in this script), the rest for training; the 1,024 calibration images are some of the last. The test set
serves for the numbers printed and written, and for nothing else. The same seed, threads and versions give the same
weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from quiesce.demo import DemoNet, normalize

DATA = Path("/usr/share/datasets/fashion-mnist")
OUT = Path(__file__).parents[1] / "src/quiesce/demo/data"
TUNING, VALIDATION, CALIBRATION, SHIPPED_TEST = 2_000, 3_000, 1_024, 2_000
BATCH, PEAK_LR, MOMENTUM, WEIGHT_DECAY, LABEL_SMOOTHING, WARM_UP, MAX_SHIFT = 128, 0.2, 0.9, 5e-4, 0.05, 0.1, 2
RECIPE = {
    "optimizer": f"SGD, Nesterov momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, batch {BATCH}",
    "learning_rate": f"linear to {PEAK_LR} in the first {WARM_UP:.0%} of the steps, then cosine to 0",
    "loss": f"cross-entropy, label smoothing {LABEL_SMOOTHING}",
    "augmentation": f"random mirroring, shifts by up to {MAX_SHIFT} pixels",
}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of bytes: 2 zero bytes, type 8, number of sizes, the sizes as big-endian 4-byte ints."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is not an idx file of bytes.")
    sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy()


def read_set(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, 28, 28] and labels [N] of set ``name`` ("train" or "t10k"), uint8."""
    images, labels = folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz"
    return read_idx(images), read_idx(labels)


def split(count: int, seed: int) -> dict[str, np.ndarray]:
    """Return disjoint index arrays "tuning", "validation", "training", and "calibration", a part of the training."""
    order = np.random.default_rng(seed).permutation(count)
    tuning, validation, training = np.split(order, [TUNING, TUNING + VALIDATION])
    return {"tuning": tuning, "validation": validation, "training": training, "calibration": training[:CALIBRATION]}


def augment(images: Tensor) -> Tensor:
    """Mirror and shift each of the images [N, 28, 28] at random, by up to ``MAX_SHIFT`` pixels."""
    count, height, width = images.shape
    padded = nn.functional.pad(images, [MAX_SHIFT] * 4)
    top, left = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1))
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns) + left
    rows = torch.arange(height) + top
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(images: Tensor, labels: Tensor, epochs: int) -> DemoNet:
    """Train by SGD with Nesterov momentum."""
    network = DemoNet().to(memory_format=torch.channels_last)
    fit(network, sgd(network, PEAK_LR, WEIGHT_DECAY), images, labels, epochs)
    return network.eval()


def sgd(network: nn.Module, peak_lr: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; norms and biases do not decay."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain}]
    return torch.optim.SGD(groups, lr=peak_lr, momentum=MOMENTUM, nesterov=True)


def fit(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    clip: float = math.inf,
) -> None:
    """Train on the augmented images with label smoothing; the rate follows :func:`rate_factor`.

    ``clip`` is the largest norm of all gradients together.
    """
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / steps))
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    for epoch in range(epochs):
        start, total = time.perf_counter(), torch.zeros(())
        batches = torch.randperm(len(images))[: steps // epochs * BATCH].view(-1, BATCH)
        for batch in batches:
            loss = criterion(network(normalize(augment(images[batch]))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if clip < math.inf:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(batches):.4f}, {seconds:.0f} s", flush=True)


def rate_factor(progress: float, warm_up: float = WARM_UP) -> float:
    """Return the learning rate over its peak at ``progress`` in [0, 1): linear warm-up, then cosine."""
    if progress < warm_up:
        return progress / warm_up
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def tensors(images: np.ndarray, labels: np.ndarray, index: np.ndarray | slice) -> tuple[Tensor, Tensor]:
    """Return images [N, 28, 28] uint8 and labels [N] int64 at ``index``."""
    return torch.from_numpy(images[index]), torch.from_numpy(labels[index]).long()


@torch.no_grad()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the per cent of ``images`` [N, 28, 28] that get their label."""
    logits = torch.cat([network(batch) for batch in normalize(images).split(500)])
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write ``record`` as training.json, with the checksums of the weights and images in ``out``."""
    names = ("network.safetensors", "images.npz")
    sums = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    (out / "training.json").write_text(json.dumps(record | {"sha256": sums}, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo network and write the demo's assets.")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the assets (default: the package's)")
    parser.add_argument("--tuning", type=Path, help="also write the tuning images and labels to this .npz file")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    images, labels = read_set(options.data, "train")
    test, test_labels = read_set(options.data, "t10k")
    parts = split(len(images), options.seed)

    start = time.perf_counter()
    trained = train(*tensors(images, labels, parts["training"]), epochs=options.epochs)
    seconds = time.perf_counter() - start
    network = DemoNet().eval()  # in the memory layout of the loaded one, so that both give the same bits
    network.load_state_dict(trained.state_dict())
    accuracy = {
        "validation": top1(network, *tensors(images, labels, parts["validation"])),
        "test": top1(network, *tensors(test, test_labels, slice(None))),
        "shipped_test": top1(network, *tensors(test, test_labels, slice(SHIPPED_TEST))),
    }
    print(", ".join(f"{name} top-1 {value:.2f} %" for name, value in accuracy.items()))

    record = {
        "script": "benchmarks/train_demo.py",
        "data": "Fashion-MNIST",
        "images": {name: len(index) for name, index in parts.items()},
        "recipe": RECIPE,
        "epochs": options.epochs,
        "seed": options.seed,
        "threads": options.threads,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "top1": accuracy,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "network.safetensors").write_bytes(save(network.state_dict()))
    np.savez_compressed(
        options.out / "images.npz",
        calibration=images[parts["calibration"]],
        test=test[:SHIPPED_TEST],
        labels=test_labels[:SHIPPED_TEST],
    )
    write_record(options.out, record)
    if options.tuning:
        np.savez_compressed(options.tuning, images=images[parts["tuning"]], labels=labels[parts["tuning"]])


if __name__ == "__main__":
    main()
