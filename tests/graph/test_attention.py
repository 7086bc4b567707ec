"""Fused attention in parts, against PyTorch's fused operator in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quiesce.data import Samples
from quiesce.graph.attention import split_attention
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from small_nets import call

aten = torch.ops.aten
TOKENS, CHANNELS = 6, 12


class Attention(nn.Module):
    """Self-attention whose further arguments are ``settings`` and, from the input x [N, tokens, channels], ``mask``."""

    def __init__(self, heads: int = 3, kv_heads: int = 3, mask: Any = None, **settings: Any) -> None:
        super().__init__()
        width = CHANNELS // heads
        self.heads, self.kv_heads, self.mask, self.settings = heads, kv_heads, mask, settings
        self.q, self.kv = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, 2 * kv_heads * width)
        if isinstance(mask, Tensor):
            self.register_buffer("table", mask)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2 * self.kv_heads, -1)).transpose(1, 2).chunk(2, 1)
        mask = self.table if isinstance(self.mask, Tensor) else self.mask(x) if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, mask, **self.settings).transpose(1, 2).flatten(2)


HALF = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], *[[1, 0, 1, 0, 1, 1]] * 4]).bool()
EMPTY_ROW = HALF & torch.tensor([1, 1, 1, 0, 1, 1]).bool()[:, None]
BIAS = torch.linspace(-2, 2, TOKENS * TOKENS, dtype=torch.float64).view(TOKENS, TOKENS)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "causal": {"is_causal": True},
    "float mask": {"mask": BIAS},
    "float mask that hides": {"mask": BIAS.masked_fill(~HALF, float("-inf"))},
    "float mask with an empty row": {"mask": BIAS.masked_fill(~EMPTY_ROW, float("-inf"))},
    "bool mask": {"mask": HALF},
    "bool mask with an empty row": {"mask": EMPTY_ROW},
    "computed bool mask": {"mask": lambda x: x[:, None, None, :, 0] > 0},
    "computed float mask": {"mask": lambda x: x[:, None, :, :TOKENS]},
    "computed float mask with -inf": {"mask": lambda x: torch.where(x[:, None, None, :, 0] > 0, 0.0, float("-inf"))},
    "grouped queries": {"heads": 6, "kv_heads": 2, "enable_gqa": True},
    "one head for all": {"heads": 6, "kv_heads": 1, "enable_gqa": True, "is_causal": True},
}


def parts(net: nn.Module) -> Any:
    net = net.double().eval()
    example = Samples((torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64),))
    return split_attention(fold(capture(net, example))[0])


def targets(gm: Any) -> list[Any]:
    return [n.target for n in gm.graph.nodes]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("batch", [1, 5])
def test_parts_are_the_fused_operator(name: str, batch: int) -> None:
    torch.manual_seed(0)
    net = Attention(**VARIANTS[name])
    gm = parts(net)
    x = torch.randn(batch, TOKENS, CHANNELS, dtype=torch.float64)
    x[0, :, 0] = -1.0  # hides every key of this image where the mask is computed
    torch.testing.assert_close(call(gm)(x), net(x), rtol=0, atol=1e-13)
    assert aten.scaled_dot_product_attention.default not in targets(gm)
    assert targets(gm).count(aten.matmul.default) == 2


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_looked_at_only_where_one_can_be_empty(name: str) -> None:
    may_be_empty = "empty row" in name or "computed" in name
    assert (aten.amax.default in targets(parts(Attention(**VARIANTS[name])))) == may_be_empty


@settings(max_examples=8, deadline=None)
@given(st.lists(st.booleans(), min_size=TOKENS**2, max_size=TOKENS**2), st.floats(0.01, 30), st.integers(0, 99))
def test_any_mask(bits: list[bool], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    net = Attention(mask=torch.tensor(bits).view(TOKENS, TOKENS), scale=scale)
    x = torch.randn(3, TOKENS, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(call(parts(net))(x), net.double()(x), rtol=0, atol=1e-12)


class FreeLength(nn.Module):
    """Attends over what was one axis with the batch, so that the length is free."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(0, 1)[None, None]
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).view(x.shape)


def test_a_causal_mask_of_free_length() -> None:
    net = FreeLength()
    gm = parts(net)
    x = torch.randn(3, TOKENS, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(call(gm)(x), net(x), rtol=0, atol=1e-13)


def test_the_graph_given_is_not_changed_and_values_have_their_shapes() -> None:
    net = Attention().eval()
    gm = capture(net, Samples((torch.randn(2, TOKENS, CHANNELS),)))
    before = [str(n) for n in gm.graph.nodes]
    split = split_attention(gm)
    assert [str(n) for n in gm.graph.nodes] == before
    shapes = [
        tuple(n.meta["val"].shape[1:]) for n in split.graph.find_nodes(op="call_function", target=aten.softmax.int)
    ]
    assert shapes == [(3, TOKENS, TOKENS)]
    products = split.graph.find_nodes(op="call_function", target=aten.matmul.default)
    assert all(n.meta["nn_module_stack"] for n in products)


def test_attention_with_dropout_is_left() -> None:
    gm = parts(Attention(dropout_p=0.1))
    assert aten.scaled_dot_product_attention.default in targets(gm)
