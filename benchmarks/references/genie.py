"""Run Genie's own code (its quantizer GENIE-M, on real images) on the networks of Emoji-1000.

    git clone https://github.com/SamsungLabs/Genie
    cd benchmarks; python -m references.genie GENIE [--network NAME] [--bits W/A] [--seed N] [--lam L]

Nothing of it is in this repository. The input of the second layer gets the bits of the others, which its comments call
the setting of QDrop. It draws ranges of activations from the first 32 images.
"""

from __future__ import annotations

import importlib
import logging
import time

from torch import nn

from references import common

WEIGHT_STEP_SIZE_LR = 1e-4
UNITS = ("BasicBlock", "InvertedResidual", "Linear", "Conv2d")


def main() -> None:
    options_of = common.parser("Genie")
    options_of.add_argument("--weight-lr", type=float, default=WEIGHT_STEP_SIZE_LR, help="of the step sizes of weights")
    options = options_of.parse_args()
    images = common.start(options, ".")
    logging.disable(logging.CRITICAL)
    genie = importlib.import_module("reconstruct")
    theirs = importlib.import_module(f"models.{common.FILES[options.network]}")
    network = common.with_our_weights(theirs, options.network, images)
    weight_bits, activation_bits = common.bits_of(options)
    began = time.perf_counter()
    quantized = genie.quantize_model(network, weight_bits, activation_bits, (nn.Conv2d, nn.Linear, nn.Identity))
    layers = [module for module in quantized.modules() if isinstance(module, genie.QuantizableLayer)]
    layers[1].activation_quantizer.n_bits = activation_bits
    ranges = time.perf_counter() - began
    rates = {"lr_bit": common.ROUNDING_LR, "lr_a_scale": common.STEP_SIZE_LR}
    settings = {name: common.faster(rate, options.steps) for name, rate in rates.items()}
    settings |= {"lr_w_scale": options.weight_lr, "round_weight": options.lam}
    settings |= {"iterations": options.steps, "batch_size": common.BATCH}
    began = time.perf_counter()
    genie.reconstruct(network, quantized, images, UNITS, **settings)
    common.keep("Genie", quantized, options, {"weight ranges": ranges, "steps": time.perf_counter() - began})


if __name__ == "__main__":
    main()
