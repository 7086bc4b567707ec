"""What a compiled kernel takes over from the graph: clipping (ReLU, ReLU6, …) in front of a fake-quantizer."""

from __future__ import annotations

import math

import torch
from torch import fx

from quiesce.graph.ops import argument
from quiesce.quant.fake_quantize import ActivationFakeQuantize

aten = torch.ops.aten
Clip = tuple[float, float]


def without_clips(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Clip]]:
    """Return a copy in which quantizers read what goes into their clipping, and the clipping by quantizer's name.

    A quantizer that occurs at several places, and one whose grid has no kernel, keeps the operator in front of it.
    Tensors and quantizers are shared with ``module``, and so is its result if the quantizers clip.
    """
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, {}, return_output_node=False)
    graph.output(result)
    copy = fx.GraphModule(module, graph)
    called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    clips: dict[str, Clip] = {}
    for node in list(graph.nodes):
        quantizer = getattr(copy, str(node.target)) if node.op == "call_module" else None
        if not isinstance(quantizer, ActivationFakeQuantize) or not quantizer.has_kernel:
            continue
        operator = node.args[0]
        clip = _clip(operator)
        if clip is not None and called.count(str(node.target)) == 1:
            clips[str(node.target)] = clip
            node.args = (operator.args[0],)
            if not operator.users:
                graph.erase_node(operator)
    copy.recompile()
    return copy, clips


def _clip(node: fx.Node) -> Clip | None:
    """The range that an operator clips its input to, or None for an operator that does something else."""
    if node.op != "call_function":
        return None
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target is aten.hardtanh.default:
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return None
