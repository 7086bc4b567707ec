"""Quiesce: post-training quantization to 2-4 bits that measures reconstruction oscillation and removes it."""

from quiesce.errors import QuiesceError
from quiesce.pipeline import choose_bits, measure_sensitivity, quantize
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
