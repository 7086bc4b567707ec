"""Train the networks of Emoji-1000, all by one recipe, and keep their weights in float16.

    cd benchmarks && python -m emoji1000.art
    python benchmarks/train_emoji.py mobilenetv2_050 [--images N] [--threads N] [--seed N]

Every training image is seen once. Training begins on small and easy images and ends on those of the benchmark, which
takes a fraction of the time, in bfloat16 where the processor has it. Nothing is chosen by the test images; they give
the number that is written down.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from emoji1000.art import SIDE, load_art
from emoji1000.data import TEST, TUNING
from emoji1000.networks import NETWORKS, WEIGHTS, trained, weights_file
from emoji1000.render import BLOCK, STRENGTH, normalize, render, rendered
from quiesce.outputs import write_bytes, write_text
from quiesce.result import hardware
from train_demo import MOMENTUM, rate_factor, sgd

BATCH, WEIGHT_DECAY, WARM_UP = 125, 5e-5, 0.05


@dataclass(frozen=True)
class Stage:
    """A part of training, with a schedule of the learning rate of its own."""

    share: float
    """Of all training images."""
    peak_lr: float
    sides: tuple[tuple[float, int], ...]
    """Pixels of the images' sides, each until a share of the stage's images has been seen."""
    strength: tuple[float, float, float]
    """How hard the images are: from, to, and the share of the stage's images over which it rises."""

    def side(self, progress: float) -> int:
        return next(pixels for share, pixels in self.sides if progress < share)

    def strength_at(self, progress: float) -> float:
        first, last, over = self.strength
        return last if progress >= over else first + (last - first) * progress / over


STAGES = (
    Stage(10 / 11, 0.2, sides=((0.5, 32), (0.75, 48), (1.0, SIDE)), strength=(0.2, 1.0, 0.5)),
    Stage(1 / 11, 0.05, sides=((1.0, SIDE),), strength=(STRENGTH, STRENGTH, 0.0)),
)
CHECKPOINTS = Path(__file__).parents[1] / "runs" / "train_emoji"
LOG_EVERY = 200
"""Steps between two entries of the log."""
RECIPE = {
    "optimizer": f"SGD, Nesterov momentum {MOMENTUM}, weight decay {WEIGHT_DECAY} (not of norms and biases)",
    "batch": BATCH,
    "learning_rate": f"in each stage linear to its peak in the first {WARM_UP:.0%} of the steps, then cosine to 0",
    "loss": "cross-entropy",
    "stages": [asdict(stage) for stage in STAGES],
    "precision": "bfloat16 autocast",
}


