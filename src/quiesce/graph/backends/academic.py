"""Academic placement, that of all published tables: the weight and the input of every conv and linear, nothing else.

Of transformers, published tables quantize both inputs of the products in attention, too (PTQ4ViT, RepQ-ViT).
"""

from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import MATMUL_OPS, WEIGHT_OPS, aten

ACADEMIC = Backend(
    name="academic",
    weight_ops=frozenset(WEIGHT_OPS),
    matmul_ops=frozenset(MATMUL_OPS) | {aten.einsum.default},
)
