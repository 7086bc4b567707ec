"""Run the code of the paper's authors (MRECG) on MobileNetV2 ×0.5 of Emoji-1000, by its own list of merges.

    git clone https://github.com/bytedance/MRECG && git clone https://github.com/ModelTC/MQBench
    pip install torch==2.5.1 torchvision==0.20.1 timm easydict prettytable onnx onnxsim onnxruntime typer rich
    cd benchmarks; PYTHONPATH=MQBENCH:../src python -m references.mrecg MRECG [--seed N] [--drop-prob P] [--lam L]

Nothing of it is in this repository. It stands on MQBench, which torch 2.5 is the last one for, so it needs an
environment of its own. It steps through whole batches, which are the same in each epoch: 32 of 32 images here. The
ranges that it searches for are kept beside the clone for further runs.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from references import common

SCHEME = "[1, 2, (3, 3), 4, (5, 5), 6, (7, 7, 7), (8, 8, 8), 9, (10, 10), 11]"
"""How its published settings for MobileNetV2 at W2A4 merge modules."""


def prepared(network: nn.Module, bits: tuple[int, int]) -> nn.Module:
    """Return the network with the quantizers of its published settings."""
    prepare = importlib.import_module("mqbench.prepare_by_platform")
    both = {"symmetry": False, "pot_scale": False, "p": 2.4}
    weights = both | {"bit": bits[0], "per_channel": True}
    activations = both | {"bit": bits[1], "per_channel": False}
    quantizers = {"w_fakequantize": "AdaRoundFakeQuantize", "a_fakequantize": "QDropFakeQuantize"}
    observers = {"w_observer": "MSEObserver", "a_observer": "EMAMSEObserver"}
    asked = quantizers | observers | {"w_qscheme": weights, "a_qscheme": activations}
    made: nn.Module = prepare.prepare_by_platform(network, prepare.BackendType.Academic, {"extra_qconfig_dict": asked})
    return made.eval()


def calibrate(network: nn.Module, batches: list[Tensor], kept: Path) -> float:
    """Search the ranges as its main program does, or read them from ``kept``; return the seconds that it took."""
    if not kept.exists():
        state = importlib.import_module("mqbench.utils.state")
        began = time.perf_counter()
        state.enable_calibration_woquantization(network, quantizer_type="act_fake_quant")
        for batch in batches:
            network(batch)
        state.enable_calibration_woquantization(network, quantizer_type="weight_fake_quant")
        network(batches[0])
        found = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(found, kept, metadata={"seconds": str(time.perf_counter() - began)})
    network.load_state_dict(load_file(kept))
    with safe_open(kept, "pt") as file:
        return float(file.metadata()["seconds"])


def main() -> None:
    options_of = common.parser("MRECG", ["mobilenetv2_050"])
    options_of.add_argument("--drop-prob", type=float, default=0.5, help="0 is BRECQ")
    options = options_of.parse_args()
    images = common.start(options, ".")
    network = common.with_our_weights(importlib.import_module("models.mobilenet_v2"), options.network, images)
    code: Any = importlib.import_module("MRECG")
    made = prepared(network, common.bits_of(options))
    kept = options.clone / f"ranges-{options.network}-{options.bits.replace('/', '-')}-seed{options.seed}.safetensors"
    with torch.no_grad():
        seconds = {"ranges": calibrate(made, list(images[: common.CALIBRATED].split(common.BATCH)), kept)}
    began = time.perf_counter()
    with common.on_this_device(common.faster(common.ROUNDING_LR, options.steps)):
        made = code.ptq_reconstruction(made, list(images.split(common.BATCH)), settings(options))
    seconds["steps"] = time.perf_counter() - began
    importlib.import_module("mqbench.utils.state").enable_quantization(made)
    common.keep("MRECG", made, options, seconds)


def settings(options: argparse.Namespace) -> common.Settings:
    """Return its published settings for MobileNetV2, with the rates of few steps."""
    own = {"max_count": options.steps, "prob": 1 - options.drop_prob, "pattern": "block", "scheme": SCHEME}
    return common.Settings(common.reconstruction(options) | own)


if __name__ == "__main__":
    main()
