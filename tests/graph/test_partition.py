from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from quiesce.data import Samples
from quiesce.graph.capture import capture, interface_of
from quiesce.graph.fold import fold
from quiesce.graph.ops import is_weight_op
from quiesce.graph.partition import partition
from quiesce.graph.place import weight_layers
from quiesce.graph.unit import Unit, boundary, compute_nodes, extract
from quiesce.quant.fake_quantize import float_mode
from small_nets import CASES, Dense, UNet, captured, conv, nearest, placed, quantized, trained


class Residual(nn.Module):
    def __init__(self, channels: int = 4, skip: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.skip = conv(channels, channels, padding=1), conv(channels, channels, padding=1), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return (y + x).relu() if self.skip else y


class Squeeze(nn.Module):
    """Squeeze-and-excitation inside a block."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = conv(4, 2, 1), conv(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.a, self.gate, self.b, self.skip = conv(4, 4, padding=1), self.Gate(), conv(4, 4, 1), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.gate(self.a(x).relu()))
        return y + x if self.skip else y


class Twice(nn.Module):
    """One block called twice, another in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.other, self.head = conv(3, 4), Residual(), Residual(), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.other(self.block(self.stem(x)))))


class Towers(nn.Module):
    """Two chains of blocks side by side, one of which reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(Residual(3) for _ in range(2))
        self.right = nn.ModuleList(Residual(3) for _ in range(2))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for left, right in zip(self.left, self.right, strict=True):
            x, y = left(x) + y, right(y)
        return self.head((x + y).mean((2, 3)))


class Interleaved(nn.Module):
    """Two blocks whose layers are called in turn, so that neither is a stretch of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.head = Residual(3), Residual(3), conv(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.p.a(x), self.q.a(x)
        u, v = self.p.b(u.relu()), self.q.b(v.relu())
        return self.head(u + v)


class Inception(nn.Module):
    class Branches(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.one = conv(inputs, 2, 1)
            self.three = nn.Sequential(conv(inputs, 2, 1), nn.ReLU(), conv(2, 2, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.three(x)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.head = conv(3, 4), self.Branches(4), self.Branches(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.position = conv(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 4, 8))
        self.blocks, self.head = nn.Sequential(self.Block(), self.Block()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.position).mean(1))


class SequenceFirst(Transformer):
    """The same with images in the second dimension from the first block to the last, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention.batch_first = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        return self.head(self.blocks(x).mean(0))


class Heads(nn.Module):
    """Several outputs, some of them from the middle of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 4), nn.Sequential(Residual(), Residual())
        self.classes, self.map = nn.Linear(4, 3), conv(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        y = self.blocks(x)
        return self.classes(y.mean((2, 3))), self.map(y), y, x


class Normalized(nn.Module):
    """Arithmetic without weights at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Residual(3), Residual(3))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1)
        return self.blocks(x).flatten(1).softmax(1) * 2


def plain(convs: int) -> nn.Module:
    layers = [m for _ in range(convs) for m in (conv(3, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "plain": (lambda: plain(4), ["0", "2", "4", "6", "9", "11"]),
    "short": (lambda: nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 2)), ["0+2"]),
    "residual": (
        lambda: nn.Sequential(conv(3, 4), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), conv(4, 2, 1)),
        ["0", "1", "2", "4"],
    ),
    "no skips": (
        lambda: nn.Sequential(conv(3, 4), Residual(skip=False), Residual(skip=False), conv(4, 2)),
        ["0+1", "2", "3"],
    ),
    "squeeze and excitation": (
        lambda: nn.Sequential(conv(3, 4), Squeeze(True), Squeeze(False), Squeeze(True), conv(4, 2)),
        ["0", "1", "2", "3", "4"],
    ),
    "a block called twice": (
        Twice, ["stem", "block.a+block.b", "other", "block.a:conv2d_5+block.b:conv2d_6", "head"]
    ),
    "towers": (Towers, ["left.0", "right.0", "left.1", "right.1", "head"]),
    "interleaved": (Interleaved, ["p+q", "head"]),
    "inception": (Inception, ["stem", "first", "second", "head"]),
    "transformer": (Transformer, ["patches", "blocks.0", "blocks.1", "head"]),
    "sequence first": (SequenceFirst, ["patches", "blocks.0+blocks.1", "head"]),
    "heads": (Heads, ["stem", "blocks.0", "blocks.1", "classes+map"]),
    "weightless ends": (Normalized, ["blocks.0", "blocks.1"]),
    "dense": (Dense, ["stem", "layers.0", "layers.1", "layers.2", "layers.3", "head"]),
    "a long dense stage": (lambda: Dense(14), ["stem", *(f"layers.{i}" for i in range(14)), "head"]),
    "u-net": (UNet, ["down1", "down2", "bottom", "raise2", "up2", "raise1", "up1", "head"]),
}  # fmt: skip


@cache
def images() -> Samples:
    return Samples((torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(4)),))


@cache
def net_graph(name: str) -> fx.GraphModule:
    torch.manual_seed(0)
    gm = capture(trained(NETS[name][0]()), images().select(slice(0, 2)))
    return quantized(gm, images(), nearest(weight_bits=4, activation_bits=4))


@cache
def case_graph(name: str) -> fx.GraphModule:
    return quantized(captured(name), CASES[name].samples(8), nearest(weight_bits=4, activation_bits=4))


JOINED = ("blocks.0+blocks.1", "make+conv", "conv+head", "head", "read+keep")
"""Units whose layers have nothing but tensors without images first between them, or share a weight."""


def check_units(gm: fx.GraphModule, units: list[Unit], granularity: str) -> None:
    """Units tile the graph, and each layer is in exactly one."""
    nodes = compute_nodes(gm)
    assert (units[0].start, units[-1].stop) == (0, len(nodes))
    assert all(a.stop == b.start and a.start < a.stop for a, b in pairwise(units))
    layers = weight_layers(gm)
    assert [layer for unit in units for layer in unit.layers] == list(layers)
    for unit in units:
        inside = [n for n in nodes[unit.start : unit.stop] if is_weight_op(n)]
        assert inside == [layers[name] for name in unit.layers] and inside
        assert granularity == "block" or len(inside) == 1 or unit.name in JOINED
    assert len({unit.name for unit in units}) == len(units)


def run_units(gm: fx.GraphModule, units: list[Unit], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Run the units one after another, each on what those before it left."""
    nodes = compute_nodes(gm)
    known = dict(zip([n.name for n in gm.graph.nodes if n.op == "placeholder"], inputs, strict=True))
    for unit in units:
        ends = boundary(nodes, unit.start, unit.stop)
        assert set(ends.inputs) <= known.keys(), "a unit reads what no unit before it has made"
        made = extract(gm, nodes, unit.start, unit.stop)(*(known[name] for name in ends.inputs))
        assert all(isinstance(tensor, Tensor) and len(tensor) == len(inputs[0]) for tensor in made)
        known |= zip(ends.outputs, made, strict=True)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return tuple(known[n.name] for n in output.args[0])


def check_run(gm: fx.GraphModule, units: list[Unit], inputs: list[Tensor]) -> None:
    for tensor, whole in zip(run_units(gm, units, inputs), gm(*inputs), strict=True):
        assert torch.equal(tensor, whole)
    with float_mode(gm):
        for tensor, whole in zip(run_units(gm, units, inputs), gm(*inputs), strict=True):
            assert torch.equal(tensor, whole)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", NETS)
def test_units_run_in_sequence_are_the_network(name: str, granularity: str) -> None:
    gm = net_graph(name)
    units = partition(gm, granularity)
    check_units(gm, units, granularity)
    check_run(gm, units, list(images().args))


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("name", CASES)
def test_units_of_odd_networks_run_in_sequence_are_the_network(name: str, granularity: str) -> None:
    gm, samples = case_graph(name), CASES[name].samples(5 * CASES[name].together, seed=9)
    units = partition(gm, granularity)
    check_units(gm, units, granularity)
    if name == "bn of each batch":
        samples = CASES[name].samples(8)
    check_run(gm, units, interface_of(gm).flatten(samples.args, samples.kwargs))


@pytest.mark.parametrize("name", NETS)
def test_blocks_are_what_a_reader_would_draw(name: str) -> None:
    gm = net_graph(name)
    assert [u.name for u in partition(gm, "block")] == NETS[name][1]


@pytest.mark.parametrize("name", NETS)
def test_layers_of_a_block_are_stretches_of_it(name: str) -> None:
    """So that a layer pass can be measured by modules."""
    gm = net_graph(name)
    edges = {u.start for u in partition(gm, "layer")}
    assert all(u.start in edges for u in partition(gm, "block"))


class Stages(nn.Module):
    """Two stages of twelve layers each in one skip connection, and four small blocks."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(*[nn.Sequential(*[conv(4, 4, padding=1) for _ in range(4)]) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            return x + self.parts(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages = conv(3, 4), nn.Sequential(self.Stage(), self.Stage())
        self.blocks = nn.Sequential(*[Residual() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stages(self.stem(x)))


def test_a_block_of_more_than_a_quarter_of_the_layers_is_split_at_its_modules() -> None:
    gm = placed(capture(Stages().eval(), images()), nearest())
    units = partition(gm, "block")
    check_units(gm, units, "block")
    check_run(gm, units, list(images().args))
    sizes = [len(unit.layers) for unit in units]
    assert sum(sizes) == 33  # of which a block may hold 8
    assert sizes == [1, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2]


def test_boundaries_carry_what_is_alive() -> None:
    dense = net_graph("dense")
    nodes, units = compute_nodes(dense), partition(dense, "block")
    ends = [boundary(nodes, u.start, u.stop) for u in units]
    # Layer i reads the stem's features and those of the i layers before it.
    assert [len(e.inputs) for e in ends] == [1, 1, 2, 3, 4, 5]
    assert [len(e.outputs) for e in ends] == [1] * 6
    unet = net_graph("u-net")
    nodes, units = compute_nodes(unet), partition(unet, "block")
    inputs = {u.name: boundary(nodes, u.start, u.stop).inputs for u in units}
    # The long skip ends in the unit that joins it with what was raised.
    assert {name: len(read) for name, read in inputs.items() if len(read) > 1} == {"raise2": 2, "raise1": 2}


def test_partition_does_not_depend_on_quantizers() -> None:
    torch.manual_seed(0)
    folded, _ = fold(capture(trained(NETS["residual"][0]()), images().select(slice(0, 2))))
    for granularity in ("layer", "block"):
        bare = [(u.name, u.layers) for u in partition(folded, granularity)]
        assert bare == [(u.name, u.layers) for u in partition(net_graph("residual"), granularity)]


def test_a_quantizer_belongs_to_the_unit_that_makes_its_tensor() -> None:
    gm = net_graph("residual")
    nodes = compute_nodes(gm)
    units = partition(gm, "block")
    for i, node in enumerate(nodes):
        if node.op == "call_module" and node.args[0] in nodes:
            unit = next(u for u in units if u.start <= i < u.stop)
            assert unit.start <= nodes.index(node.args[0]) < unit.stop


def test_an_extracted_unit_shares_its_quantizers_and_holds_no_others() -> None:
    gm = net_graph("residual")
    nodes, unit = compute_nodes(gm), partition(gm, "block")[1]
    module = extract(gm, nodes, unit.start, unit.stop)
    held = dict(module.named_children())
    # Two weights and two activations: between the convolutions and behind the block.
    assert len(held) == 4 and all(getattr(gm, name) is child for name, child in held.items())


def _resnet(name: str) -> Any:
    import torchvision

    return getattr(torchvision.models, name)()


def _regnet() -> Any:
    import timm

    return timm.create_model("regnetx_006")


def stages(counts: tuple[int, ...], name: str, first: int = 0) -> list[str]:
    return [name.format(s, b + first) for s, n in enumerate(counts, 1) for b in range(n)]


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "resnet18": (lambda: _resnet("resnet18"), ["conv1", *stages((2, 2, 2, 2), "layer{}.{}"), "fc"], 21),
    "resnet50": (lambda: _resnet("resnet50"), ["conv1", *stages((3, 4, 6, 3), "layer{}.{}"), "fc"], 54),
    "mobilenet_v2": (
        lambda: _resnet("mobilenet_v2"),
        ["features.0+features.1", *(f"features.{i}" for i in range(2, 18)), "features.18+classifier"],
        53,
    ),
    "regnetx_006": (_regnet, ["stem", *stages((1, 3, 5, 7), "s{}.b{}", 1), "head"], 54),
}
"""Modules of arXiv 2303.11906's published lists, and the number of weight layers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_published_modules(name: str) -> None:
    make, blocks, layers = PUBLISHED[name]
    net, samples = trained(make()), Samples((torch.randn(2, 3, 64, 64),))
    gm = placed(capture(net, samples), nearest(activation_range="minmax", weight_range="minmax"))
    units = partition(gm, "block")
    assert [u.name for u in units] == blocks
    check_units(gm, units, "block")
    singles = partition(gm, "layer")
    check_units(gm, singles, "layer")
    assert len(singles) == layers
    # The interface of every block is one tensor, as in the references.
    ends = [boundary(compute_nodes(gm), u.start, u.stop) for u in units]
    assert all(len(e.inputs) == len(e.outputs) == 1 for e in ends)
    with float_mode(gm), torch.no_grad():
        (whole,) = gm(*samples.args)
        assert torch.equal(run_units(gm, units, list(samples.args))[0], whole)
        torch.testing.assert_close(whole, net(*samples.args), rtol=1e-4, atol=1e-4 * whole.abs().max().item())
