"""ExecuTorch: the quantized network as a .pte file, on integers by XNNPACK where that is possible.

XNNPACK computes a convolution or linear layer on 8-bit integers when input, weight and output are quantized and the
weight's zero points are 0. Narrower grids are 8-bit ones with bounds: a weight is stored as multiples of
``q − zero_point``, which up to 7 bits always fit int8, and an activation is clipped to its grid's ends by the layer
that makes it. All other layers compute in float, with dequantized weights.
"""

# mypy: disable-error-code="import-not-found, import-untyped"
from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from quiesce.errors import ModelError
from quiesce.export.export import Export, check_uniform, tensor_name
from quiesce.export.program import register_decomposed, trace
from quiesce.graph.capture import TensorForm, interface_of
from quiesce.graph.ops import WEIGHT_OPS, argument, aten, input_node, is_relu, upper_bound, weight_node
from quiesce.graph.rewrite import free_name, on_cpu, tidy
from quiesce.outputs import check_new, write_bytes
from quiesce.quant.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize, fake_quantizers

INTEGER_OPS = (aten.conv2d.default, aten.linear.default)
"""What XNNPACK computes on integers here."""
MOST_ERROR = 0.5
"""Relative error at which a file is refused: rounding moves single values to the next integer, and no more."""
_INT8 = (-128, 127, torch.int8)


@dataclass(frozen=True)
class ExecutorchExport(Export):
    """What was written."""

    relative_error: float = 0.0
    """‖y − ŷ‖ / ‖y‖ of the outputs against the simulation's, on one batch of random images."""
    integer_weights: tuple[str, ...] = ()
    """Weights that are stored as int8 and computed with on integers."""
    float_weights: tuple[str, ...] = ()
    """Weights that are stored in float32, as ExecuTorch has no integer kernel for how their layer is quantized."""


def export_executorch(graph: fx.GraphModule, path: Path, *, batch: int = 1, force: bool = False) -> ExecutorchExport:
    """Lower the network to XNNPACK, and what that lacks to portable kernels, and write it to ``path`` (.pte).

    The program takes the flat list of the network's input tensors and returns that of its outputs. It is run once in
    ExecuTorch's runtime, and compared with the simulation, before the file appears.

    Args:
        graph: a quantized network in float32 on any device; not changed.
        batch: the number of images that each run takes.
        force: replace a file that is there.

    Raises:
        ModelError: executorch is not installed, or can't lower or run the network; the network is not in float32, or
            has free dimensions besides the batch.
        OutputError: ``path`` is taken or can't be written.
    """
    check_new(path, force)
    _check_package()
    _check_network(graph)
    check_uniform(graph, "ExecuTorch programs")
    graph = on_cpu(graph)
    integer = _integer_weights(graph)
    network = _rewritten(graph, integer)
    content = _lowered(trace(network, interface_of(graph), batch))
    relative_error = _compared(content, graph, batch)
    write_bytes(path, content)
    weights = [n for n, q in fake_quantizers(graph).items() if isinstance(q, WeightFakeQuantize)]
    floats = tuple(tensor_name(n) for n in weights if n not in integer)
    return ExecutorchExport(
        path,
        f"ExecuTorch program for {batch} images",
        len(content),
        notes=(f"weights in float32, as there is no integer kernel for their layers: {', '.join(floats)}",)
        * bool(floats),
        relative_error=relative_error,
        integer_weights=tuple(tensor_name(n) for n in weights if n in integer),
        float_weights=floats,
    )


def _check_package() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError as error:
        raise ModelError(
            'executorch is not installed or does not fit this torch; install it with: pip install "quiesce[executorch]"'
        ) from error


def _check_network(graph: fx.GraphModule) -> None:
    for name, quantizer in fake_quantizers(graph).items():
        if quantizer.scale.dtype != torch.float32:
            raise ModelError(f"quantizer {name} has {quantizer.scale.dtype} scales; ExecuTorch takes float32 networks.")
    for index, form in enumerate(interface_of(graph).forms):
        if None in form.shape[1:]:
            raise ModelError(
                f"input {index} has free dimensions besides the batch; ExecuTorch plans memory ahead, so quantize the "
                "network with images of one size."
            )


@dataclass(frozen=True)
class _Integers:
    """A weight as int8 with zero points of 0 and one scale an output channel, which is axis 0 of INTEGER_OPS."""

    values: Tensor
    scale: Tensor


