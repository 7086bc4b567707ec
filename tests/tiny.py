"""Networks of a few thousand weights, and what tests of several rooms need around them."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

import torch
from torch import Tensor, nn

from quiesce.graph.capture import interface_of
from quiesce.memory import Memory
from quiesce.oscillation.measure import ModuleLoss
from quiesce.pipeline import regularizer_weight
from quiesce.preparation import Prepared
from quiesce.recipe import Recipe
from quiesce.reconstruct.loop import Job
from quiesce.reconstruct.streams import Network
from quiesce.result import MemoryRecord, Result, Run

DURATIONS = ("seconds", "block_seconds", "reused_seconds", "measuring_seconds")


class Residual(nn.Module):
    """conv-bn-relu-conv-bn with a skip connection, which strides or widens when asked."""

    def __init__(self, channels: int, out: int | None = None, stride: int = 1) -> None:
        super().__init__()
        out = channels if out is None else out
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if (stride, out) == (1, channels) else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Chain(nn.Module):
    """stem → ``depth`` residual blocks → linear head on the mean: logits [N, 10] of images [N, 3, 8, 8]."""

    def __init__(self, depth: int = 4, channels: int = 8, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, channels, 3, padding=1)
            self.blocks = nn.Sequential(*[Residual(channels) for _ in range(depth)])
            self.head = nn.Linear(channels, 10)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_var, 0.5, 2.0)
                    nn.init.uniform_(module.running_mean, -0.5, 0.5)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))
        return logits


class Squeeze(nn.Module):
    """Squeeze-and-excitation: scales channels by what two 1 × 1 convolutions make of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Assorted(nn.Module):
    """A stem, two residual blocks, squeeze-and-excitation behind each, a convolution whose weight a linear layer makes
    from the input, and a head: logits [N, 5] of images [N, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.Sequential(Residual(8), Squeeze(8), Residual(8), Squeeze(8))
            self.make, self.head = nn.Linear(8, 8 * 9), nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(torch.relu(self.stem(x)))
        weight = self.make(y.mean((0, 2, 3))).view(8, 1, 3, 3)
        y = y + torch.relu(nn.functional.conv2d(y, weight, padding=1, groups=8))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class TiedPair(nn.Module):
    """A stem, two convolutions of two modules with one weight, a third of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.stem, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.second, self.third = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 5)
        self.second.weight = self.first.weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(torch.relu(self.stem(x)))))
        logits: Tensor = self.head(torch.relu(self.third(torch.relu(y))).mean((2, 3)))
        return logits


def images(count: int = 32, seed: int = 1, size: int = 8, channels: int = 3) -> Tensor:
    """Random images [count, channels, size, size]."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def recipe(preset: str = "qdrop-fast", **settings: object) -> Recipe:
    """A preset at W2A4 with a batch of 8 and few steps and min-max ranges, unless ``settings`` differ."""
    small: dict[str, object] = {"weight_bits": 2, "activation_bits": 4}
    small |= {"weight_range": "minmax", "activation_range": "minmax"}  # the range search takes most of the time here
    if preset != "nearest":
        small |= {"steps": 4, "batch_size": 8}
    return Recipe.preset(preset, **{**small, **settings})


def job(prepared: Prepared, settings: Recipe, memory: Memory | None = None) -> Job:
    """What passes over ``prepared`` share; streams are kept in ``memory``, with no limit by default."""
    network = Network(prepared.graph, memory)
    flat = interface_of(prepared.graph).flatten(prepared.samples.args, prepared.samples.kwargs)
    return Job(
        network=network,
        modules=prepared.modules,
        inputs=dict(zip(network.inputs, flat, strict=True)),
        images=prepared.images,
        together=prepared.together,
        initial=prepared.initial,
        recipe=settings,
        reconstruction=settings.reconstruction,  # type: ignore[arg-type]
        regularizer_weight=regularizer_weight(prepared.graph, settings),
    )


def run_examples(page: str, section: str) -> None:
    """Run the Python examples of a page's section one after the other, each on its own."""
    text = (Path(__file__).parents[1] / page).read_text(encoding="utf-8")
    blocks = re.findall(
        r"^ *```python\n(.*?)^ *```", text.split(f"\n## {section}\n")[1].split("\n## ")[0], re.MULTILINE | re.DOTALL
    )
    assert blocks, f"{page} has no example in {section}"
    for block in blocks:
        exec(compile(textwrap.dedent(block), page, "exec"), {})


def absolute(losses: list[ModuleLoss]) -> list[float]:
    return [loss.absolute for loss in losses]


def same_state(first: dict[str, Tensor], second: dict[str, Tensor], *prefixes: str) -> bool:
    """True when both snapshots hold equal tensors (of quantizers whose names start with one of ``prefixes``)."""
    names = [n for n in first if not prefixes or n.startswith(prefixes)]
    assert names and first.keys() == second.keys()
    return all(torch.equal(first[n], second[n]) for n in names)


def without_times(result: Result) -> Result:
    """The result without durations and memory, and with no word of interruptions, to compare two runs."""
    runs = []
    for run in result.runs:
        records = [dataclasses.replace(r, seconds=0.0, resumed=False) for r in run.unit_records]
        runs.append(
            dataclasses.replace(run, unit_records=records, memory=MemoryRecord(), **dict.fromkeys(DURATIONS, 0.0))
        )
    return dataclasses.replace(result, runs=runs)


def example_result() -> Result:
    """Return a result of two runs, as small as it can be."""
    runs = [
        Run(preset="nearest", granularity=None, weight_bits=2, activation_bits=None, seed=3),
        Run(
            preset="qdrop",
            granularity="loss",
            weight_bits=2,
            activation_bits=4,
            seed=3,
            top1=71.256,
            agreement=80.0,
            sqnr_db=12.34,
            seconds=61.2,
            units=[["a", "b"], ["c"]],
            module_losses={"a": 0.1},
            peak_loss=0.123456,
            oscillation=0.5,
        ),
    ]
    return Result(model="net", float={"top1": None}, runs=runs, recipe={}, versions={}, hardware={})
