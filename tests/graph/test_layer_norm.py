from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.layer_norm import LeftLayerNorm, reparameterize
from quiesce.recipe import Recipe
from small_nets import Lambda, nearest
from tiny import images
from transformer import Transformer, transformer

aten = torch.ops.aten
BITS = 4


def reparameterized(net: nn.Module, x: Tensor, **settings: Any) -> tuple[fx.GraphModule, list[LeftLayerNorm]]:
    samples = Samples((x,))
    gm, _ = fold(capture(net.eval(), samples.select(slice(0, 2))))
    return reparameterize(gm, samples, nearest(**settings))


def normed(gm: fx.GraphModule, x: Tensor) -> list[Tensor]:
    """The outputs of the graph's layer norms."""
    found: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is aten.layer_norm.default:
                found[n.name] = result
            return result

    Watch(gm).run(x)
    return list(found.values())


@pytest.mark.parametrize("settings", [{}, {"activation_range": "minmax"}, {"activation_range": "percentile"},
                                      {"activation_symmetric": True}, {"activation_bits": 2}])  # fmt: skip
def test_the_float_function_is_the_same_in_double_precision(settings: dict[str, Any]) -> None:
    net, x = transformer().double(), images(24).double()
    gm, left = reparameterized(net, x, **settings)
    (y,) = gm(x)
    torch.testing.assert_close(y, net(x), rtol=0, atol=1e-12)
    assert [entry.node for entry in left] == ["layer_norm_4"]
    assert "mean" in left[0].reason and "no linear layer" in left[0].reason


def test_layers_without_a_bias_are_given_one_and_keep_their_weights_names() -> None:
    net, x = transformer(), images(24)
    gm, _ = reparameterized(net, x)
    linears = [n for n in gm.graph.nodes if n.target is aten.linear.default]
    assert all(len(n.args) == 3 and n.args[2] is not None for n in linears)
    assert net.blocks[0].qkv.bias is None


def test_channels_have_one_range_and_the_integers_they_had_each_on_its_own_grid() -> None:
    """The right-hand side of the identity in the module's docstring, by numpy's rounding in double precision."""
    net, x = transformer().double(), images(24).double()
    gm, _ = reparameterized(net, x, activation_range="minmax")
    before, _ = fold(capture(net, Samples((x[:2],))))
    steps = 2**BITS - 1
    for old, new in list(zip(normed(before, x), normed(gm, x), strict=True))[:4]:
        old, new = old.flatten(0, -2).numpy(), new.flatten(0, -2).numpy()
        scale = (old.max(0) - old.min(0)) / steps
        zero = (-old.min(0) / scale).round()
        common, common_zero = scale.mean(), zero.mean().round().clip(0, steps)
        own = (old / scale).round() + zero
        shared = (new / common).round() + common_zero
        differ = own != shared
        assert differ.mean() < 2e-3, "more than ties"
        assert abs(own - shared).max() <= 1
        assert shared.min() >= 0 and shared.max() <= steps
        np.testing.assert_allclose(new.max(0) - new.min(0), common * steps, rtol=1e-9)
        assert scale.max() / scale.min() > 2


def test_a_dead_channel_changes_nothing_but_its_offset() -> None:
    net = transformer().double()
    with torch.no_grad():
        for block in net.blocks:
            block.norm1.weight[:3] = 0
            block.norm1.bias[:3] = 0
    x = images(24).double()
    gm, _ = reparameterized(net, x)
    assert all(torch.isfinite(b).all() for b in gm.buffers())
    torch.testing.assert_close(gm(x)[0], net(x), rtol=0, atol=1e-12)


def test_a_norm_without_gain_and_offset() -> None:
    net = Transformer().double()
    net.blocks[0].norm1 = nn.LayerNorm(16, elementwise_affine=False)
    net.blocks[1].norm2 = nn.LayerNorm(16, bias=False)
    x = images(24).double()
    gm, left = reparameterized(net.double(), x)
    assert len(left) == 1
    torch.testing.assert_close(gm(x)[0], net(x), rtol=0, atol=1e-12)


def _skip(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    return self.linear(y) + y


def _two_axes(self: Any, x: Tensor) -> Tensor:
    return self.linear(F.layer_norm(x, (8, 8)))


def _computed(self: Any, x: Tensor) -> Tensor:
    return self.linear(F.layer_norm(x, (8,), x[0, 0, 0]))


def _returned(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_skip, "add.* reads it, which is no linear layer"),
        (_two_axes, "more than the last axis"),
        (_computed, "computed from the input"),
        (_returned, "output reads it"),
    ],
)
def test_what_is_left_says_why(function: Any, reason: str) -> None:
    net, x = Lambda(function, linear=nn.Linear(8, 8), norm=nn.LayerNorm(8)), images(8)
    gm, left = reparameterized(net, x)
    assert len(left) == 1
    assert re.search(reason, left[0].reason)
    torch.testing.assert_close(gm(x)[0], net(x))


def test_two_layers_that_read_one_norm_both_take_it_back() -> None:
    def both(self: Any, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.a(y) * self.b(y)

    net = Lambda(both, a=nn.Linear(8, 4), b=nn.Linear(8, 4, bias=False), norm=nn.LayerNorm(8)).double()
    with torch.no_grad():
        net.norm.weight.uniform_(0.1, 2)
    x = images(16).double()
    gm, left = reparameterized(net, x)
    assert not left
    torch.testing.assert_close(gm(x)[0], net(x), rtol=0, atol=1e-12)


def test_the_batch_size_of_calibration_changes_nothing() -> None:
    net, x = transformer(), images(24)
    graphs = [reparameterized(net, x, calibration_batch=batch)[0] for batch in (5, 24)]
    for first, second in zip(*(g.buffers() for g in graphs), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_the_graph_given_is_not_changed() -> None:
    net, x = transformer(), images(24)
    gm, _ = fold(capture(net, Samples((x[:2],))))
    before = [b.clone() for b in gm.buffers()]
    reparameterize(gm, Samples((x,)), Recipe())
    assert all(torch.equal(a, b) for a, b in zip(gm.buffers(), before, strict=True))


def test_a_layer_that_shares_its_weight_is_left() -> None:
    """A weight of two layers can't take a norm's scales for one of them."""

    def twice(self: Any, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.linear(x)))

    net, x = Lambda(twice, linear=nn.Linear(8, 8), norm=nn.LayerNorm(8)).double(), images(8).double()
    gm, left = reparameterized(net, x)
    assert [entry.reason for entry in left] == ["a layer behind it shares its weight with another one"]
    torch.testing.assert_close(gm(x)[0], net(x))
