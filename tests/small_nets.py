"""Small networks, each with one thing that graph passes get wrong easily, the inputs they take, and short cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

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

    def net(self) -> nn.Module:
        torch.manual_seed(7)
        return trained(self.make())

    def samples(self, count: int, seed: int = 1) -> Samples:
        generator = torch.Generator().manual_seed(seed)
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
    "dense": Case(Dense, layers=10, left=4),
    "u-net": Case(UNet, layers=13),
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
    return max(((o - r).norm() / r.norm()).item() for o, r in zip(outputs, reference, strict=True))