def _integer_weights(graph: fx.GraphModule) -> dict[str, _Integers]:
    """Return what is stored for the weights, by quantizer, whose layers XNNPACK computes on integers."""
    found = {}
    for node in graph.graph.nodes:
        if node.target in INTEGER_OPS and _is_quantized_by_reader(graph, node):
            weight, inputs = (_quantizer(graph, n) for n in (weight_node(node), input_node(node)))
            bias = argument(node, WEIGHT_OPS[node.target].bias, "bias", None)
            if (
                isinstance(weight, WeightFakeQuantize)
                and isinstance(inputs, ActivationFakeQuantize)
                and (bias is None or bias.op == "get_attr")
                and len(weight_node(node).users) == 1
            ):
                integers = _integers(weight, None if bias is None else getattr(graph, bias.target) / inputs.scale)
                if integers is not None:
                    found[str(weight_node(node).target)] = integers
    return found


def _integers(quantizer: WeightFakeQuantize, bias: Tensor | None) -> _Integers | None:
    """Return q − zero_point, times the largest power of two that int8 leaves room for; None if it does not fit.

    XNNPACK rounds the bias to a multiple of s_x · s_w. The factor makes s_w smaller: at few bits a multiple of the
    original one is a good part of an output's step. ``bias``, here divided by s_x, must still fit 32 bits.
    """
    q = quantizer.quantized_weight()
    centred = q.float() - quantizer.spec.broadcast(quantizer.zero_point, q.ndim)
    largest = torch.where(centred < 0, -1 - centred, centred).flatten(1).amax(1).clamp(min=1)
    if largest.max() > 127:
        return None
    scale = quantizer.scale.expand(len(largest))
    room = 127 / largest
    if bias is not None:
        room = torch.minimum(room, 2.0**30 * scale / bias.abs().clamp(min=torch.finfo(bias.dtype).tiny))
    factor = torch.exp2(room.log2().floor()).clamp(min=1)
    values = centred * factor.view(-1, *[1] * (q.ndim - 1))
    return _Integers(values.to(torch.int8), scale / factor)


def _is_quantized_by_reader(graph: fx.GraphModule, node: fx.Node) -> bool:
    """True if all that reads ``node``, perhaps through a ReLU, is one quantizer."""
    (reader, *others) = node.users
    if not others and is_relu(reader):
        (reader, *others) = reader.users
    return not others and isinstance(_quantizer(graph, reader), ActivationFakeQuantize)


def _quantizer(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


class _IntegerWeight(nn.Module):
    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: _Integers) -> None:
        super().__init__()
        self.register_buffer("values", integers.values)
        self.register_buffer("scale", integers.scale)
        self.register_buffer("zero_point", torch.zeros_like(integers.scale, dtype=torch.int64))

    def forward(self) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        weight: Tensor = dequantize(self.values, self.scale, self.zero_point, 0, *_INT8)
        return weight


class _FloatWeight(nn.Module):
    weight: Tensor

    def __init__(self, quantizer: WeightFakeQuantize) -> None:
        super().__init__()
        self.register_buffer("weight", quantizer.dequantized_weight())

    def forward(self) -> Tensor:
        return self.weight


class _Quantize(nn.Module):
    """To an int8 grid, with explicit bounds where the quantizer's is narrower.

    ``low`` and ``high`` are those of a ReLU in front: one pair of bounds XNNPACK can make part of the layer before.
    """

    def __init__(self, quantizer: ActivationFakeQuantize, low: float, high: float) -> None:
        super().__init__()
        spec, scale, zero_point = quantizer.spec, quantizer.scale.item(), int(quantizer.zero_point)
        self.grid = (scale, zero_point - spec.quant_min - (1 << (spec.bits - 1)), *_INT8)
        if spec.bits < 8:
            low = max(low, (spec.quant_min - zero_point) * scale)
            high = min(high, (spec.quant_max - zero_point) * scale)
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        if self.low == 0 and self.high == math.inf:
            x = F.relu(x)
        elif self.low > -math.inf:
            x = F.hardtanh(x, self.low, self.high)
        q: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *self.grid)
        return q


class _Dequantize(nn.Module):
    def __init__(self, grid: tuple[Any, ...]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, q: Tensor) -> Tensor:
        x: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor.default(q, *self.grid)
        return x


