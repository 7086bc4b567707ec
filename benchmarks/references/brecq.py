"""Run BRECQ's own code on the networks of Emoji-1000.

    git clone https://github.com/yhhhli/BRECQ
    cd benchmarks; python -m references.brecq BRECQ [--network NAME] [--bits W/A] [--seed N] [--lam L] [--lr R]

Nothing of it is in this repository. It learns roundings with activations in float, and then step sizes of activations
in a quarter of the steps; the first layer keeps its rounding to nearest.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import torch
from torch import Tensor, nn

from references import common

INITIAL = 64
"""Images that the ranges are searched on."""


def reconstructed(quant: Any, network: nn.Module, **settings: Any) -> None:
    """Reconstruct block by block as BRECQ's main program does."""

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, quant.QuantModule):
                if not child.ignore_reconstruction:
                    quant.layer_reconstruction(network, child, **settings)
            elif isinstance(child, quant.BaseQuantBlock):
                if not child.ignore_reconstruction:
                    quant.block_reconstruction(network, child, **settings)
            else:
                walk(child)

    walk(network)


def quantize(
    quant: Any, network: nn.Module, images: Tensor, options: argparse.Namespace
) -> tuple[nn.Module, dict[str, float]]:
    """Return the quantized network and the seconds of each part, as BRECQ's main program goes."""
    weight_bits, activation_bits = common.bits_of(options)
    weights = {"n_bits": weight_bits, "channel_wise": True, "scale_method": "mse"}
    activations = {"n_bits": activation_bits, "channel_wise": False, "scale_method": "mse", "leaf_param": True}
    began = [time.perf_counter()]
    made = quant.QuantModel(model=network, weight_quant_params=weights, act_quant_params=activations).eval()
    made.set_first_last_layer_to_8bit()
    made.set_quant_state(True, False)
    made(images[:INITIAL])
    began.append(time.perf_counter())
    both = {"cali_data": images, "opt_mode": "mse"}
    regularizer = {"weight": options.lam, "b_range": (20, 2), "warmup": 0.2}
    reconstructed(quant, made, iters=options.steps, asym=True, act_quant=False, **regularizer, **both)
    began.append(time.perf_counter())
    made.set_quant_state(True, True)
    with torch.no_grad():
        made(images[:INITIAL])
    made.disable_network_output_quantization()
    reconstructed(quant, made, iters=options.steps // 4, act_quant=True, lr=options.lr, p=2.4, **both)
    made.set_quant_state(weight_quant=True, act_quant=True)
    ends = [*began[1:], time.perf_counter()]
    parts = ("weight ranges", "weights", "activations")
    return made.eval(), {part: end - start for part, start, end in zip(parts, began, ends, strict=True)}


def main() -> None:
    options_of = common.parser("BRECQ")
    options_of.add_argument("--lr", type=float, default=4e-3, help="of the step sizes of activations")
    options = options_of.parse_args()
    images = common.start(options, ".")
    theirs = importlib.import_module(f"models.{common.FILES[options.network]}")
    network = common.with_our_weights(theirs, options.network, images)
    with common.on_this_device(common.faster(common.ROUNDING_LR, options.steps)):
        made, seconds = quantize(importlib.import_module("quant"), network, images, options)
    common.keep("BRECQ", made, options, seconds)


if __name__ == "__main__":
    main()
