"""Small networks, each with one thing that graph passes get wrong easily, the inputs they take, and short cuts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

from quiesce.data import Samples
from quiesce.evaluate import outputs_of
from quiesce.graph.backends import BACKENDS
from quiesce.graph.calibrate import calibrate
from quiesce.graph.capture import capture, interface_of
from quiesce.graph.fold import fold
from quiesce.graph.place import annotate, insert
from quiesce.recipe import Recipe

BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``net`` in eval mode with batch-norm statistics and parameters that are not trivial."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            if module.running_mean is not None:
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.3, 2.0))
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(uniform(module.weight, 0.5, 1.5) * torch.sign(uniform(module.weight, -1, 3)))
                    module.bias.copy_(uniform(module.bias, -0.5, 0.5))
    return net.eval()


class Lambda(nn.Module):
    """A network given as a function of itself and its inputs; ``parts`` are its modules and parameters."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """A network, how its inputs look without the batch dimension, and what folding must leave."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((3, 8, 8),)
    names: tuple[str, ...] = ()
    """Names of the inputs when they are keyword arguments."""
    left: int = 0
    """Batch-norms that stay."""
    layers: int = 1
    """Weight operators."""
    draw: Callable[[int, torch.Generator], tuple[Any, ...]] | None = None
    """Makes the positional inputs where they are something else than normal numbers in ``shapes``."""
    together: int = 1
    """Images that the network takes together."""

    def net(self) -> nn.Module:
        torch.manual_seed(7)
        return trained(self.make())

    def samples(self, count: int, seed: int = 1) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        if self.draw is not None:
            return Samples(self.draw(count, generator))
        tensors = [torch.randn(count, *shape, generator=generator) for shape in self.shapes]
        return Samples((), dict(zip(self.names, tensors, strict=True))) if self.names else Samples(tuple(tensors))


def conv(inputs: int = 3, outputs: int = 6, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **settings)


def _in_place_views(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    view = y.view(y.shape[0], 2, 3, *y.shape[2:])
    view.add_(0.5)  # seen through y, too
    y.relu_()
    first = y[:, :3]
    first.mul_(2.0)
    y += view.flatten(1, 2)
    return self.head(y)


def _in_place_skip(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.conv(x), inplace=True)
    z = self.head(y)
    z += y
    return F.hardtanh(z, -1.0, 1.0, inplace=True)


def _written_slice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, 0] = y[:, 1] * 2
    y[:, :, ::2] += 1
    return y


class Shared(nn.Module):
    """One convolution called twice, with its own batch-norm behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = conv(3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x)).relu()))


class Tied(nn.Module):
    """Two modules with one weight, of which one stands before a batch-norm, and which is read a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bn = conv(3, 3, padding=1), conv(3, 3, padding=1), nn.BatchNorm2d(3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.bn(self.first(x))) + self.first.weight.mean()


class NamesakeBias(nn.Module):
    """A bias whose name is the one a folded bias might be given, read in a second place."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.w_bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(F.conv2d(x, self.w, self.w_bias))
        return (y.transpose(1, -1) + self.w_bias).transpose(1, -1)


class OddNames(nn.Module):
    """Parameters called as attributes of torch.fx's GraphModule."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.graph = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.meta = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.code, self.graph) * self.meta


