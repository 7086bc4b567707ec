"""What the published codes are given here: their networks with our weights, our images, and rates for few steps."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench_rows import read_rows, write_rows
from emoji1000 import data
from emoji1000.networks import trained
from quiesce.result import hardware
from train_emoji import top1

RESULTS = Path(__file__).parents[1] / "results" / "reference_codes.json"
PUBLISHED_STEPS, ROUNDING_LR, STEP_SIZE_LR = 20_000, 1e-3, 4e-5
IMAGES, BATCH = 1024, 32
CALIBRATED = 256
"""How many of the images the ranges of activations are searched on, where a code does so before it reconstructs."""


class Settings(dict[str, Any]):
    """A mapping whose keys are attributes, as these codes read their settings."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def mobilenetv2(theirs: Any, ours: nn.Module) -> nn.Module:
    """Return the MobileNetV2 of the module ``theirs`` in the shape of ours."""
    network: nn.Module = theirs.MobileNetV2()
    first, *blocks, last = map(convolutions_of, ours.get_submodule("features").children())
    features = [theirs.conv_bn(3, first[0].out_channels, 2)]
    for convolutions in blocks:
        ends = convolutions[0].in_channels, convolutions[-1].out_channels
        expansion = 1 if len(convolutions) == 2 else round(convolutions[0].out_channels / ends[0])
        features.append(theirs.InvertedResidual(*ends, convolutions[-2].stride[0], expansion))
    network.features = nn.Sequential(*features, theirs.conv_1x1_bn(last[0].in_channels, last[0].out_channels))
    return network


def convolutions_of(part: nn.Module) -> list[nn.Conv2d]:
    return [module for module in part.modules() if isinstance(module, nn.Conv2d)]


def resnet18(theirs: Any, ours: nn.Module) -> nn.Module:
    """Return the ResNet-18 of the module ``theirs`` in the shape of ours."""
    network: nn.Module = theirs.resnet18()
    network.maxpool = nn.Sequential()
    return network


NETWORKS: dict[str, Callable[[Any, nn.Module], nn.Module]] = {"mobilenetv2_050": mobilenetv2, "resnet18": resnet18}
FILES = {"mobilenetv2_050": "mobilenetv2", "resnet18": "resnet"}
"""What the codes call the files of their networks."""


def with_our_weights(theirs: Any, name: str, images: Tensor) -> nn.Module:
    """Return the network of the module ``theirs`` with our weights, which go by their order; it must compute the
    same."""
    ours = trained(name)
    network = NETWORKS[name](theirs, ours)
    state = zip(network.state_dict().items(), ours.state_dict().values(), strict=True)
    network.load_state_dict({key: value.reshape(own.shape) for (key, own), value in state})
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images[:64]), ours(images[:64]), rtol=1e-4, atol=1e-4)
    return network


@contextmanager
def on_this_device(rate: float) -> Iterator[None]:
    """Within the block what goes to a GPU stays, and Adam's own rate, which roundings are learned at, is ``rate``."""
    adam, to = torch.optim.Adam, torch.Tensor.to
    tensor, module = torch.Tensor.cuda, nn.Module.cuda
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.Tensor.to = lambda self, *a, **n: self if a == ("cuda",) else to(self, *a, **n)  # type: ignore
    torch.optim.Adam = lambda variables, lr=rate: adam(variables, lr=lr)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda, nn.Module.cuda, torch.Tensor.to = tensor, module, to  # type: ignore[method-assign]
        torch.optim.Adam = adam  # type: ignore[misc]


def faster(rate: float, steps: int) -> float:
    """Return the rate for ``steps`` steps that goes with ``rate`` for the published ones."""
    return rate * PUBLISHED_STEPS / steps


def parser(code: str, networks: Iterable[str] = NETWORKS) -> argparse.ArgumentParser:
    """Return the options that all codes have."""
    made = argparse.ArgumentParser(description=f"Run {code}'s own code on a network of Emoji-1000.")
    made.add_argument("clone", type=Path, help=f"a clone of {code}'s repository")
    made.add_argument("--network", choices=networks, default="mobilenetv2_050")
    made.add_argument("--bits", default="2/4")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lam", type=float, default=3.0, help="λ of the regularizer (default: %(default)s)")
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--tuning", action="store_true", help="print top-1 on the tuning images, and keep nothing")
    return made


def start(options: argparse.Namespace, *folders: str) -> Tensor:
    """Put the clone's ``folders`` on the path, and return the images to calibrate on."""
    sys.path[:0] = [str(options.clone / folder) for folder in folders]
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    np.random.seed(options.seed)
    return data.calibration(IMAGES, options.seed)


def bits_of(options: argparse.Namespace) -> tuple[int, int]:
    """Return the bits of weights and activations."""
    weight_bits, activation_bits = map(int, options.bits.split("/"))
    return weight_bits, activation_bits


def reconstruction(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of reconstruction that QDrop's and MRECG's published files share, with the rate of few
    steps."""
    rounding = {"round_mode": "learned_hard_sigmoid", "warm_up": 0.2, "b_range": [20, 2], "weight": options.lam}
    return rounding | {"scale_lr": faster(STEP_SIZE_LR, options.steps), "keep_gpu": True}


def keep(code: str, network: nn.Module, options: argparse.Namespace, seconds: dict[str, float]) -> None:
    """Measure the quantized network, print its row, and add it to the results."""
    left_out = ("clone", "threads", "tuning", "race")
    asked = {"code": code} | {key: value for key, value in vars(options).items() if key not in left_out}
    with torch.no_grad():
        accuracy = top1(network, "tuning", data.TUNING) if options.tuning else top1(network, "test", data.TEST)
    machine = {"hardware": hardware(torch.device("cpu")), "python": platform.python_version()}
    row = asked | {"top1": accuracy, "seconds": seconds, "torch": torch.__version__} | machine
    if not options.tuning:
        write_rows(RESULTS, [*read_rows(RESULTS), row])
    print(json.dumps(row))
