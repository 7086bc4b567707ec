"""Networks of many habits: quantized, saved, loaded, and the same bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import quiesce
from quiesce.errors import ModelError
from quiesce.export.checkpoint import check_storable
from quiesce.preparation import prepare
from quiesce.quant.fake_quantize import WeightFakeQuantize, fake_quantizers, float_mode
from tiny import images, recipe


class Layers(nn.Module):
    """Layers that the networks below put together."""

    features = 8

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.d = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(self.features, 5)

    def maps(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def pooled(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class Shuffle(Layers):
    """Channel shuffle, by views and by its operator."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.pooled(F.channel_shuffle(self.d(x), 2))


class FlatView(Layers):
    """A view over channels and positions: it must hold for images with channels last in memory too."""

    features = 8 * 64

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.maps(x))
        return self.head(x.view(x.size(0), -1))


class Flatten(Layers):
    features = 8 * 64

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.d(self.maps(x)), 1))


class Activations(Layers):
    """Squeeze-and-excitation, hard-swish, SiLU, gates, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.a(x))
        x = x * F.hardsigmoid(self.b(F.adaptive_avg_pool2d(x, 1)))
        return self.pooled(self.prelu(F.silu(self.c(x)) * torch.sigmoid(self.d(x))))


class Mask(Layers):
    """A mask of booleans from the input, used behind the layers."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.mean(1, keepdim=True) > 0
        y = self.maps(x)
        return self.pooled(self.d(torch.where(mask, y, 0.5 * y)))


class Index(Layers):
    """An index from the input, used behind the layers."""

    def forward(self, x: Tensor) -> Tensor:
        index = x.mean(1).flatten(1).argmax(1)
        return self.pooled(self.d(self.maps(x))) + index[:, None]


class Frames(Layers):
    """Images cut into two that pass as a batch twice as large."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(x.shape[0] * 2, 3, 8, 4)
        return self.head(self.maps(y).mean((2, 3)).view(x.shape[0], 2, 8).mean(1))


class Resize(Layers):
    """Pool, interpolate to the input's size, concatenate, slice."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.c(self.b(F.max_pool2d(self.a(x), 2))), size=x.shape[-2:], mode="bilinear")
        return self.d(torch.cat([y, 2 * y], 1)[:, :8])


class InPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += 1
        y.relu_()
        y[:, :4].mul_(2)
        return self.pooled(self.d(self.b(y)))


class Norms(Layers):
    """Normalizations that can't be folded stay."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm([8, 8, 8])
        self.instance = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.instance(self.c(self.layer(self.b(self.group(self.a(x)))))))


class Transposed(nn.Module):
    """1-d, transposed, dilated and strided convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2),
            nn.ReLU6(),
            nn.Conv1d(6, 6, 3, dilation=2),
            nn.Softplus(),
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(2)).amax(2))


class Nested(Layers):
    """A result of dict, list, tuple, None, a number and a text; two of its tensors are one."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.maps(x)
        logits = self.pooled(y)
        return {"maps": y, "rest": (None, [logits, 3, logits]), "kind": "nested"}


class Ordered(Layers):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        y = self.maps(x)
        return OrderedDict(out=self.pooled(y), aux=y)


class PassedOn(Layers):
    """Returns its input too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.pooled(self.maps(x))


NETWORKS = [
    Shuffle,
    FlatView,
    Flatten,
    Activations,
    Mask,
    Index,
    Frames,
    Resize,
    InPlace,
    Norms,
    Transposed,
    Nested,
    Ordered,
    PassedOn,
]


def same(first: Any, second: Any) -> bool:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_is_quantized_and_loads_bit_identical(kind: type[nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    settings = recipe("qdrop-fast", granularity="layer", steps=2, batch_size=4, weight_bits=8, activation_bits=8)
    network = quiesce.quantize(model, images(12), settings, evaluate=images(6, seed=7))
    assert network.result.run.sqnr_db is not None and network.result.run.sqnr_db > 10  # W8A8 is close to float
    loaded = quiesce.load(network.save(tmp_path / "net"))
    for x in (images(5, seed=2), images(1, seed=3), images(4).contiguous(memory_format=torch.channels_last)):
        result = network(x)
        assert same(result, loaded(x))
        # Mappings of any kind come back as dict; everything else nests as before.
        assert pytree.tree_structure(loaded(x)) == pytree.tree_structure(_plain(result))


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _plain(v) for k, v in tree.items()}
    return type(tree)(map(_plain, tree)) if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("kind", [Mask, Index])
def test_tensors_without_gradient_are_carried_and_not_compared(kind: type[nn.Module], granularity: str) -> None:
    settings = recipe("qdrop-fast", granularity=granularity, fisher=True, steps=3)
    network = quiesce.quantize(kind().eval(), images(12), settings)
    assert all(loss > 0 for loss in network.result.run.module_losses.values())


def test_a_network_that_returns_only_a_choice_has_nothing_to_compare() -> None:
    class Choice(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.pooled(self.maps(x)).argmax(1)

    with pytest.raises(ModelError, match=r"unit .*head.* returns no floating-point tensor"):
        quiesce.quantize(Choice().eval(), images(12), recipe(granularity="layer"))


class Pair:
    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts


pytree.register_pytree_node(
    Pair,
    lambda pair: (list(pair.parts), None),
    lambda parts, _: Pair(*parts),
    serialized_type_name="tests.Pair",
    to_dumpable_context=lambda _: "",
    from_dumpable_context=lambda _: None,
)


def test_a_container_that_has_no_form_in_the_file_is_refused_before_any_work() -> None:
    class Named(Layers):
        def forward(self, x: Tensor) -> Pair:
            y = self.maps(x)
            return Pair(y, self.pooled(y))

    with pytest.raises(
        ModelError, match=r"takes or returns a Pair, which can't be saved; use a tuple, list, dict or dataclass"
    ):
        prepare(Named().eval(), images(12), recipe("nearest"))


def test_a_result_that_nests_too_deeply_is_refused_before_any_work() -> None:
    class Deep(Layers):
        def forward(self, x: Tensor) -> Any:
            nested: Any = self.pooled(self.maps(x))
            for _ in range(40):
                nested = [nested]
            return nested

    with pytest.raises(ModelError, match=r"can't be saved \(nested deeper than 64 levels\)"):
        prepare(Deep().eval(), images(12), recipe("nearest"))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1.5, None, True])