class Parametrized(nn.Module):
    """A weight made symmetric by a parametrization."""

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.transpose(-1, -2)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(6)
        parametrize.register_parametrization(self.conv, "weight", self.Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Standardized(nn.Conv2d):
    """Weight standardization: the weight is normalized in forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = conv(3, 4, padding=1), nn.Linear(5, 4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return self.image(image).relu() + self.vector(vector)[:, :, None, None]


class Defaults(TwoInputs):
    def forward(self, image: Tensor, vector: Tensor | None = None, scale: float = 2.0, *, flip: bool = True) -> Tensor:
        y = self.image(image) * scale
        return y.flip(-1) if flip else y


class VarArgs(TwoInputs):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs)


class OneThenVarArgs(TwoInputs):
    def forward(self, image: Tensor, *rest: Tensor) -> Tensor:
        return super().forward(image, *rest)


class VarKwargs(TwoInputs):
    def forward(self, **inputs: Tensor) -> Tensor:
        return super().forward(inputs["image"], inputs["vector"])


class Outputs(nn.Module):
    """Results that nest, with None and a number among them, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), conv(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x)
        return {"out": self.head(y), "aux": None, "more": (y.relu(), [x, 3]), "twice": y}


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), nn.Linear(6 * 36, 4)
        self.drops = nn.ModuleList(
            [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for drop in self.drops:
            y = drop(y)
        return self.head(F.dropout(y.flatten(1), 0.3, self.training, inplace=True))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = conv(), nn.BatchNorm2d(6), conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return self.head(y.detach())


class Sizes(nn.Module):
    """Reshapes that read the batch size over and over, and constants made as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = conv(3, 4, padding=1), nn.Parameter(torch.randn(1, 1, 4))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = self.conv(x).reshape(n, 4, -1).transpose(1, 2)
        tokens = torch.cat([self.token.expand(n, -1, -1), tokens], 1) + torch.zeros(n, 1, 4)
        tokens = self.mix(tokens.reshape(n * 5, 13, 4)).relu().view(n, 65, 4)
        return self.head(tokens[:, 0])


class FromInput(nn.Module):
    """A convolution whose weight a layer makes from the input, with a batch-norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.bn = nn.Linear(3, 4 * 3 * 9), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.make(x.mean((0, 2, 3))).view(4, 3, 3, 3)))


class BiasFromInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.make, self.bn = conv(3, 4, bias=False), nn.Linear(3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.conv.weight, self.make(x.mean((0, 2, 3)))))


