from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quiesce.data import Samples
from quiesce.graph.capture import capture
from quiesce.graph.fold import fold
from quiesce.graph.ops import is_weight_op, weight_node
from small_nets import CASES, Lambda, call, captured, conv, outputs, relative_error, trained

aten = torch.ops.aten


@pytest.mark.parametrize("name", CASES)
def test_folding_keeps_the_float_output(name: str) -> None:
    case = CASES[name]
    folded, left = fold(captured(name))
    samples = case.samples(8, seed=5)
    assert relative_error(outputs(call(folded), samples), outputs(case.net(), samples)) <= 1e-4
    assert len(left) == case.left
    norms = [n for n in folded.graph.nodes if "batch_norm" in str(n.target)]
    assert len(norms) == case.left
    assert {n.node for n in left} <= {n.name for n in norms}


@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_a_weight_and_bias_of_its_own_unless_all_around_share_theirs(name: str) -> None:
    folded, _ = fold(captured(name))
    layers = [n for n in folded.graph.nodes if is_weight_op(n)]
    assert len(layers) == CASES[name].layers
    constants = [c for layer in layers for c in layer.all_input_nodes if c.op == "get_attr" and c != weight_node(layer)]
    weights = {weight_node(layer): None for layer in layers}
    assert len({c.target for c in [*constants, *weights]}) == len(constants) + len(weights)
    assert all(len(c.users) == 1 for c in constants)
    assert len(weights) == SHARED.get(name, len(layers))
    assert all(set(w.users) <= set(layers) for w in weights)


SHARED = {"several scales": 2, "recurrence by hand": 3, "states of an lstm": 1}
"""Weights of networks whose layers are called several times with nothing but such layers in between."""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bn without conv", "no convolution or linear layer"),
        ("bn at the end", "no convolution or linear layer"),
        ("output also read elsewhere", "also used elsewhere"),
        ("two bns on one output", "also used elsewhere"),
        ("linear-bn over tokens", "channels on the axis"),
        ("linear-bn over as many tokens", "channels on the axis"),
        ("bn of each batch", "statistics of each batch"),
        ("bias from the input", "computed from the input"),
    ],
)
def test_what_is_left_says_why(name: str, reason: str) -> None:
    _, left = fold(captured(name))
    assert left and all(reason in entry.reason for entry in left)


def test_the_captured_graph_is_not_changed() -> None:
    gm = captured("conv-bn")
    tensors, nodes = copy.deepcopy(dict(gm.named_buffers())), [str(n) for n in gm.graph.nodes]
    folded, _ = fold(gm)
    for tensor in folded.buffers():
        tensor.zero_()
    assert [str(n) for n in gm.graph.nodes] == nodes
    assert all(torch.equal(t, tensors[n]) for n, t in gm.named_buffers())


def test_folding_is_exact_in_double_precision() -> None:
    net = trained(
        nn.Sequential(conv(bias=False), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4))
    ).double()
    samples = Samples((torch.randn(3, 3, 8, 8, dtype=torch.float64),))
    folded, left = fold(capture(net, samples))
    assert not left
    assert relative_error(outputs(call(folded), samples), outputs(net, samples)) < 1e-13


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_that_are_nearly_constant_or_dead_survive(channels: int) -> None:
    """Trained networks have running variances of 1e-12 and gains of exactly 0."""
    net = trained(nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)))
    with torch.no_grad():
        net[1].running_var[:channels] = 1e-12
        net[1].weight[-channels:] = 0
    samples = Samples((torch.randn(4, 3, 8, 8),))
    folded, _ = fold(capture(net, samples))
    assert relative_error(outputs(call(folded), samples), outputs(net, samples)) <= 1e-4


def test_a_folded_bias_does_not_take_the_name_of_another_tensor() -> None:
    case = CASES["namesake bias"]
    folded, _ = fold(captured("namesake bias"))
    held = [b for b in folded.buffers() if b.shape == (4,)]
    assert any(torch.equal(b, case.net().w_bias.detach()) for b in held), "the bias that is read elsewhere has changed"


def test_weights_that_two_layers_share_are_folded_apart() -> None:
    folded, left = fold(captured("conv called twice"))
    first, second = (getattr(folded, weight_node(n).target) for n in folded.graph.nodes if is_weight_op(n))
    assert not left and not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["frozen bn", "layer scale"])
def test_constants_of_channels_are_folded_too(name: str) -> None:
    folded, _ = fold(captured(name))
    targets = [n.target for n in folded.graph.nodes if n.op == "call_function"]
    assert aten.mul.Tensor not in targets
    assert targets.count(aten.add.Tensor) == (name == "layer scale"), "the skip connection alone is left"


def test_constants_of_another_axis_are_not_folded() -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.tokens(self.image(x) * self.columns).transpose(1, 2) + self.rows

    parts = {"image": conv(3, 6, padding=1), "columns": nn.Parameter(torch.randn(6, 6)), "tokens": nn.Linear(6, 6)}
    net = Lambda(forward, **parts, rows=nn.Parameter(torch.randn(6, 1, 6)))
    samples = Samples((torch.randn(2, 3, 6, 6),))
    folded, _ = fold(capture(net, samples))
    assert aten.mul.Tensor in [n.target for n in folded.graph.nodes]
    assert relative_error(outputs(call(folded), samples), outputs(net, samples)) <= 1e-6


def test_a_weight_is_not_shared_around_a_layer_of_another_weight() -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(self.a(self.c(self.c(x)))))

    net = Lambda(forward, a=conv(3, 3), b=conv(3, 3), c=conv(3, 3, 1))
    folded, _ = fold(capture(net, Samples((torch.randn(2, 3, 8, 8),))))
    weights = [weight_node(n).target for n in folded.graph.nodes if is_weight_op(n)]
    assert weights[0] == weights[1] and len({*weights}) == 4


def test_a_weight_is_not_shared_between_operators_or_with_what_reads_it_otherwise() -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        w, v = self.w, self.v
        y = torch.conv2d(torch.conv_transpose2d(torch.conv2d(x, w), w), w)
        return torch.conv2d(torch.conv2d(y, v), v) + v

    parts = {name: nn.Parameter(torch.randn(1, 1, 1, 1)) for name in ("w", "v")}
    samples = Samples((torch.randn(2, 1, 8, 8),))
    folded, _ = fold(capture(Lambda(forward, **parts), samples))
    layers = [n for n in folded.graph.nodes if is_weight_op(n)]
    assert len({weight_node(n) for n in layers}) == len(layers) == 5


def test_conv_into_an_output_and_a_norm_is_left_alone() -> None:
    def both(self: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return y, self.bn(y)

    net = trained(Lambda(both, conv=conv(), bn=nn.BatchNorm2d(6)))
    samples = Samples((torch.randn(2, 3, 8, 8),))
    folded, left = fold(capture(net, samples))
    assert [entry.reason for entry in left] == ["the output of conv2d is also used elsewhere"]
    assert relative_error(outputs(call(folded), samples), outputs(net, samples)) <= 1e-6
