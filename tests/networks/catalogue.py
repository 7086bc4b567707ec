"""The networks of catalogue.toml: one of each family, with random weights and statistics that are not trivial."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quiesce.data import Samples
from quiesce.models import load_model
from random_weights import randomized, with_statistics
from tiny import images

CLASSES = 10


@dataclass(frozen=True)
class Entry:
    """A network and what is known of it beforehand."""

    family: str
    model_name: str
    """``library:name``."""
    size: int
    """Of its square images, in pixels."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the library's function."""
    quick: bool = False
    """True for those of every test run."""
    note: str = ""
    """What differs from the library's network, and why."""
    float_error: float = 3e-4
    """Largest relative error of the captured and folded float network: float32 sums in another order."""
    large_unit: str = ""
    """Why one unit has to hold more than its share of the weight layers; "" if none does."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Layers (shell patterns) that are not quantized, and why."""
    no_gradient: dict[str, str] = field(default_factory=dict)
    """Fake-quantizers (shell patterns) that get no gradient, and why."""

    @property
    def library(self) -> str:
        return self.model_name.partition(":")[0]

    @property
    def name(self) -> str:
        """Unique, and good for a file."""
        return f"{self.library}-{self.family}"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = MAKERS[self.library](self.model_name.partition(":")[2], self.options)
        return with_statistics(randomized(model), self.samples(16, seed=3))

    def samples(self, count: int, seed: int) -> Samples:
        pixels = images(count, seed=seed, size=self.size)
        return Samples((), {"pixel_values": pixels}) if self.library == "transformers" else Samples((pixels,))


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
    return model


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES, **options)
    return model


def _dense(name: str, options: dict[str, Any]) -> nn.Module:
    """A network of torchvision for segmentation, or the one in a detector of torchvision."""
    loaded = load_model(f"torchvision:{name}", weights="random")
    assert isinstance(loaded.model, nn.Module)
    return loaded.model


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**options))
    return model


MAKERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "dense": _dense,
    "transformers": _transformers,
}


def read_catalogue() -> list[Entry]:
    data = tomllib.loads((Path(__file__).parent / "catalogue.toml").read_text(encoding="utf-8"))
    return [Entry(model_name=entry.pop("model"), **entry) for entry in data["network"]]
