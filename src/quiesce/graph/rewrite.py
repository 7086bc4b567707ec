"""What graph passes share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn

from quiesce.quant.fake_quantize import FakeQuantize, WeightFakeQuantize, fake_quantizers

aten = torch.ops.aten
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def add_tensor(gm: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Register ``tensor`` as a buffer under a :func:`free_name`; returns that."""
    free = free_name(gm, name)
    gm.register_buffer(free, tensor)
    return free


def free_name(gm: fx.GraphModule, name: str) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, … if ``gm`` has an attribute of that name."""
    numbered = (f"{name}_{number}" for number in count(1))
    return next(n for n in chain([name], numbered) if not hasattr(gm, n))


def tidy(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and tensors nobody reads, check the graph, and compile it again; returns ``gm``."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n in gm._buffers if n not in used]:
        delattr(gm, name)
    return gm


def device_of(gm: fx.GraphModule) -> torch.device | None:
    """Return where the network's tensors are; None if it has none."""
    return next((b.device for b in gm.buffers()), None)


def follow_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """Let operators that name a device (``zeros``, …) name the one where the tensors are; returns ``gm``."""
    device = device_of(gm)

    def here(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for node in gm.graph.nodes if device is not None else ():
        if node.op == "call_function":
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), here)
    gm.recompile()
    return gm


def let_gradients_through(gm: fx.GraphModule) -> fx.GraphModule:
    """Let recurrent layers run as in training, without dropout, where their tensors are on a GPU; returns ``gm``.

    Results are the same, and cuDNN gives no gradients otherwise.
    """
    device = device_of(gm)
    recurrent = [n for n in gm.graph.nodes if n.target in RECURRENT]
    if recurrent and device is not None and device.type == "cuda":
        for node in recurrent:
            dropout, train = 5, 6  # places among the arguments
            node.args = (*node.args[:dropout], 0.0, True, *node.args[train + 1 :])
        gm.recompile()
    return gm


def on_cpu(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy on the CPU, tensors that its operators make included."""
    return follow_tensors(copy.deepcopy(gm).cpu())


def replace_quantizers(gm: fx.GraphModule, make: Callable[[str, FakeQuantize], nn.Module]) -> fx.GraphModule:
    """Put ``make(name, quantizer)`` in the place of each fake-quantizer, and return ``gm``.

    What stands for a weight is called without it: the float weights are dropped, which a loaded network lacks anyway.
    """
    quantizers = fake_quantizers(gm)
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(quantizers[node.target], WeightFakeQuantize):
            node.args = ()
    for name, quantizer in quantizers.items():
        setattr(gm, name, make(name, quantizer))
    return tidy(gm)
