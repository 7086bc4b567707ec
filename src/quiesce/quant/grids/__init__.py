"""Grids of activations by name. A new one is a file beside uniform.py and a row here."""

from quiesce.quant.grids.grid import Grid
from quiesce.quant.grids.log2 import Log2
from quiesce.quant.grids.twin import Twin
from quiesce.quant.grids.uniform import Uniform

GRIDS: dict[str, Grid] = {"uniform": Uniform(), "log2": Log2(1), "log-sqrt2": Log2(2), "twin": Twin()}
