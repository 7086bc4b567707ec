"""Run QDrop's own code on the networks of Emoji-1000, and keep what it reaches beside ours.

    git clone https://github.com/wimh966/QDrop && pip install easydict pyyaml scipy
    cd benchmarks; python -m references.qdrop QDROP [--network NAME] [--bits W/A] [--seed N] [--drop-prob P] [--lam L]
    cd benchmarks; python -m references.qdrop QDROP --race --steps 20

Nothing of it is in this repository: QDROP is a clone of it. Its networks get our weights, its loop our images, steps
and learning rates (its own are of 20,000 steps), and tensors that it sends to a GPU stay where they are. The ranges
that it searches for, which takes most of the time of a short run, are kept beside the clone for further runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emoji1000.networks import trained
from quiesce import Recipe
from quiesce.memory import Memory
from quiesce.pipeline import job_of
from quiesce.preparation import prepare
from quiesce.quant.fake_quantize import restore
from quiesce.reconstruct.loop import _Walk
from references import common
from speed import time_steps

PARTS = ("scale", "zero_point")


def settings(options: argparse.Namespace, observer: str = "MSEObserver") -> common.Settings:
    """Return what QDrop's published files for W2A4 set, with the rates of few steps."""
    weight_bits, activation_bits = common.bits_of(options)
    both = {"observer": observer, "symmetric": False}
    own = {"iters": options.steps, "batch_size": common.BATCH, "drop_prob": 1 - options.drop_prob}
    return common.Settings(
        w_qconfig=common.Settings(both | {"quantizer": "AdaRoundFakeQuantize", "bit": weight_bits, "ch_axis": 0}),
        a_qconfig=common.Settings(both | {"quantizer": "LSQFakeQuantize", "bit": activation_bits, "ch_axis": -1}),
        recon=common.Settings(common.reconstruction(options) | own),
    )


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


def reconstructed(main: Any, network: nn.Module, images: Tensor, recon: common.Settings) -> dict[str, float]:
    """Reconstruct block by block as QDrop's main program does; return the seconds of the loops and of the caches."""
    loop: Any = importlib.import_module("recon")
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


def quantized(main: Any, options: argparse.Namespace, images: Tensor, chosen: common.Settings) -> nn.Module:
    """Return QDrop's network, quantized by its main program."""
    theirs = importlib.import_module(f"qdrop.model.{common.FILES[options.network]}")
    network = common.with_our_weights(theirs, options.network, images)
    main.search_fold_and_remove_bn(network)
    made: nn.Module = main.quantize_model(network, chosen).eval()
    return made


def run(main: Any, images: Tensor, options: argparse.Namespace) -> None:
    """Quantize and measure one network."""
    chosen = settings(options)
    network = quantized(main, options, images, chosen)
    torch.manual_seed(options.seed)
    weight_bits, activation_bits = common.bits_of(options)
    kinds = {
        "act_fake_quant": (common.CALIBRATED, f"{options.network}-A{activation_bits}-seed{options.seed}.safetensors"),
        "weight_fake_quant": (2, f"{options.network}-W{weight_bits}.safetensors"),
    }
    kept = {kind: (count, options.clone / f"ranges-{name}") for kind, (count, name) in kinds.items()}
    with common.on_this_device(common.faster(common.ROUNDING_LR, options.steps)):
        with torch.no_grad():
            seconds = calibrated(main, network, images, kept)
        seconds |= reconstructed(main, network, images, chosen.recon)
        main.enable_quantization(network)
    common.keep("QDrop", network, options, seconds)


def race(main: Any, images: Tensor, options: argparse.Namespace) -> None:
    """Time the steps of QDrop's loop and of the baseline of ``speed.py``, in turn, and print both."""
    chosen = settings(options, observer="MinMaxObserver")
    for _ in range(2):
        network = quantized(main, options, images, chosen)
        with common.on_this_device(common.ROUNDING_LR):
            with torch.no_grad():
                for kind in ("act_fake_quant", "weight_fake_quant"):
                    main.enable_calibration_woquantization(network, quantizer_type=kind)
                    network(images[: common.BATCH])
            theirs = reconstructed(main, network, images, chosen.recon)["steps"]
        ours = baseline_seconds(trained(options.network), images, options)
        print(f"QDrop's loop {theirs:.1f} s, the baseline {ours:.1f} s, ratio {ours / theirs:.2f}", flush=True)


def baseline_seconds(network: nn.Module, images: Tensor, options: argparse.Namespace) -> float:
    """Return the seconds of the baseline's steps for all blocks of ``network``."""
    weight_bits, activation_bits = common.bits_of(options)
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    ranges = {"weight_range": "minmax", "activation_range": "minmax"}
    drop = {"drop_prob": options.drop_prob, "regularizer_weight": options.lam}
    recipe = Recipe.preset("qdrop-fast", **bits, **ranges, **drop, steps=options.steps)
    prepared = prepare(network, images, recipe)
    walk, seconds = _Walk(job_of(prepared, recipe, Memory())), 0.0
    for unit in prepared.modules:
        seconds += sum(time_steps("baseline", walk._problem(unit), recipe, options.lam))
        restore(prepared.graph, prepared.initial)
        walk.advance(unit.stop)
    return seconds


def main() -> None:
    options_of = common.parser("QDrop")
    options_of.add_argument("--drop-prob", type=float, default=0.5, help="0 is what is called BRECQ here")
    options_of.add_argument("--race", action="store_true", help="only time its steps and those of speed.py's baseline")
    options = options_of.parse_args()
    images = common.start(options, "qdrop/solver", ".")
    main = importlib.import_module("main_imagenet")
    logging.disable(logging.CRITICAL)
    if options.race:
        race(main, images[: common.CALIBRATED], options)
    else:
        run(main, images, options)


if __name__ == "__main__":
    main()
