"""Academic placement, that of all published tables: the weight and the input of every conv and linear, nothing else."""

from quiesce.graph.backends.backend import Backend
from quiesce.graph.ops import WEIGHT_OPS

ACADEMIC = Backend(name="academic", weight_ops=frozenset(WEIGHT_OPS))
