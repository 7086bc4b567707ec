"""TensorRT's explicit quantization, by its documentation; not run on TensorRT.

int8 only, symmetric weights and activations: the integers of activations are −128 to 127, of which those behind a ReLU
use one half. Inputs and weights of convolutions and linear layers are quantized, and the skip branch of an addition,
which is then computed with the convolution on the other branch. Outputs and biases are left float.
Sources: NVIDIA, TensorRT documentation, "Working with Quantized Types" and "Explicit Quantization"; TensorFlow
Quantization Toolkit, "Add Custom QDQ Insertion Case" (the residual connection).
"""

from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import PASS_OPS, WEIGHT_OPS, aten

TENSORRT = Backend(
    name="tensorrt",
    weight_ops=frozenset(WEIGHT_OPS),
    skip_ops=frozenset({aten.add.Tensor}),
    pass_ops=PASS_OPS,
    onnx_for_onnxruntime=False,
)
