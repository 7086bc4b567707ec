"""Integer biases: multiples of s_x · s_w, the scales of a layer's input and weight, as integer kernels add them.

Kernels take weights of 8 bits. One of fewer bits is stored for them as its integers times the power of two that 8 bits
leave room for, and its scale divided by it: the same values, and biases that are rounded as finely as those of 8 bits.

The float biases of a graph are kept, as its float weights are: a network with integer biases is a second one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quiesce.graph.ops import PASS_OPS, WEIGHT_OPS, argument, input_node, is_weight_op, origin, weight_node
from quiesce.graph.place import weight_quantizer
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from quiesce.quant.functional import round_bias
from quiesce.quant.ranges import next_power_of_two

LARGEST_BIAS = 2**30
"""Half of what 32 bits hold: the other half is for the products that are summed with it, and for step sizes that
learning makes smaller."""


def round_biases(gm: fx.GraphModule) -> fx.GraphModule:
    """Return ``gm`` with the bias of each layer rounded to a 32-bit multiple of s_x · s_w, as the scales are now.

    A layer with a float weight or input keeps its bias. Tensors other than biases, and fake-quantizers, are shared with
    ``gm``.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    rounded = fx.GraphModule(gm, graph)
    rounded.meta = dict(gm.meta)
    for layer in _biased_layers(rounded):
        setattr(rounded, layer.bias_name, round_bias(layer.bias, layer.step))
    return rounded


@torch.no_grad()
def make_room_for_biases(gm: fx.GraphModule) -> None:
    """Widen calibrated weight scales of ``gm`` where a bias would not fit into 32 bits, and round such weights again.

    That is where a channel's weights are almost nothing beside its bias. A channel of zeros has no scale of its own
    and is given the least one that its bias fits.
    """
    layers: dict[str, list[_BiasedLayer]] = {}
    for layer in _biased_layers(gm):
        layers.setdefault(layer.weight_name, []).append(layer)
    for name, users in layers.items():
        quantizer = users[0].weight
        least = torch.stack([_least_scale(user) for user in users]).amax(dim=0)
        if quantizer.spec.ch_axis is None:
            empty = (quantizer.quantized == 0).all()
        else:
            empty = (quantizer.quantized.movedim(quantizer.spec.ch_axis, 0).flatten(1) == 0).all(dim=1)
        least = next_power_of_two(least.clamp(min=torch.finfo(least.dtype).tiny))
        scale = torch.where(empty, least, torch.maximum(least, quantizer.scale))
        quantizer.set_parameters(scale, quantizer.zero_point.clone(), getattr(gm, name))


def _least_scale(layer: _BiasedLayer) -> Tensor:
    """The least scale of the weight with which the layer's bias fits, of the scale's shape."""
    quantizer = layer.weight
    unit = layer.input_scale / quantizer.spec.headroom * LARGEST_BIAS
    if quantizer.spec.ch_axis is None:
        return (layer.bias.abs().amax() / unit).expand_as(quantizer.scale)
    return layer.bias.view(-1, len(quantizer.scale)).abs().amax(dim=0) / unit


def input_quantizer(gm: fx.GraphModule, layer: fx.Node) -> ActivationFakeQuantize | None:
    """Return the quantizer on whose grid the input of the weight operator ``layer`` lies; None if it is float."""
    node = origin(input_node(layer), PASS_OPS)
    quantizer = getattr(gm, str(node.target)) if node.op == "call_module" else None
    return quantizer if isinstance(quantizer, ActivationFakeQuantize) else None


@dataclass(frozen=True)
class _BiasedLayer:
    """A layer with a bias that is no computed one, a quantized weight and a quantized input."""

    bias_name: str
    bias: Tensor
    """[output channels]"""
    input_scale: Tensor
    weight: WeightFakeQuantize
    weight_name: str

    @property
    def step(self) -> Tensor:
        """What biases are multiples of, [output channels] or []: a grouped transposed convolution's groups share it."""
        step = self.input_scale * (self.weight.scale / self.weight.spec.headroom)
        return step.repeat(len(self.bias) // len(step)) if step.ndim else step


def _biased_layers(gm: fx.GraphModule) -> Iterator[_BiasedLayer]:
    for node in gm.graph.nodes:
        if not is_weight_op(node):
            continue
        bias = argument(node, WEIGHT_OPS[node.target].bias, "bias", None)
        weight, source = weight_quantizer(gm, node), input_quantizer(gm, node)
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and weight is not None and source is not None:
            name, float_weight = str(bias.target), weight_node(node).all_input_nodes[0]
            yield _BiasedLayer(name, getattr(gm, name), source.scale, weight, str(float_weight.target))