class _BatchNorm(nn.Module):
    """A batch-norm that was not folded, as a product and a sum: XNNPACK folds them by rules that do not always hold."""

    scale: Tensor
    shift: Tensor

    def __init__(self, weight: Any, bias: Any, mean: Any, variance: Any, eps: Any) -> None:
        super().__init__()
        scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", (0 if bias is None else bias) - mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


def _rewritten(graph: fx.GraphModule, integer: dict[str, _Integers]) -> fx.GraphModule:
    """Return a copy with XNNPACK's grids in place of the fake-quantizers."""
    register_decomposed()
    network = copy.deepcopy(graph)
    for node in list(network.graph.nodes):
        quantizer = _quantizer(network, node)
        if isinstance(quantizer, WeightFakeQuantize):
            node.args = ()
            stored = integer.get(node.target)
            setattr(network, node.target, _FloatWeight(quantizer) if stored is None else _IntegerWeight(stored))
        elif isinstance(quantizer, ActivationFakeQuantize):
            _replace_activation(network, node, quantizer)
        elif node.target is aten.batch_norm.default and not argument(node, 5, "training", False):
            _replace_batch_norm(network, node)
    return tidy(network)


def _replace_activation(network: fx.GraphModule, node: fx.Node, quantizer: ActivationFakeQuantize) -> None:
    """Each reader gets a dequantize node of its own: XNNPACK runs it in one reader's layer, and not for the others."""
    source, low, high = input_node(node), -math.inf, math.inf
    if is_relu(source) and len(source.users) == 1:
        low, high = 0.0, upper_bound(source)
        node.args = (input_node(source),)
    name, quantize = str(node.target), _Quantize(quantizer, low, high)
    setattr(network, name, quantize)
    back = free_name(network, f"{name}_back")
    network.add_module(back, _Dequantize(quantize.grid))
    for reader in list(node.users):
        with network.graph.inserting_before(reader):
            reader.replace_input_with(node, network.graph.call_module(back, (node,)))


def _replace_batch_norm(network: fx.GraphModule, node: fx.Node) -> None:
    arguments: Any = node.args
    x, *tensors, _, _, eps, _ = arguments
    weight, bias, mean, variance = (None if t is None else getattr(network, t.target) for t in tensors)
    name = free_name(network, f"{node.name}_scaled")
    network.add_module(name, _BatchNorm(weight, bias, mean, variance, eps))
    with network.graph.inserting_before(node):
        scaled = network.graph.call_module(name, (x,))
    node.replace_all_uses_with(scaled)


def _lowered(program: ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            return bytes(edge.to_executorch().buffer)
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0]
        raise ModelError(f"ExecuTorch can't lower the network; it says: {type(error).__name__}: {reason}") from error


def _compared(content: bytes, graph: fx.GraphModule, batch: int) -> float:
    """Run the program once on random images: some of what can be lowered does not run, or computes something else."""
    inputs = [_example(form, batch) for form in interface_of(graph).forms]
    with torch.no_grad():
        expected = graph(*inputs)
    try:
        outputs = run_executorch(content, inputs)
    except Exception as error:
        raise ModelError(f"ExecuTorch lowers the network but can't run it; its runtime says: {error}") from error
    difference = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(outputs, expected, strict=True)])
    reference = torch.cat([b.double().flatten() for b in expected])
    relative = (difference.norm() / reference.norm()).item() if difference.any() else 0.0
    if not relative < MOST_ERROR:
        raise ModelError(
            f"ExecuTorch computes something else than the simulation (relative error {relative:.2g} on random images); "
            "its XNNPACK backend does not know how to lower this network."
        )
    return relative


def _example(form: TensorForm, batch: int) -> Tensor:
    """Random values; zeros for integers, which may be indices."""
    shape = (batch, *(size or 0 for size in form.shape[1:]))
    if not form.dtype.is_floating_point:
        return torch.zeros(shape, dtype=form.dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=form.dtype)


def run_executorch(content: bytes, inputs: list[Tensor]) -> list[Tensor]:
    """Run a .pte program in ExecuTorch's Python runtime on the flat list of input tensors."""
    import executorch.kernels.quantized  # noqa: F401  (registers portable kernels of quantized_decomposed)
    from executorch.runtime import Runtime

    method: Any = Runtime.get().load_program(content).load_method("forward")
    return [output.clone() for output in method.execute(inputs)]
