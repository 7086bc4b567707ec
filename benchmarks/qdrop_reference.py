"""Run QDrop's own code on the networks of Emoji-1000, and keep what it reaches beside ours.

    git clone https://github.com/wimh966/QDrop && pip install easydict pyyaml scipy
    python benchmarks/qdrop_reference.py QDROP [--network NAME] [--bits W/A] [--seed N] [--drop-prob P] [--lam L]
    python benchmarks/qdrop_reference.py QDROP --race --steps 20

Nothing of it is in this repository: QDROP is a clone of it. Its networks get our weights, its loop our images, steps
and learning rates (its own are of 20,000 steps), and tensors that it sends to a GPU stay where they are. The ranges
that it searches for, which takes most of the time of a short run, are kept beside the clone for further runs.
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bench_rows import read_rows, write_rows
from emoji1000 import data
from emoji1000.networks import trained
from quiesce import Recipe
from quiesce.memory import Memory
from quiesce.pipeline import _job, prepare
from quiesce.quant.fake_quantize import restore
from quiesce.reconstruct.loop import _Walk
from quiesce.result import hardware
from speed import time_steps
from train_emoji import top1

RESULTS = Path(__file__).parent / "results" / "qdrop_reference.json"
PUBLISHED_STEPS, ROUNDING_LR, STEP_SIZE_LR = 20_000, 1e-3, 4e-5
IMAGES, CALIBRATED, BATCH = 1024, 256, 32
PARTS = ("scale", "zero_point")


class Settings(dict[str, Any]):
    """A mapping whose keys are attributes, as QDrop reads its settings."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def settings(bits: str, steps: int, drop_prob: float, lam: float, observer: str = "MSEObserver") -> Settings:
    """Return what QDrop's published files for W2A4 set, with the rates of ``steps`` steps."""
    weight_bits, activation_bits = map(int, bits.split("/"))
    common = {"observer": observer, "symmetric": False}
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
    try:
        yield
    finally:
        torch.Tensor.cuda, nn.Module.cuda = tensor, module  # type: ignore[method-assign]
        torch.optim.Adam = adam  # type: ignore[misc]


def calibrated(main: Any, network: nn.Module, images: Tensor, kinds: dict[str, tuple[int, Path]]) -> dict[str, float]:
    """Search the ranges as QDrop's main program does; return the seconds that each kind of quantizer took.

    ``kinds`` are the numbers of images, and the files where ranges are kept: they are read where they are there.
    """
    seconds = {}
    for kind, (count, kept) in kinds.items():
        quantizers = {
            name: m for name, m in network.named_modules() if isinstance(m, main.QuantizeBase) and kind in name
        }
        if not kept.exists():
            began = time.perf_counter()
            main.enable_calibration_woquantization(network, quantizer_type=kind)
            network(images[:count])
            state = {f"{name}.{part}": getattr(q, part).detach() for name, q in quantizers.items() for part in PARTS}
            save_file(state, kept, metadata={"seconds": str(time.perf_counter() - began)})
        with safe_open(kept, "pt") as file:
            seconds[kind] = float(file.metadata()["seconds"])
            for name, quantizer in quantizers.items():
                for part in PARTS:
                    getattr(quantizer, part).data = file.get_tensor(f"{name}.{part}")
    return seconds


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
    try:
        walk(network, float_network)
    finally:
        loop.save_inp_oup_data = save
    return seconds | {"steps": time.perf_counter() - began - seconds["caching"]}


def loaded(options: argparse.Namespace) -> Any:
    """Return QDrop's main program as a module."""
    sys.path[:0] = [str(options.qdrop / "qdrop" / "solver"), str(options.qdrop)]
    import main_imagenet

    logging.disable(logging.CRITICAL)
    return main_imagenet


def quantized(main: Any, options: argparse.Namespace, images: Tensor, chosen: Settings) -> nn.Module:
    """Return QDrop's network, quantized by its main program."""
    network = with_our_weights(options.network, images)
    main.search_fold_and_remove_bn(network)
    made: nn.Module = main.quantize_model(network, chosen).eval()
    return made


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and measure one network."""
    main, images = loaded(options), data.calibration(IMAGES, options.seed)
    chosen = settings(options.bits, options.steps, options.drop_prob, options.lam)
    network = quantized(main, options, images, chosen)
    torch.manual_seed(options.seed)
    weight_bits, _, activation_bits = options.bits.partition("/")
    kinds = {
        "act_fake_quant": (CALIBRATED, f"{options.network}-A{activation_bits}-seed{options.seed}.safetensors"),
        "weight_fake_quant": (2, f"{options.network}-W{weight_bits}.safetensors"),
    }
    kept = {kind: (count, options.qdrop / f"ranges-{name}") for kind, (count, name) in kinds.items()}
    with on_this_device(ROUNDING_LR * PUBLISHED_STEPS / options.steps):
        with torch.no_grad():
            seconds = calibrated(main, network, images, kept)
        seconds |= reconstructed(main, network, images, chosen.recon)
        main.enable_quantization(network)
        accuracy = top1(network, "test", data.TEST)
    asked = {key: getattr(options, key) for key in ("network", "bits", "seed", "drop_prob", "lam", "steps")}
    machine = {"hardware": hardware(torch.device("cpu")), "python": platform.python_version()}
    return asked | {"top1": accuracy, "seconds": seconds, "torch": torch.__version__} | machine


def race(options: argparse.Namespace) -> None:
    """Time the steps of QDrop's loop and of the baseline of ``speed.py``, in turn, and print both."""
    main, images = loaded(options), data.calibration(CALIBRATED, options.seed)
    chosen = settings(options.bits, options.steps, options.drop_prob, options.lam, observer="MinMaxObserver")
    for _ in range(2):
        network = quantized(main, options, images, chosen)
        with on_this_device(ROUNDING_LR):
            with torch.no_grad():
                for kind in ("act_fake_quant", "weight_fake_quant"):
                    main.enable_calibration_woquantization(network, quantizer_type=kind)
                    network(images[:BATCH])
            theirs = reconstructed(main, network, images, chosen.recon)["steps"]
        ours = baseline_seconds(trained(options.network), images, options)
        print(f"QDrop's loop {theirs:.1f} s, the baseline {ours:.1f} s, ratio {ours / theirs:.2f}", flush=True)


def baseline_seconds(network: nn.Module, images: Tensor, options: argparse.Namespace) -> float:
    """Return the seconds of the baseline's steps for all blocks of ``network``."""
    weight_bits, activation_bits = map(int, options.bits.split("/"))
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    ranges = {"weight_range": "minmax", "activation_range": "minmax"}
    drop = {"drop_prob": options.drop_prob, "regularizer_weight": options.lam}
    recipe = Recipe.preset("qdrop-fast", **bits, **ranges, **drop, steps=options.steps)
    prepared = prepare(network, images, recipe)
    walk, seconds = _Walk(_job(prepared, recipe, Memory())), 0.0
    for unit in prepared.modules:
        seconds += sum(time_steps("baseline", walk._problem(unit), recipe, options.lam))
        restore(prepared.graph, prepared.initial)
        walk.advance(unit.stop)
    return seconds


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
    parser.add_argument("--race", action="store_true", help="only time its steps and those of speed.py's baseline")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.race:
        race(options)
        return
    row = run(options)
    write_rows(RESULTS, [*read_rows(RESULTS), row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
