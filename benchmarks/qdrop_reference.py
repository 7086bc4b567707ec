"""Run QDrop's own code on the networks of Emoji-1000, and keep what it reaches beside ours.

    git clone https://github.com/wimh966/QDrop && pip install easydict pyyaml scipy
    python benchmarks/qdrop_reference.py QDROP [--network NAME] [--bits W/A] [--seed N] [--drop-prob P] [--lam L]

Nothing of it is in this repository: QDROP is a clone of it. Its networks get our weights, its loop our images, steps
and learning rates (its own are of 20,000 steps), and tensors that it sends to a GPU stay where they are. Its search for
ranges of weights, which takes most of the time of a short run, is kept beside the clone for further runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench_rows import read_rows, write_rows
from emoji1000 import data
from emoji1000.networks import trained
from quiesce.result import hardware

RESULTS = Path(__file__).parent / "results" / "qdrop_reference.json"
PUBLISHED_STEPS, ROUNDING_LR, STEP_SIZE_LR = 20_000, 1e-3, 4e-5
IMAGES, CALIBRATED, BATCH = 1024, 256, 32


class Settings(dict[str, Any]):
    """A mapping whose keys are attributes, as QDrop reads its settings."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def settings(bits: str, steps: int, drop_prob: float, lam: float) -> Settings:
    """Return what QDrop's published files for W2A4 set, with the rates of ``steps`` steps."""
    weight_bits, activation_bits = map(int, bits.split("/"))
    common = {"observer": "MSEObserver", "symmetric": False}
    rounding = {"round_mode": "learned_hard_sigmoid", "warm_up": 0.2, "b_range": [20, 2], "weight": lam}
    return Settings(
        w_qconfig=Settings(common | {"quantizer": "AdaRoundFakeQuantize", "bit": weight_bits, "ch_axis": 0}),
        a_qconfig=Settings(common | {"quantizer": "LSQFakeQuantize", "bit": activation_bits, "ch_axis": -1}),
        recon=Settings(
            rounding
            | {"iters": steps, "batch_size": BATCH, "keep_gpu": True, "drop_prob": 1 - drop_prob}
            | {"scale_lr": STEP_SIZE_LR * PUBLISHED_STEPS / steps}
        ),
    )


def mobilenetv2(ours: nn.Module) -> nn.Module:
    """Return QDrop's MobileNetV2 in the shape of ours."""
    from qdrop.model.mobilenetv2 import InvertedResidual, MobileNetV2, conv_1x1_bn, conv_bn

    network: nn.Module = MobileNetV2(num_classes=1000)
    first, *blocks, last = map(convolutions_of, ours.get_submodule("features").children())
    features = [conv_bn(3, first[0].out_channels, 2)]
    for convolutions in blocks:
        ends = convolutions[0].in_channels, convolutions[-1].out_channels
        expansion = 1 if len(convolutions) == 2 else round(convolutions[0].out_channels / ends[0])
        features.append(InvertedResidual(*ends, convolutions[-2].stride[0], expansion))
    network.features = nn.Sequential(*features, conv_1x1_bn(last[0].in_channels, last[0].out_channels))
    return network


def convolutions_of(part: nn.Module) -> list[nn.Conv2d]:
    return [module for module in part.modules() if isinstance(module, nn.Conv2d)]


def resnet18(ours: nn.Module) -> nn.Module:
    """Return QDrop's ResNet-18 in the shape of ours."""
    from qdrop.model.resnet import resnet18

    network: nn.Module = resnet18(num_classes=1000)
    network.maxpool = nn.Identity()
    return network


NETWORKS: dict[str, Callable[[nn.Module], nn.Module]] = {"mobilenetv2_050": mobilenetv2, "resnet18": resnet18}


def with_our_weights(name: str, images: Tensor) -> nn.Module:
    """Return QDrop's network with our weights, which go by their order; it must compute the same."""
    ours = trained(name)
    network = NETWORKS[name](ours)
    state = zip(network.state_dict().items(), ours.state_dict().values(), strict=True)
    network.load_state_dict({key: value.reshape(own.shape) for (key, own), value in state})
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images[:64]), ours(images[:64]), rtol=1e-4, atol=1e-4)
    return network


