"""The quantized network as a ``torch.export`` program: one .pt2 file that plain torch loads and runs.

Weights are integers with a dequantize step behind them, activations pass a quantize and a dequantize step. Both are
plain ATen arithmetic, the simulation's own, so that nothing need be imported and the answers are the same. With
``pt2e`` they are the operators of ``quantized_decomposed``, which tools of torch's PT2E quantization look for.
"""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from quiesce.errors import ModelError
from quiesce.export.export import Export, check_uniform
from quiesce.graph.capture import Interface, TensorForm, interface_of
from quiesce.graph.rewrite import on_cpu, replace_quantizers
from quiesce.outputs import check_new, write_bytes
from quiesce.quant.fake_quantize import ActivationFakeQuantize, FakeQuantize, WeightFakeQuantize, fake_quantizers
from quiesce.quant.functional import dequantize, quantize
from quiesce.quant.grids import GRIDS
from quiesce.recipe import Recipe
from quiesce.result import versions

EXTRA_FILE = "quiesce.json"
"""The program's extra file, in JSON: versions, recipe with seed, preprocessing."""
_BATCH, _FREE = 2, 64
"""Example sizes of the batch and of other free dimensions; the program takes any."""


def export_program(
    graph: fx.GraphModule,
    recipe: Recipe,
    path: Path,
    *,
    preprocessing: dict[str, Any] | None = None,
    pt2e: bool = False,
    force: bool = False,
) -> Export:
    """Write the network to ``path`` (.pt2) as the program that :func:`as_program` makes, whole or not at all.

    Args:
        graph: a quantized network on any device; not changed.
        recipe: of the network; goes into the program's extra file with the versions.
        preprocessing: what its images need, as plain data; goes there too.
        pt2e: quantize by the operators of ``quantized_decomposed``.
        force: replace a file that is there.

    Raises:
        ModelError: torch.export refuses the graph, or ``pt2e`` is asked of a network that is not in float32.
        OutputError: ``path`` is taken or can't be written.
    """
    check_new(path, force)
    about = {"versions": versions(), "recipe": recipe.to_dict(), "preprocessing": preprocessing}
    file = io.BytesIO()
    torch.export.save(as_program(graph, pt2e=pt2e), file, extra_files={EXTRA_FILE: json.dumps(about)})
    write_bytes(path, file.getvalue())
    return Export(path, "torch.export program", len(file.getvalue()))


def as_program(graph: fx.GraphModule, *, pt2e: bool = False) -> ExportedProgram:
    """Return the network as a program on the CPU that takes and returns what the caller's model did, at any batch size.

    The default computes x / scale as the simulation does and agrees with it bit for bit. The operators of ``pt2e``
    compute x · (1 / scale), which may round a value that lies between two integers the other way; to load such a
    program, ``torch.ao.quantization.fx._decomposed`` must have been imported.
    """
    return trace(_with_integers(graph, pt2e), interface_of(graph))


