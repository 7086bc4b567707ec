"""Module capacity (ModCap), without data."""

from __future__ import annotations

from torch import fx

from quiesce.graph.ops import hyperparameters, weight_node
from quiesce.graph.place import weight_layers, weight_quantizer
from quiesce.graph.unit import Unit


def modcap(gm: fx.GraphModule, units: list[Unit], alpha: float) -> list[float]:
    """Return CM_i = Σ_l params_l · bits_l · α_l of each module (arXiv 2303.11906, eq. 9), in bits.

    The sum runs over the module's weight layers; α_l is ``alpha`` where the stride is above 1, else 1. ``gm`` holds
    fake-quantizers, which know the bits. A layer left float counts with the bits of its floats, and with no parameters
    where its weight is computed from the input.
    """
    layers = weight_layers(gm)
    return [sum(_layer_capacity(gm, layers[name], alpha) for name in unit.layers) for unit in units]


def _layer_capacity(gm: fx.GraphModule, layer: fx.Node, alpha: float) -> float:
    weight = weight_node(layer)
    strided = any(s > 1 for s in hyperparameters(layer, weight.meta["val"].shape).stride)
    return _weight_bits(gm, layer, weight) * (alpha if strided else 1.0)


def _weight_bits(gm: fx.GraphModule, layer: fx.Node, weight: fx.Node) -> int:
    """Bits of the whole weight."""
    quantizer = weight_quantizer(gm, layer)
    if quantizer is not None:
        return quantizer.quantized.numel() * quantizer.spec.bits
    return 8 * getattr(gm, str(weight.target)).nbytes if weight.op == "get_attr" else 0