class Dense(nn.Module):
    """Dense connections: every layer reads all features before it."""

    class Layer(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.bn, self.squeeze = nn.BatchNorm2d(inputs), conv(inputs, 8, 1, bias=False)
            self.grow = conv(8, 4, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.grow(self.squeeze(self.bn(x).relu()).relu())

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, 6, padding=1)
        self.layers = nn.ModuleList(self.Layer(6 + 4 * i) for i in range(layers))
        self.head = nn.Linear(6 + 4 * layers, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Long skips from each stage down to its counterpart up."""

    class Stage(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.a, self.b, self.bn = (
                conv(inputs, outputs, padding=1),
                conv(outputs, outputs, padding=1),
                nn.BatchNorm2d(outputs),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.b(self.a(x).relu())).relu()

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = self.Stage(3, 4), self.Stage(4, 8), self.Stage(8, 8)
        self.raise2, self.raise1 = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.up2, self.up1, self.head = self.Stage(16, 8), self.Stage(8, 4), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        y = self.bottom(F.max_pool2d(second, 2))
        y = self.up2(torch.cat([self.raise2(y), second], 1))
        return self.head(self.up1(torch.cat([self.raise1(y), first], 1)))


class Frozen(nn.Module):
    """A batch-norm whose statistics and parameters are constants, as in torchvision's detectors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.rand(channels) + 0.5)
        self.register_buffer("variance", torch.rand(channels) + 0.3)
        self.register_buffer("offset", torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.gain * (self.variance + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.offset.reshape(1, -1, 1, 1)


class Embedded(nn.Module):
    """Words with positions, averaged under a mask; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(5, 8)
        self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor, padded: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        x = self.mlp(x).tanh().masked_fill(padded.unsqueeze(-1), 0.0)
        return self.head(x.sum(1) / (~padded).sum(1, keepdim=True))


def _draw_words(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(1, 6, (count, 1), generator=generator)
    return torch.randint(20, (count, 5), generator=generator), torch.arange(5).expand(count, 5) >= lengths


def tokens(make: Callable[[], nn.Module], layers: int = 1) -> Case:
    return Case(
        make, layers=layers, draw=lambda count, generator: (torch.randint(20, (count, 5), generator=generator),)
    )


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase], time_first: bool = False, **settings: Any) -> None:
        super().__init__()
        self.time_first, width = time_first, 12 if settings.get("bidirectional") else 6
        self.embed, self.head = nn.Linear(5, 5), nn.Linear(width, 3)
        self.memory = kind(5, 6, batch_first=not time_first, **settings)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.memory(x.transpose(0, 1))[0][-1] if self.time_first else self.memory(x)[0][:, -1])


class States(nn.Module):
    """What a recurrent layer returns besides its sequence has images second."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(5, 6, num_layers=2, dropout=0.3, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        sequence, (hidden, cell) = self.memory(x)
        return self.head(sequence), self.head(hidden.transpose(0, 1)), cell[0]


class Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Elman(nn.Module):
    """Recurrence written by hand: the same two layers in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            state = (self.read(x[:, step]) + self.keep(state)).tanh()
        return self.head(state)


class ChosenRows(nn.Module):
    """As with experts: only the tokens that are chosen go through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.expert, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = self.embed(x)
        z = y.clone()
        z[chosen] = self.expert(y[chosen])
        return self.head(z)


class Waves(nn.Module):
    """Gated dilated convolutions on sound."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Conv1d(1, 4, 5, stride=2), nn.Conv1d(4, 8, 3, dilation=2, padding=2)
        self.back, self.head = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        signal, gate = self.gate(x).chunk(2, 1)
        return self.head(x + self.back(signal.tanh() * gate.sigmoid())).mean(-1)


class Spectrogram(nn.Module):
    """Complex numbers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = conv(1, 4, padding=1), conv(4, 4, 1)
        self.head, self.filter = nn.Linear(4, 2), nn.Parameter(torch.randn(4, 9, 5, 2))
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, x: Tensor) -> Tensor:
        power = torch.stft(x, 16, 8, window=self.window, return_complex=True).abs()
        y = torch.fft.rfft2(self.conv(power.unsqueeze(1))) * torch.view_as_complex(self.filter)
        return self.head(self.mix(torch.fft.irfft2(y, s=power.shape[1:])).relu().mean((2, 3)))


class Clips(nn.Module):
    """Images are frames, four of which are a clip: features move to the next frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 4, padding=1), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        clips = y.view(-1, 4, *y.shape[1:])
        moved = torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], 1)
        return self.head((clips + moved).view(y.shape))


class Pairs(nn.Module):
    """Two images are halves of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(3, 4, padding=1), conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.reshape(y.shape[0] // 2, 8, *y.shape[2:])).reshape(y.shape[0], 1, *y.shape[2:])


class Shuffle(nn.Module):
    """A channel shuffle behind a concatenation, as in ShuffleNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.depthwise = conv(3, 8, padding=1), conv(4, 4, 1), conv(4, 4, groups=4, padding=1)
        self.bn, self.head = nn.BatchNorm2d(4), conv(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        y = torch.cat([left, self.bn(self.depthwise(self.a(right).relu()))], 1)
        n, channels, height, width = y.shape
        y = y.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.head(y)


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = conv(3, 8, padding=1), nn.BatchNorm2d(8), conv(8, 2, 1)
        self.down, self.up = conv(8, 2, 1), conv(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        return self.head(y * self.up(self.down(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid())


class SkipAroundConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8, padding=1), conv(8, 4, padding=1), conv(8, 4, 1), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((torch.cat([self.a(y), self.b(y)], 1) + y).relu())


class Nested(TwoInputs):
    """Takes its inputs in a container."""

    def forward(self, inputs: Any) -> Tensor:
        if isinstance(inputs, Both):
            return super().forward(inputs.image, inputs.vector)
        return super().forward(*(inputs.values() if isinstance(inputs, dict) else inputs))


@dataclass
class Both:
    image: Tensor
    vector: Tensor


def nested(container: Callable[[Tensor, Tensor], Any]) -> Case:
    def draw(count: int, generator: torch.Generator) -> tuple[Any]:
        image = torch.randn(count, 3, 8, 8, generator=generator)
        return (container(image, torch.randn(count, 5, generator=generator)),)

    return Case(Nested, layers=2, draw=draw)


class Logits(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Maps:
    logits: Tensor
    features: Tensor
    loss: Tensor | None = None


torch.export.register_dataclass(Both)
torch.export.register_dataclass(Maps)


class Returning(nn.Module):
    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.container = conv(), conv(6, 2, 1), container

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.container(self.head(y.relu()), y)


def _written_everywhere(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[y < 0] = 0
    first, second = y.chunk(2, 1)
    first.mul_(2)
    second.copy_(first + second)
    y.transpose(1, 2).add_(1)
    y[1:].clamp_(max=3)
    kept = torch.empty_like(y)
    kept.copy_(y)
    return self.head(torch.add(kept, y, out=torch.zeros_like(y)))


def _several_scales(self: Any, x: Tensor) -> list[Tensor]:
    return [self.head(self.conv(F.avg_pool2d(x, size)).relu()) for size in (1, 2, 4)]


def _kept(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = self.head(self.conv(x).relu())
    return y, y > 0, y.argmax(1)


def _half_inside(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv(x).half().relu().float())


def _product(self: Any, x: Tensor) -> Tensor:
    y = (x @ self.first).relu()
    return torch.addmm(self.bias, y.flatten(0, 1), self.second).view(x.shape[0], -1, 3)


def _bilinear(self: Any, x: Tensor) -> Tensor:
    return self.head(self.pairs(x, x.tanh()))


def _used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn(y) + y


def _two_norms(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.bn1(y) - self.bn2(y)


def transposed(dims: int, **settings: Any) -> Case:
    kinds = {
        1: (nn.ConvTranspose1d, nn.BatchNorm1d),
        2: (nn.ConvTranspose2d, nn.BatchNorm2d),
        3: (nn.ConvTranspose3d, nn.BatchNorm3d),
    }
    layer, norm = kinds[dims]
    outputs = settings.pop("outputs", 6)
    return Case(lambda: nn.Sequential(layer(4, outputs, 3, **settings), norm(outputs)), ((4, *(5,) * dims),))


CASES: dict[str, Case] = {
    "conv-bn": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(inplace=True))),
    "conv without bias": Case(lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(6))),
    "bn without parameters": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, affine=False))),
    "bn with another eps": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, eps=0.3))),
    "bn of each batch": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False)), left=1),
    "instance norm": Case(lambda: nn.Sequential(conv(), nn.InstanceNorm2d(6, affine=True), conv(6, 2)), layers=2),
    "conv without bn": Case(lambda: nn.Sequential(conv(), nn.ReLU6(inplace=True), conv(6, 4)), layers=2),
    "bn without conv": Case(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), conv()), left=1),
    "bn at the end": Case(lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(6)), left=1),
    "bn then conv then bn": Case(lambda: nn.Sequential(nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(6)), left=1),
    "two bns in a row": Case(lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.BatchNorm2d(6))),
    "output also read elsewhere": Case(lambda: Lambda(_used_twice, conv=conv(), bn=nn.BatchNorm2d(6)), left=1),
    "two bns on one output": Case(
        lambda: Lambda(_two_norms, conv=conv(), bn1=nn.BatchNorm2d(6), bn2=nn.BatchNorm2d(6)), left=2
    ),
    "in-place views": Case(
        lambda: Lambda(_in_place_views, conv=conv(), bn=nn.BatchNorm2d(6), head=conv(6, 2)), layers=2
    ),
    "in-place skip": Case(lambda: Lambda(_in_place_skip, conv=conv(3, 4), head=conv(4, 4, padding=1)), layers=2),
    "written slice": Case(lambda: Lambda(_written_slice, conv=conv())),
    "conv called twice": Case(Shared, layers=2),
    "tied weights": Case(Tied, layers=2),
    "namesake bias": Case(NamesakeBias),
    "conv1d": Case(lambda: nn.Sequential(nn.Conv1d(3, 6, 3, stride=2), nn.BatchNorm1d(6)), ((3, 9),)),
    "conv3d": Case(lambda: nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6)), ((2, 4, 4, 4),)),
    "grouped": Case(lambda: nn.Sequential(conv(4, 6, groups=2), nn.BatchNorm2d(6)), ((4, 8, 8),)),
    "depthwise": Case(lambda: nn.Sequential(conv(4, 8, groups=4), nn.BatchNorm2d(8)), ((4, 8, 8),)),
    "dilated and strided": Case(
        lambda: nn.Sequential(conv(dilation=(2, 1), stride=(1, 2), padding=(1, 0)), nn.BatchNorm2d(6))
    ),
    "padding same": Case(lambda: nn.Sequential(conv(padding="same", dilation=2), nn.BatchNorm2d(6))),
    "padding valid": Case(lambda: nn.Sequential(nn.Conv1d(3, 6, 3, padding="valid"), nn.BatchNorm1d(6)), ((3, 9),)),
    "circular padding": Case(lambda: nn.Sequential(conv(padding=1, padding_mode="circular"), nn.BatchNorm2d(6))),
    "reflect padding": Case(lambda: nn.Sequential(conv(padding="same", padding_mode="reflect"), nn.BatchNorm2d(6))),
    "transposed 1d": transposed(1, stride=2),
    "transposed 2d": transposed(2, stride=2, output_padding=1, padding=1),
    "transposed 2d grouped": transposed(2, groups=2, outputs=6),
    "transposed depthwise": transposed(2, groups=4, outputs=4, bias=False),
    "transposed 3d": transposed(3, dilation=2),
    "linear": Case(lambda: nn.Linear(5, 3), ((5,),)),
    "linear-bn": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), ((5,),)),
    "linear-bn over tokens": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(4)), ((4, 5),), left=1),
    "linear-bn over as many tokens": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), ((6, 5),), left=1),
    "weight norm": Case(lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(6))),
    "spectral norm": Case(lambda: nn.Sequential(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(6))),
    "parametrized": Case(Parametrized),
    "standardized weight": Case(lambda: nn.Sequential(Standardized(3, 6, 3), nn.BatchNorm2d(6))),
    "functional": Case(
        lambda: Lambda(lambda self, x: F.conv2d(x, self.w, stride=2), w=nn.Parameter(torch.randn(4, 3, 3, 3)))
    ),
    "two inputs": Case(TwoInputs, ((3, 8, 8), (5,)), layers=2),
    "keyword inputs": Case(TwoInputs, ((3, 8, 8), (5,)), ("image", "vector"), layers=2),
    "keyword inputs in another order": Case(TwoInputs, ((5,), (3, 8, 8)), ("vector", "image"), layers=2),
    "default arguments": Case(Defaults),
    "*args": Case(VarArgs, ((3, 8, 8), (5,)), layers=2),
    "one input and *args": Case(OneThenVarArgs, ((3, 8, 8), (5,)), layers=2),
    "nested outputs": Case(Outputs, layers=2),
    "dropouts": Case(Dropouts, layers=2),
    "no_grad inside": Case(NoGrad, layers=2),
    "batch sizes": Case(Sizes, layers=3),
    "bias from the input": Case(BiasFromInput, layers=2, left=1),
    "layer on made numbers": Case(
        lambda: Lambda(
            lambda self, x: self.conv(x) + self.places(torch.arange(8.0, device=x.device)[None, :, None]).sum(),
            conv=conv(),
            places=nn.Linear(1, 2),
        )
    ),
    "dense": Case(Dense, layers=10, left=4),
    "u-net": Case(UNet, layers=13),
    "conv, bn, conv, conv, two bns": Case(
        lambda: nn.Sequential(
            conv(padding=1), nn.BatchNorm2d(6), conv(6, 6), conv(6, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        ),
        layers=3,
    ),
    "frozen bn": Case(lambda: nn.Sequential(conv(bias=False), Frozen(6), nn.ReLU(), conv(6, 2), Frozen(2)), layers=2),
    "layer scale": Case(
        lambda: Lambda(
            lambda self, x: x + self.gain * self.second(self.first(x).relu()),
            first=nn.Linear(5, 6),
            second=nn.Linear(6, 5),
            gain=nn.Parameter(torch.randn(5)),
        ),
        ((4, 5),),
        layers=2,
    ),
    "orthogonal": Case(lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(5, 6))), ((5,),)),
    "written everywhere": Case(lambda: Lambda(_written_everywhere, conv=conv(3, 4), head=conv(4, 2, 1)), layers=2),
    "several scales": Case(lambda: Lambda(_several_scales, conv=conv(3, 3, padding=1), head=conv(3, 2, 1)), layers=6),
    "numbers and choices": Case(lambda: Lambda(_kept, conv=conv(), head=conv(6, 2, 1)), layers=2),
    "half inside": Case(lambda: Lambda(_half_inside, conv=conv(), head=conv(6, 2, 1)), layers=2),
    "double": Case(
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 2)).double(),
        layers=2,
        draw=lambda count, generator: (torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64),),
    ),
    "products": Case(
        lambda: Lambda(
            _product,
            first=nn.Parameter(torch.randn(5, 6)),
            second=nn.Parameter(torch.randn(6, 3)),
            bias=nn.Parameter(torch.randn(3)),
        ),
        ((4, 5),),
        layers=2,
    ),
    "bilinear": Case(lambda: Lambda(_bilinear, pairs=nn.Bilinear(5, 5, 4), head=nn.Linear(4, 3)), ((5,),)),
    "one number each": Case(
        lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4), nn.Tanh()),
        draw=lambda count, generator: (torch.rand(count, generator=generator),),
    ),
    "tokens": tokens(lambda: nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))),
    "embedding bag": tokens(lambda: nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 4))),
    "largest of a bag": tokens(lambda: nn.Sequential(nn.EmbeddingBag(20, 8, mode="max"), nn.Linear(8, 4))),
    "tokens and a mask": Case(Embedded, layers=2, draw=_draw_words),
    "lstm": Case(lambda: Recurrent(nn.LSTM), ((4, 5),), layers=2),
    "gru": Case(lambda: Recurrent(nn.GRU), ((4, 5),), layers=2),
    "rnn": Case(lambda: Recurrent(nn.RNN), ((4, 5),), layers=2),
    "rnn with relu": Case(lambda: Recurrent(nn.RNN, nonlinearity="relu"), ((4, 5),), layers=2),
    "lstm both ways": Case(lambda: Recurrent(nn.LSTM, bidirectional=True), ((4, 5),), layers=2),
    "lstm with time first": Case(lambda: Recurrent(nn.LSTM, time_first=True), ((4, 5),), layers=2),
    "states of an lstm": Case(States, ((4, 5),), layers=2),
    "lstm cells": Case(lambda: Cells(nn.LSTMCell), ((4, 5),)),
    "gru cells": Case(lambda: Cells(nn.GRUCell), ((4, 5),)),
    "rnn cells": Case(lambda: Cells(nn.RNNCell), ((4, 5),)),
    "recurrence by hand": Case(Elman, ((4, 5),), layers=9),
    "sound": Case(Waves, ((1, 32),), layers=4),
    "spectrogram": Case(Spectrogram, ((64,),), layers=3),
    "video": Case(
        lambda: nn.Sequential(
            nn.Conv3d(3, 4, (1, 3, 3)),
            nn.ReLU(),
            nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)),
            nn.BatchNorm3d(4),
            nn.MaxPool3d(2),
            nn.Conv3d(4, 2, 1),
        ),
        ((3, 4, 8, 8),),
        layers=3,
    ),
    "clips": Case(Clips, layers=2, together=4),
    "pairs": Case(Pairs, layers=2, together=2),
    "chosen rows": Case(
        ChosenRows,
        layers=3,
        draw=lambda n, generator: (
            torch.randn(n, 4, 5, generator=generator),
            torch.rand(n, 4, generator=generator) > 0.5,
        ),
    ),
    "channel shuffle": Case(Shuffle, layers=4),
    "nn.ChannelShuffle": Case(lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 2)), layers=2),
    "pixel shuffle": Case(lambda: nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 4)), layers=2),
    "squeeze and excitation": Case(Excited, layers=4),
    "skip around a concat": Case(SkipAroundConcat, layers=4),
    "dict in": nested(lambda image, vector: {"image": image, "vector": vector}),
    "tuple in": nested(lambda *both: both),
    "list in": nested(lambda *both: list(both)),
    "dataclass in": nested(Both),
    "named tuple out": Case(lambda: Returning(Logits), layers=2),
    "dataclass out": Case(lambda: Returning(Maps), layers=2),
    "ordered dict out": Case(
        lambda: Returning(lambda logits, features: OrderedDict(logits=logits, features=features)), layers=2
    ),
}


@cache
def captured(name: str) -> fx.GraphModule:
    """The case's captured network; passes copy it, so that tests may share it."""
    return capture(CASES[name].net(), CASES[name].samples(2))


def call(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as a function of the network's own arguments."""
    interface = interface_of(gm)
    return lambda *args, **kwargs: interface.unflatten(gm(*interface.flatten(args, kwargs)))


def placed(gm: fx.GraphModule, recipe: Recipe) -> fx.GraphModule:
    """Fold the captured network and put fake-quantizers into it."""
    folded, _ = fold(gm)
    return insert(folded, annotate(folded, BACKENDS[recipe.backend], recipe))


def quantized(gm: fx.GraphModule, samples: Samples, recipe: Recipe) -> fx.GraphModule:
    """Fold, place and calibrate the captured network: nearest rounding."""
    return calibrate(placed(gm, recipe), samples, recipe)


def nearest(**settings: Any) -> Recipe:
    return Recipe.preset("nearest", **settings)


def outputs(network: Callable[..., Any], samples: Samples) -> list[Tensor]:
    return outputs_of(network, samples, 64)


def relative_error(outputs: list[Tensor], reference: list[Tensor]) -> float:
    """The largest ‖y − ŷ‖ / ‖y‖ of all outputs."""
    pairs = [(o.double(), r.double()) for o, r in zip(outputs, reference, strict=True)]
    return max(((o - r).norm() / r.norm()).item() for o, r in pairs)
