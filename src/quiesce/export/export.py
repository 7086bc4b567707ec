"""What an exporter reports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import fx

from quiesce.errors import ModelError
from quiesce.quant.fake_quantize import fake_quantizers

EXPORT_OPTIONS = {
    "onnx": ("compat", "symmetric"),
    "openvino": ("compat", "symmetric"),
    "program": ("pt2e",),
    "executorch": ("batch",),
}
"""Formats of files for other programs, and the settings of each; how they are written is in ``quantized.EXPORTS``."""


@dataclass(frozen=True)
class Export:
    """One written network."""

    path: Path
    format: str
    bytes: int
    """Of all files of the network."""
    notes: tuple[str, ...] = ()
    """Where a container is wider than the bits, or an operator was added: which tensors, and why."""


def tensor_name(quantizer: str) -> str:
    """Return the name of the tensor that a fake-quantizer stands behind."""
    return quantizer.removesuffix("_quantizer")


def integers_name(quantizer: str) -> str:
    """Return the name that an activation's integers have in an ONNX file."""
    return f"{tensor_name(quantizer)}_q"


def check_uniform(graph: fx.GraphModule, what: str) -> None:
    """Check that ``what`` (a form of files, in the plural) can hold the grids of the graph's activations.

    Raises:
        ModelError: one is not uniform; it and its grid are named.
    """
    for name, quantizer in fake_quantizers(graph).items():
        if quantizer.spec.grid != "uniform":
            raise ModelError(
                f"{tensor_name(name)} has a {quantizer.spec.grid} grid, which {what} can't hold; quantize with "
                "activations.softmax and activations.gelu = 'uniform', or write a torch.export program."
            )


def require(packages: tuple[str, ...], extra: str) -> None:
    """Check that the packages of an optional extra are installed.

    Raises:
        ModelError: one is missing.
    """
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise ModelError(f"{package} is not installed; install it with: pip install quiesce[{extra}]") from error
