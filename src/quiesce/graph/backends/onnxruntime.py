"""ONNX Runtime's CPU provider: pairs of QuantizeLinear and DequantizeLinear that it fuses into integer kernels.

An operator runs on integers (QLinearConv, QLinearAdd, QLinearConcat, QLinearGlobalAveragePool, …) only between two
quantizers, so inputs of additions, products, concats and average pools are quantized besides those of weight operators,
and the output of every convolution is, whatever reads it: an activation function such as hardswish, or the caller. A
ReLU behind a convolution is left out, as it is the lower end of an unsigned grid; a ReLU6 likewise, as long as the grid
ends at 6 or below. A linear layer can return float (QGemm, MatMulIntegerToFloat), so logits are not quantized. There
is no integer kernel for transposed convolutions. A product of two quantized tensors, as in attention, is one of
integers, whatever reads it (QLinearMatMul, MatMulIntegerToFloat); softmax between two of them is computed in float.
Seen with version 1.32.
"""

from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import AVERAGE_POOLS, MATMUL_OPS, PASS_OPS, WEIGHT_OPS, aten

ONNXRUNTIME = Backend(
    name="onnxruntime",
    matmul_ops=frozenset(MATMUL_OPS),
    weight_ops=frozenset(WEIGHT_OPS),
    input_ops=AVERAGE_POOLS | {aten.add.Tensor, aten.mul.Tensor, aten.cat.default},
    output_ops=frozenset(op for op, form in WEIGHT_OPS.items() if form.spatial_dims and not form.transposed),
    pass_ops=PASS_OPS,
    integer_bias=True,
)
