"""Quiesce: post-training quantization to 2-4 bits that measures reconstruction oscillation and removes it."""

from quiesce.analysis import choose_bits, measure_sensitivity
from quiesce.errors import QuiesceError
from quiesce.pipeline import quantize
from quiesce.quantized import QuantizedModel, load
from quiesce.recipe import Recipe
from quiesce.result import Result

__all__ = [
    "QuantizedModel",
    "QuiesceError",
    "Recipe",
    "Result",
    "choose_bits",
    "load",
    "measure_sensitivity",
    "quantize",
]