def trace(network: fx.GraphModule, interface: Interface, batch: int | None = None) -> ExportedProgram:
    """Export the flat ``network`` on the CPU, called as ``interface`` says; ``batch`` fixes the batch size.

    Raises:
        ModelError: torch.export refuses it.
    """
    examples = example_inputs(interface, batch)
    args, kwargs = pytree.tree_map(lambda leaf: examples[leaf.index], interface.inputs)
    shapes = _dynamic_shapes(interface) if batch is None else None
    try:
        with torch.no_grad():
            program = torch.export.export(
                _nested(network, interface), args, kwargs, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        reason = str(error).strip().split("\n\n")[0]
        raise ModelError(
            f"the quantized network can't be exported as a program; torch says: {type(error).__name__}: {reason}"
        ) from error
    return _cleared(program)


def example_inputs(interface: Interface, batch: int | None = None) -> list[Tensor]:
    """Return flat inputs of zeros on the CPU; with a batch of 1, torch.export would take its size for a constant."""
    free = [batch or _BATCH, *[_FREE] * max(len(form.shape) for form in interface.forms)]
    return [
        torch.zeros([free[axis] if size is None else size for axis, size in enumerate(form.shape)], dtype=form.dtype)
        for form in interface.forms
    ]


def free_axes(form: TensorForm) -> dict[int, Any]:
    """Say to torch.export which sizes of an input are free."""
    return {axis: Dim.DYNAMIC for axis, size in enumerate(form.shape) if size is None}


def _nested(network: fx.GraphModule, interface: Interface) -> nn.Module:
    """Return the flat network as a module that is called as the caller's model was.

    Its signature names every argument, as torch.export writes its checks of shapes by these names.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return interface.unflatten(network(*interface.flatten(args, kwargs)))

    positional, named = interface.inputs
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *(inspect.Parameter(f"args_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(positional))),
            *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in named),
        ]
    )
    module = nn.Module()
    module.add_module("network", network)
    module.forward = forward
    return module


class _Weight(nn.Module):
    """Integers (the weight's shape) and what they stand for; scale and zero point lie so that they broadcast."""

    quantized: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: WeightFakeQuantize) -> None:
        super().__init__()
        spec, integers = quantizer.spec, quantizer.quantized_weight()
        self.register_buffer("quantized", integers)
        self.register_buffer("scale", spec.broadcast(quantizer.scale, integers.ndim))
        self.register_buffer("zero_point", spec.broadcast(quantizer.zero_point, integers.ndim))

    def forward(self) -> Tensor:
        return dequantize(self.quantized, self.scale, self.zero_point)


class _Activation(nn.Module):
    """The scale stays a tensor: by a plain number, CUDA multiplies with the reciprocal instead of dividing."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationFakeQuantize) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.grid != "uniform":
            return GRIDS[self.spec.grid].fake_quantize(x, self.scale, self.zero_point, self.spec)
        q = quantize(x, self.scale, self.zero_point, self.spec.quant_min, self.spec.quant_max)
        return dequantize(q.to(self.spec.dtype), self.scale, self.zero_point)


class _DecomposedWeight(nn.Module):
    def __init__(self, quantizer: WeightFakeQuantize) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.register_buffer("quantized", quantizer.quantized_weight())
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.int64))
        self.numbers = _numbers(quantizer) if quantizer.spec.ch_axis is None else None

    def forward(self) -> Tensor:
        ops, spec = torch.ops.quantized_decomposed, self.spec
        grid = (spec.quant_min, spec.quant_max, spec.dtype)
        weight: Tensor
        if self.numbers is not None:
            weight = ops.dequantize_per_tensor.default(self.quantized, *self.numbers, *grid)
        else:
            weight = ops.dequantize_per_channel.default(
                self.quantized, self.scale, self.zero_point, spec.ch_axis, *grid
            )
        return weight


class _DecomposedActivation(nn.Module):
    def __init__(self, quantizer: ActivationFakeQuantize) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.numbers = _numbers(quantizer)

    def forward(self, x: Tensor) -> Tensor:
        ops, spec = torch.ops.quantized_decomposed, self.spec
        parameters = (*self.numbers, spec.quant_min, spec.quant_max, spec.dtype)
        result: Tensor = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *parameters), *parameters)
        return result


def _numbers(quantizer: FakeQuantize) -> tuple[float, int]:
    return quantizer.scale.item(), int(quantizer.zero_point)


def _with_integers(graph: fx.GraphModule, pt2e: bool) -> fx.GraphModule:
    """Return a copy on the CPU whose fake-quantizers hold integers only, without the float weights they replaced."""
    network = on_cpu(graph)
    if pt2e:
        check_uniform(network, "programs of PT2E operators")
        register_decomposed()
        _check_float32(network)
    weight, activation = (_DecomposedWeight, _DecomposedActivation) if pt2e else (_Weight, _Activation)
    return replace_quantizers(network, lambda _, q: weight(q) if isinstance(q, WeightFakeQuantize) else activation(q))


def register_decomposed() -> None:
    """Importing the module is what registers the operators; torch has no public name for it."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def _check_float32(graph: fx.GraphModule) -> None:
    for name, quantizer in fake_quantizers(graph).items():
        if quantizer.scale.dtype != torch.float32:
            raise ModelError(
                f"{name} has a scale in {quantizer.scale.dtype}, and PT2E operators take float32 only; "
                "export without pt2e, or quantize the network in float32."
            )


def _dynamic_shapes(interface: Interface) -> tuple[Any, ...]:
    """What is free in each argument, in the order of the signature."""

    positional, named = pytree.tree_map(lambda leaf: free_axes(interface.forms[leaf.index]), interface.inputs)
    return (*positional, *named.values())


def _cleared(program: ExportedProgram) -> ExportedProgram:
    """Remove checks that tie the program to the CPU, and stack traces, which name files of this machine."""
    graph = program.graph
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    program.graph_module.recompile()
    return program
