"""OpenVINO's CPU plugin: low-precision transformations of a network with quantizers.

A convolution or linear layer runs on integers as soon as its input and weight are quantized; the activation function
behind it and the next quantizer are computed with it, and its bias is added in float. Average pools stay on integers
when their input is quantized. The skip branch of an addition is quantized, the branch that a convolution has just made
is not. Quantizers behind a concat are moved in front of it, so a concat needs none of its own. Seen with version
2026.4.
"""

from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import AVERAGE_POOLS, PASS_OPS, WEIGHT_OPS, aten

OPENVINO = Backend(
    name="openvino",
    weight_ops=frozenset(WEIGHT_OPS),
    input_ops=AVERAGE_POOLS,
    skip_ops=frozenset({aten.add.Tensor}),
    pass_ops=PASS_OPS,
)