def test_constants_that_the_network_returns_are_kept(value: object, tmp_path: Path) -> None:
    class Constant(Layers):
        def forward(self, x: Tensor) -> Any:
            return {"value": value, "logits": self.pooled(self.maps(x))}

    network = quiesce.quantize(Constant().eval(), images(12), recipe("nearest"))
    assert quiesce.load(network.save(tmp_path / "net"))(images(2))["value"] == value


@pytest.mark.parametrize("inputs", ["kwargs", "mixed order"])
def test_keyword_inputs(inputs: str, tmp_path: Path) -> None:
    class Scaled(Layers):
        def forward(self, x: Tensor, *, scale: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.pooled(self.maps(x)) * scale

    data = {"x": images(12), "scale": torch.rand(12, 1)}
    batch = data if inputs == "kwargs" else dict(reversed(data.items()))
    model = Scaled().eval()
    network = quiesce.quantize(model, [batch], recipe("brecq-fast", weight_bits=8, activation_bits=8))
    loaded = quiesce.load(network.save(tmp_path / "net"))
    x, scale = images(3, seed=2), torch.rand(3, 1)
    assert torch.equal(network(x=x, scale=scale), loaded(scale=scale, x=x))
    torch.testing.assert_close(loaded(x=x, scale=scale), model(x, scale=scale), rtol=0.1, atol=0.05)
    with pytest.raises(ModelError, match="captured with other arguments; call it with: 0 positional, "):
        loaded(x, scale=scale)
    with pytest.raises(ModelError, match="call it with"):
        loaded(x=x)


def test_a_network_without_float_weights_can_not_be_switched_back(tmp_path: Path) -> None:
    network = quiesce.quantize(Flatten().eval(), images(12), recipe("nearest"))
    loaded = quiesce.load(network.save(tmp_path / "net"))
    with float_mode(loaded.graph_module), pytest.raises(ModelError, match="without float weights"):
        loaded(images(2))
    check_storable(loaded.graph_module)


class Made(Layers):
    """Makes tensors on the device of its input."""

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(x.shape[0], 8, 8, 8, device=x.device)
        return self.pooled(self.d(torch.cat([start, self.maps(x)], 1)[:, 4:12])) + torch.arange(5, device=x.device)


def test_tensors_that_the_graph_makes_follow_the_network_to_its_device(tmp_path: Path) -> None:
    network = quiesce.quantize(Made().eval(), images(12), recipe("nearest"))
    network.save(tmp_path / "net")
    moved = quiesce.load(tmp_path / "net", device="meta")
    assert {t.device.type for t in moved.buffers()} == {"meta"}
    assert moved(images(2).to("meta")).device.type == "meta"
    assert torch.equal(quiesce.load(tmp_path / "net").to("cpu")(images(3)), network(images(3)))


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    quiesce.quantize(Flatten().eval(), images(12), recipe("nearest")).save(tmp_path / "net")
    for device in ("abacus", "cuda:99"):
        with pytest.raises(ModelError, match=rf"can't be loaded to device {device} .*; load it to 'cpu'"):
            quiesce.load(tmp_path / "net", device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_network_loads_to_the_gpu_and_back(tmp_path: Path) -> None:
    network = quiesce.quantize(Made().eval(), images(12), recipe("nearest"), device="cpu")
    network.save(tmp_path / "net")
    x, expected = images(3), network(images(3))
    loaded = quiesce.load(tmp_path / "net", device="cuda")
    torch.testing.assert_close(loaded(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    loaded.save(tmp_path / "again")
    assert torch.equal(quiesce.load(tmp_path / "again")(x), expected)
    assert torch.equal(loaded.cpu()(x), expected)


def test_weights_dequantized_once_change_no_bit(tmp_path: Path) -> None:
    network = quiesce.quantize(Activations().eval(), images(12), recipe("nearest"))
    x, expected = images(5, seed=2), network(images(5, seed=2))
    made: list[str] = []
    for quantizer in fake_quantizers(network.graph_module).values():
        if isinstance(quantizer, WeightFakeQuantize):
            make = quantizer.dequantized_weight
            quantizer.dequantized_weight = lambda make=make: made.append("once") or make()  # type: ignore[method-assign]
    assert network.dequantize_weights() is network
    assert len(made) == 5
    assert torch.equal(network(x), expected) and torch.equal(network(x), expected)
    assert len(made) == 5
    held = sum(b.numel() for n, b in network.named_buffers() if n.endswith("held"))
    assert held == sum(b.numel() for n, b in network.named_buffers() if n.endswith("quantized"))
    assert not any(name.endswith("held") for name in network.state_dict())
    network.save(tmp_path / "net")
    assert torch.equal(quiesce.load(tmp_path / "net")(x), expected)
    network.dequantize_weights(keep=False)
    assert not any(n.endswith("held") for n, _ in network.named_buffers())
    assert torch.equal(network(x), expected) and len(made) == 10
