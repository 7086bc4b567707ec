"""The operators of a network in ONNX, by torch.onnx; a marker stands for each fake-quantizer."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from quiesce.errors import ModelError
from quiesce.export.program import example_inputs, free_axes
from quiesce.graph.capture import interface_of
from quiesce.graph.rewrite import on_cpu, replace_quantizers
from quiesce.quant.fake_quantize import FakeQuantize, WeightFakeQuantize

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
"""That torch.onnx translates to; others are made from it."""
DOMAIN = "quiesce"
"""Of the markers, nodes ``FakeQuantize(x, quantizer=name)``."""


def translate(graph: fx.GraphModule) -> ir.Model:
    """Return the network in ONNX, with markers for fake-quantizers and a free batch size.

    Raises:
        ModelError: torch.onnx can't translate an operator.
    """
    interface = interface_of(graph)
    example = tuple(example_inputs(interface))
    free = tuple(free_axes(form) for form in interface.forms)
    count = len(next(n for n in graph.graph.nodes if n.op == "output").args[0])
    names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(replace_quantizers(on_cpu(graph), _marker), example, dynamic_shapes=free)
            translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, output_names=names)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"torch.onnx can't translate the network ({type(error).__name__}: {reason}); "
            "change what the message names, or export the network in another format."
        ) from error
    assert translated is not None
    _pool_means(translated.model.graph)
    return translated.model


class _Marker(nn.Module):
    """Stands for a fake-quantizer while torch.onnx translates the network: one node of a domain of our own."""

    weight: Tensor | None

    def __init__(self, name: str, weight: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor | None = None) -> Tensor:
        value = x if self.weight is None else self.weight
        assert value is not None
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::FakeQuantize",
            (value,),
            {"quantizer": self.name},
            dtype=value.dtype,
            shape=value.shape,
            version=1,
        )
        return marked


def _marker(name: str, quantizer: FakeQuantize) -> _Marker:
    return _Marker(name, quantizer.dequantized_weight() if isinstance(quantizer, WeightFakeQuantize) else None)


def _pool_means(graph: ir.Graph) -> None:
    """Write means over all positions of images as global average pools, which runtimes compute on integers."""
    import onnx_ir as ir

    for node in [n for n in graph if n.op_type == "ReduceMean" and len(n.inputs) == 2]:
        x, axes = node.inputs
        if x is None or x.shape is None or axes is None:
            continue
        tensor, rank = ir.convenience.get_const_tensor(axes), len(x.shape)
        if tensor is None or sorted(axis % rank for axis in tensor.numpy().tolist()) != list(range(2, rank)):
            continue
        keepdims = node.attributes.get("keepdims")
        new = [new_node("GlobalAveragePool", [x], f"{node.outputs[0].name}_pool")]
        if keepdims is not None and not keepdims.as_int():
            new.append(new_node("Squeeze", [new[0].outputs[0], axes], f"{node.outputs[0].name}_squeezed"))
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, node.outputs, new[-1].outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the translation from printing; what goes wrong is in its error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def new_node(operator: str, inputs: list[Any], output: str, attributes: dict[str, Any] | None = None) -> ir.Node:
    import onnx_ir as ir

    return ir.node(operator, inputs, attributes or {}, outputs=[ir.Value(name=output)], name=output)


def new_initializer(graph: ir.Graph, name: str, numbers: NDArray[Any]) -> ir.Value:
    """Add a constant; ml_dtypes has the numpy types of its 2- and 4-bit integers."""
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.Tensor(np.asarray(numbers), name=name))
    graph.register_initializer(value)
    return value
