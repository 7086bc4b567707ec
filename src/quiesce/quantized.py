"""The quantized network: called as the float one was, saved and loaded, and written in the forms of other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from quiesce.errors import ModelError
from quiesce.export.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from quiesce.export.executorch import ExecutorchExport, export_executorch
from quiesce.export.export import Export
from quiesce.export.onnx import export_onnx
from quiesce.export.openvino import export_openvino
from quiesce.export.program import export_program
from quiesce.graph.capture import interface_of
from quiesce.graph.rewrite import follow_tensors
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers
from quiesce.recipe import Recipe
from quiesce.result import Result


class QuantizedModel(nn.Module):
    """A quantized network: call it as the float one was called.

    ``result`` says what was done and measured, ``recipe`` how, ``preprocessing`` (plain data or None) what its images
    need.
    """

    def __init__(
        self, graph: fx.GraphModule, result: Result, recipe: Recipe, preprocessing: dict[str, Any] | None
    ) -> None:
        super().__init__()
        self.graph_module = graph
        self.result = result
        self.recipe = recipe
        self.preprocessing = preprocessing

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        interface = interface_of(self.graph_module)
        return interface.unflatten(self.graph_module(*interface.flatten(args, kwargs)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedModel:
        """Move all tensors (``to``, ``cuda``, …), and with them what operators of the graph are told of the device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        follow_tensors(self.graph_module)
        return self

    def dequantize_weights(self, keep: bool = True) -> QuantizedModel:
        """Dequantize the weights once instead of in each forward pass; ``keep=False`` goes back. Returns the model.

        Outputs are the same, bit for bit, and :meth:`save` still writes integers. In memory a weight takes 5 bytes
        then (a float beside its integer) instead of 1, and none has to be made while the network runs.
        """
        for quantizer in fake_quantizers(self.graph_module).values():
            if isinstance(quantizer, WeightFakeQuantize):
                quantizer.hold() if keep else quantizer.release()
        return self

    def save(self, folder: Path | str) -> Path:
        """Write the network (quantized.json, quantized.safetensors), result.json and recipe.toml into ``folder``.

        Raises:
            OutputError: ``folder`` holds files already, or the system can't write there.
        """
        return write_checkpoint(
            Checkpoint(self.graph_module, self.result, self.recipe, self.preprocessing), Path(folder)
        )

    def export_onnx(
        self, path: Path | str, *, compat: bool = False, symmetric: bool = False, force: bool = False
    ) -> Export:
        """Write the network as ONNX with integer weights, packed at 2, 4 or 8 bits; it runs in ONNX Runtime.

        ``compat`` writes opset 13 with 8-bit integers, ``symmetric`` weights whose zero points are 0, ``force``
        replaces a file that is there.

        Raises:
            ModelError: onnx, onnxscript or onnxruntime is not installed, or ONNX lacks what the network needs.
            OutputError: ``path`` is taken or can't be written.
        """
        return self._export(export_onnx, path, compat=compat, symmetric=symmetric, force=force)

    def export_openvino(
        self, path: Path | str, *, compat: bool = False, symmetric: bool = False, force: bool = False
    ) -> Export:
        """Write the network for OpenVINO: ``path`` (.xml) and the .bin beside it; settings as :meth:`export_onnx`.

        Raises:
            ModelError: openvino is not installed, or can't convert the network.
            OutputError: a file is taken or can't be written.
        """
        return self._export(export_openvino, path, compat=compat, symmetric=symmetric, force=force)

    def export_program(self, path: Path | str, *, pt2e: bool = False, force: bool = False) -> Export:
        """Write the network as a torch.export program (.pt2) with integer weights, which plain torch loads and runs.

        ``pt2e`` writes quantization as the operators that tools of torch's PT2E quantization know (docs/deploy.md),
        ``force`` replaces a file that is there.

        Raises:
            ModelError: torch.export refuses the graph, or ``pt2e`` is asked of a network that is not in float32.
            OutputError: ``path`` is taken or can't be written.
        """
        return self._export(export_program, path, pt2e=pt2e, force=force)

    def export_executorch(self, path: Path | str, *, batch: int = 1, force: bool = False) -> ExecutorchExport:
        """Write the network as an ExecuTorch program (.pte) for ``batch`` images a run, on integers where it can be.

        Raises:
            ModelError: executorch is not installed, or can't lower or run the network (docs/deploy.md).
            OutputError: ``path`` is taken or can't be written.
        """
        return export_executorch(self.graph_module, Path(path), batch=batch, force=force)

    def _export(self, write: Callable[..., Export], path: Path | str, **settings: bool) -> Export:
        return write(self.graph_module, self.recipe, Path(path), preprocessing=self.preprocessing, **settings)


@dataclass(frozen=True)
class ExportFormat:
    """A form in which other programs run a network."""

    write: Callable[..., Export]
    """Called as ``write(network, path, force=…, …)``, with the settings of ``EXPORT_OPTIONS``."""
    suffix: str


EXPORTS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(QuantizedModel.export_onnx, ".onnx"),
    "openvino": ExportFormat(QuantizedModel.export_openvino, ".xml"),
    "program": ExportFormat(QuantizedModel.export_program, ".pt2"),
    "executorch": ExportFormat(QuantizedModel.export_executorch, ".pte"),
}
"""Formats by name."""


def load(folder: Path | str, device: torch.device | str = "cpu") -> QuantizedModel:
    """Load a network that :meth:`QuantizedModel.save` wrote to ``device``, wherever it was saved.

    It needs neither the model's source nor trust in the files.

    Raises:
        FileFormatError: a file is missing, truncated, or not one of ours.
        ModelError: ``device`` is not there.
    """
    checkpoint = read_checkpoint(Path(folder))
    network = QuantizedModel(checkpoint.graph, checkpoint.result, checkpoint.recipe, checkpoint.preprocessing)
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"the network can't be loaded to device {device} ({reason}); load it to 'cpu'.") from error
