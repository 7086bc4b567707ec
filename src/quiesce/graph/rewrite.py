"""What every graph pass ends with."""

from __future__ import annotations

from torch import fx


def tidy(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes and tensors nobody reads, check the graph, and compile it again; returns ``gm``."""
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    used = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    for name in [n for n in gm._buffers if n not in used]:
        delattr(gm, name)
    return gm
