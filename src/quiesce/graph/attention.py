"""Attention in parts: a fused ``scaled_dot_product_attention`` becomes the products and the softmax that it stands for.

    softmax(scale · Q Kᵀ + mask) V        scale = 1 / √(channels of Q), unless given

so that the inputs of both products can be quantized. Scores are scaled behind the first product: its inputs are then
tensors that layers of the network have made. PyTorch's own decomposition multiplies both Q and K by √scale, which
differs by rounding only.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quiesce.graph.ops import argument, aten
from quiesce.graph.rewrite import add_tensor, tidy

ATTENTION = aten.scaled_dot_product_attention.default


def split_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of ``gm`` in which each fused attention is its products and softmax; nothing else changes.

    Boolean, float and causal masks, a given scale and grouped queries are kept. A row of scores that is masked out as a
    whole has probabilities of 0, as the fused operator gives them. Attention with dropout, which is random, is left.
    """
    gm = copy.deepcopy(gm)
    for node in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        if not argument(node, 4, "dropout_p", 0.0):
            with gm.graph.inserting_before(node):
                _Split(gm, node).replace()
    return tidy(gm)


@dataclass(frozen=True)
class _Split:
    """One fused attention: query [..., H, L, E], key [..., H, S, E], value [..., H, S, V], mask [..., L, S] or none."""

    gm: fx.GraphModule
    node: fx.Node

    def replace(self) -> None:
        query, key, value = (argument(self.node, i, name, None) for i, name in enumerate(("query", "key", "value")))
        channels, groups = query.meta["val"].shape[-1], query.meta["val"].shape[-3] if self._given("enable_gqa") else 1
        if groups > 1:
            key, value = (self._make(aten.repeat_interleave.self_int, n, groups // _heads(n), -3) for n in (key, value))
        scale = self._given("scale")
        scores = self._make(aten.matmul.default, query, self._make(aten.transpose.int, key, -2, -1))
        scores = self._make(aten.mul.Tensor, scores, 1 / math.sqrt(channels) if scale is None else scale)
        scores, may_be_empty = self._masked(scores)
        weights = self._make(aten.softmax.int, scores, -1)
        if may_be_empty:
            empty = self._make(aten.eq.Scalar, self._make(aten.amax.default, scores, [-1], True), -math.inf)
            weights = self._make(aten.masked_fill.Scalar, weights, empty, 0.0)
        result = self._make(aten.matmul.default, weights, value)
        self.node.replace_all_uses_with(result)
        self.gm.graph.erase_node(self.node)

    def _masked(self, scores: fx.Node) -> tuple[fx.Node, bool]:
        """Return the scores behind the mask, and whether a whole row of them may be masked out."""
        mask = argument(self.node, 3, "attn_mask", None)
        if argument(self.node, 5, "is_causal", False):
            return self._make(aten.masked_fill.Scalar, scores, self._future(scores), -math.inf), False
        if mask is None:
            return scores, False
        constant = getattr(self.gm, str(mask.target)) if mask.op == "get_attr" else None
        if mask.meta["val"].dtype != torch.bool and constant is not None:
            return self._make(aten.add.Tensor, scores, mask), bool((constant == -math.inf).all(-1).any())
        if mask.meta["val"].dtype != torch.bool:
            # A difference: runtimes add integers, and a mask's −∞ is on no grid.
            return self._make(aten.sub.Tensor, scores, self._make(aten.neg.default, mask)), True
        if constant is not None:
            hidden = self._constant("hidden", ~constant)
            return self._make(aten.masked_fill.Scalar, scores, hidden, -math.inf), bool((~constant).all(-1).any())
        return self._make(aten.masked_fill.Scalar, scores, self._make(aten.logical_not.default, mask), -math.inf), True

    def _future(self, scores: fx.Node) -> fx.Node:
        """What a causal mask hides, true above the diagonal: a constant, but for lengths that are free."""
        shape = scores.meta["val"].shape[-2:]
        if all(isinstance(length, int) for length in shape):
            device = scores.meta["val"].device
            return self._constant("future", torch.ones(*shape, dtype=torch.bool, device=device).triu(1))
        ones = self._make(aten.ones_like.default, scores, dtype=torch.bool)
        return self._make(aten.triu.default, ones, 1)

    def _given(self, name: str) -> Any:
        return self.node.kwargs.get(name)

    def _make(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.gm.graph.call_function(target, args, kwargs)
        given = fx.node.map_arg(args, lambda node: node.meta["val"])
        made.meta = {**self.node.meta, "val": target(*given, **kwargs)}
        return made

    def _constant(self, name: str, tensor: Tensor) -> fx.Node:
        made = self.gm.graph.get_attr(add_tensor(self.gm, f"{self.node.name}_{name}", tensor))
        made.meta = {"val": self.node.meta["val"].fake_mode.from_tensor(tensor)}
        return made


def _heads(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-3])