@contextmanager
def on_this_device(rate: float) -> Iterator[None]:
    """Within the block what goes to a GPU stays, and Adam's own rate, which QDrop takes for roundings, is ``rate``."""
    adam = torch.optim.Adam
    tensor, module = torch.Tensor.cuda, nn.Module.cuda
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.optim.Adam = lambda variables, lr=rate: adam(variables, lr=lr)  # type: ignore[misc, assignment]
    yield
    torch.Tensor.cuda, nn.Module.cuda = tensor, module  # type: ignore[method-assign]
    torch.optim.Adam = adam  # type: ignore[misc]


def calibrated(main: Any, network: nn.Module, images: Tensor, kept: Path) -> dict[str, float]:
    """Search the ranges as QDrop's main program does; return the seconds that activations and weights took."""
    began = time.perf_counter()
    main.enable_calibration_woquantization(network, quantizer_type="act_fake_quant")
    network(images[:CALIBRATED])
    activations = time.perf_counter() - began
    weights = {n: m for n, m in network.named_modules() if isinstance(m, main.QuantizeBase) and "weight" in n}
    seconds = {"activation_ranges": activations}
    if kept.exists():
        state = load_file(kept)
        for name, quantizer in weights.items():
            quantizer.scale, quantizer.zero_point = state[f"{name}.scale"], state[f"{name}.zero_point"]
        return seconds
    began = time.perf_counter()
    main.enable_calibration_woquantization(network, quantizer_type="weight_fake_quant")
    network(images[:2])
    parts = {f"{name}.{part}": getattr(q, part) for name, q in weights.items() for part in ("scale", "zero_point")}
    save_file(parts, kept)
    return seconds | {"weight_ranges": time.perf_counter() - began}


def reconstructed(main: Any, network: nn.Module, images: Tensor, recon: Settings) -> dict[str, float]:
    """Reconstruct block by block as QDrop's main program does; return the seconds of the loops and of the caches."""
    import recon as loop

    float_network = copy.deepcopy(network)
    main.disable_all(float_network)
    main.enable_quantization(network)
    seconds, save = {"caching": 0.0}, loop.save_inp_oup_data

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        cached = save(*arguments, **named)
        seconds["caching"] += time.perf_counter() - began
        return cached

    def walk(module: nn.Module, float_module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, main.QuantizedLayer | main.QuantizedBlock):
                loop.reconstruction(network, float_network, child, getattr(float_module, name), images, recon)
            else:
                walk(child, getattr(float_module, name))

    loop.save_inp_oup_data = timed
    began = time.perf_counter()
    walk(network, float_network)
    return seconds | {"steps": time.perf_counter() - began - seconds["caching"]}


@torch.no_grad()
def top1(network: nn.Module) -> float:
    """Return the per cent of the test images that get their label."""
    right = count = 0
    for images, labels in data.test():
        for part, own in zip(images.split(500), labels.split(500), strict=True):
            right += int((network(part).argmax(1) == own).sum())
            count += len(own)
    return 100 * right / count


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and measure one network."""
    sys.path[:0] = [str(options.qdrop / "qdrop" / "solver"), str(options.qdrop)]
    import main_imagenet as main

    logging.disable(logging.CRITICAL)
    images = data.calibration(IMAGES, options.seed)
    chosen = settings(options.bits, options.steps, options.drop_prob, options.lam)
    network = with_our_weights(options.network, images)
    torch.manual_seed(options.seed)
    main.search_fold_and_remove_bn(network)
    network = main.quantize_model(network, chosen).eval()
    kept = options.qdrop / f"ranges-{options.network}-{options.bits.partition('/')[0]}.safetensors"
    with on_this_device(ROUNDING_LR * PUBLISHED_STEPS / options.steps):
        with torch.no_grad():
            seconds = calibrated(main, network, images, kept)
        seconds |= reconstructed(main, network, images, chosen.recon)
        main.enable_quantization(network)
        accuracy = top1(network)
    asked = {key: getattr(options, key) for key in ("network", "bits", "seed", "drop_prob", "lam", "steps")}
    machine = {"hardware": hardware(torch.device("cpu")), "python": platform.python_version()}
    return asked | {"top1": accuracy, "seconds": seconds, "torch": torch.__version__} | machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Run QDrop's own code on a network of Emoji-1000.")
    parser.add_argument("qdrop", type=Path, help="a clone of QDrop's repository")
    parser.add_argument("--network", choices=NETWORKS, default="mobilenetv2_050")
    parser.add_argument("--bits", default="2/4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drop-prob", type=float, default=0.5, help="0 is what is called BRECQ here")
    parser.add_argument("--lam", type=float, default=3.0, help="λ of the regularizer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = run(options)
    write_rows(RESULTS, [*read_rows(RESULTS), row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