def batches(stage: Stage, first: int, blocks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of ``blocks`` blocks from number ``first`` on: [125, 3, side, side] float32, labels [125]."""
    art, side = load_art(), 0
    for index in range(blocks):
        if stage.side(index / blocks) != side:
            side = stage.side(index / blocks)
            bank = shrunk(art, side)
        images, labels = render(bank, "training", first + index, stage.strength_at(index / blocks))
        normalized = normalize(images).to(memory_format=torch.channels_last)
        yield from zip(normalized.split(BATCH), labels.split(BATCH), strict=True)


def shrunk(art: Tensor, side: int) -> Tensor:
    """Return the glyphs ``art`` [C, S, 4, 64, 64] with ``side`` x ``side`` pixels, averaged."""
    if side == SIDE:
        return art
    small = interpolate(art.flatten(0, 1).float(), size=(side, side), mode="area")
    shaped: Tensor = small.round().to(torch.uint8).unflatten(0, art.shape[:2])
    return shaped


def train(network: nn.Module, stage: Stage, first: int, blocks: int) -> list[dict[str, float]]:
    """Train ``network`` in ``stage``, on ``blocks`` blocks of images from number ``first`` on; return the log."""
    optimizer = sgd(network, stage.peak_lr, WEIGHT_DECAY)
    steps = blocks * (BLOCK // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step / steps, WARM_UP))
    start, log, total, right = time.perf_counter(), [], 0.0, 0.0
    for step, (images, labels) in enumerate(batches(stage, first, blocks), 1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images).float()
        loss = cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
        right += (logits.argmax(1) == labels).float().mean().item()
        if step % LOG_EVERY == 0 or step == steps:
            span = (step - 1) % LOG_EVERY + 1
            seconds = time.perf_counter() - start
            log.append({"images": step * BATCH, "loss": total / span, "top1": 100 * right / span, "seconds": seconds})
            total = right = 0.0
            print(shown(log[-1], seconds * (steps - step) / step), flush=True)
    return log


def shown(entry: dict[str, float], left: float) -> str:
    return (
        f"{entry['images']:>9,.0f} images: loss {entry['loss']:.3f}, top-1 {entry['top1']:.1f} %, "
        f"{entry['seconds']:.0f} s, {left / 60:.0f} min left at this speed"
    )


@contextmanager
def subsampled(network: nn.Module) -> Iterator[None]:
    """Within the block, strided grouped convolutions have a stride of 1, and drop what the stride would have.

    The numbers are the same. On CPUs the gradient of such a convolution to its input takes 40 times as long in bfloat16
    with the stride.
    """
    strided = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.stride == (2, 2)]
    hooks = [module.register_forward_hook(lambda _, __, out: out[:, :, ::2, ::2]) for module in strided]
    for module in strided:
        module.stride = (1, 1)
    yield
    for module, hook in zip(strided, hooks, strict=True):
        module.stride = (2, 2)
        hook.remove()


def train_stages(name: str, images: int, first_stage: int) -> list[list[dict[str, float]]]:
    """Train network ``name``, keep its state behind each stage and its weights behind the last one; return the logs."""
    network = NETWORKS[name]()
    log, done = [], 0
    for number, stage in enumerate(STAGES, 1):
        blocks = round(stage.share * images / BLOCK)
        state, logged = CHECKPOINTS / f"{name}-{number}.safetensors", CHECKPOINTS / f"{name}-{number}.json"
        if number < first_stage:
            network.load_state_dict(load_file(state))
            log.append(json.loads(logged.read_text(encoding="utf-8")))
        else:
            network = network.train().to(memory_format=torch.channels_last)
            with subsampled(network):
                log.append(train(network, stage, done, blocks))
            CHECKPOINTS.mkdir(parents=True, exist_ok=True)
            write_bytes(state, save({key: t.contiguous() for key, t in network.state_dict().items()}))
            write_text(logged, json.dumps(log[-1]))
        done += blocks
    WEIGHTS.mkdir(exist_ok=True)
    write_bytes(weights_file(name), save(half(network.state_dict())))
    return log


@torch.no_grad()
def top1(network: nn.Module, part: str, count: int) -> float:
    """Return the per cent of the first ``count`` images of ``part`` that get their label."""
    images, labels = rendered(load_art(), part, count)
    logits = torch.cat([network(normalize(batch)) for batch in images.split(BLOCK)])
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in float16, batch-norm statistics as they are."""
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {name: (t if name.endswith(kept) else t.half()).contiguous() for name, t in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a network of Emoji-1000.")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--images", type=int, default=1_100_000, help="training images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--first-stage", type=int, default=1, metavar="N", help="go on behind stage N - 1")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    log = train_stages(options.network, options.images, options.first_stage)
    final = trained(options.network)
    accuracy = {"tuning": top1(final, "tuning", TUNING), "test": top1(final, "test", TEST)}
    print(", ".join(f"{name} top-1 {value:.2f} %" for name, value in accuracy.items()))
    record = {
        "script": "benchmarks/train_emoji.py",
        "data": "Emoji-1000",
        "network": options.network,
        "recipe": RECIPE,
        "images": options.images,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in final.parameters()),
        "top1": accuracy,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "hardware": hardware(torch.device("cpu")),
        "threads": options.threads,
        "log": log,
    }
    write_text(weights_file(options.network).with_suffix(".json"), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
