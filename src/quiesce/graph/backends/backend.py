"""The description of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """Which tensors a target quantizes, in terms of ATen operators.

    What it demands of the recipe (symmetric weights, 8 bits) is in ``recipe.BACKENDS``.
    """

    name: str
    weight_ops: frozenset[Any]
    """Operators whose weight and input are quantized."""
    input_ops: frozenset[Any] = frozenset()
    """Further operators (additions, concats, pools) all of whose tensor inputs are quantized."""
    matmul_ops: frozenset[Any] = frozenset()
    """Products of two tensors that depend on the input, such as those of attention; both are quantized."""
    skip_ops: frozenset[Any] = frozenset()
    """Operators (additions) all of whose tensor inputs are quantized but the one that a weight operator makes for them
    alone: the runtime adds the others to its result before rounding."""
    output_ops: frozenset[Any] = frozenset()
    """Operators whose output is quantized wherever it goes; behind a ReLU that alone reads it, if there is one."""
    pass_ops: frozenset[Any] = frozenset()
    """Operators that hand values on unchanged. What a quantizer gives is still on its grid behind them, so it stands in
    front of them. A padding with zeros in front of a weight operator counts as one when there are any."""
    integer_bias: bool = False
    """True where the bias is added as an integer of scale s_x · s_w."""
    onnx_for_onnxruntime: bool = True
    """True where ONNX files have to give the simulation's answers in ONNX Runtime, which would round float biases;
    False where they are for a reader that adds these in float, and looks for patterns that a bound would break."""
