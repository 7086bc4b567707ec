"""Networks by name: from timm, torchvision, the user's own code, or a saved ``torch.export`` program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quiesce import preprocess
from quiesce.detection import Core
from quiesce.dotted import DOTTED, call_dotted
from quiesce.errors import FileFormatError, ModelError, nearest_name
from quiesce.preprocess import Preprocessing
from quiesce.weights import read_state

RANDOM = "random"
_SHOWN = 3


@dataclass(frozen=True)
class LoadedModel:
    """A network and what its source says about its input."""

    model: nn.Module | torch.export.ExportedProgram
    name: str
    preprocessing: Preprocessing | None
    """None when the source has none."""
    input_shape: tuple[int, ...] | None
    """Shape of one input without the batch dimension, (C, H, W) for images; None when unknown."""


def load_model(
    spec: str, *, weights: str | Path | None = None, by_order: bool = False, trust: bool = False
) -> LoadedModel:
    """Load the network that ``spec`` names.

    - ``timm:NAME`` and ``torchvision:NAME``, with the library's pretrained weights. A tag after a dot picks other ones:
      ``timm:resnet50.a1_in1k``, ``torchvision:resnet50.IMAGENET1K_V1``. torchvision's are networks for classification,
      segmentation, and the networks in detectors (:class:`quiesce.detection.Core`).
    - ``module.path:callable``, which is called without arguments and returns an ``nn.Module``. This runs code.
    - ``FILE.pt2``, a saved ``torch.export`` program. Reading one can run code, so it needs ``trust``.

    ``weights`` is a file to take the parameters from (``.safetensors``, or a state dict saved by ``torch.save``), or
    ``"random"`` for the library's initialization with seed 0. ``by_order`` assigns the file's tensors in their order,
    whatever their names, when all shapes fit.

    Raises:
        ModelError: the network is not there, can't be built, its weights can't be downloaded or do not fit.
        FileFormatError: a file is damaged or of another kind.
    """
    source, _, name = spec.partition(":")
    if by_order and weights in (None, RANDOM):
        raise ModelError("weights can be assigned by order only from a file; give one by --weights.")
    if spec.endswith(".pt2"):
        return _load_program(Path(spec), weights, trust)
    if source in _LIBRARIES and name:
        loaded = _LIBRARIES[source](name, weights)
    elif DOTTED.fullmatch(spec):
        loaded = _load_callable(spec, weights)
    else:
        raise ModelError(f"model {spec!r} is none of timm:NAME, torchvision:NAME, module.path:callable, or FILE.pt2.")
    if weights not in (None, RANDOM):
        assert isinstance(loaded.model, nn.Module) and weights is not None
        load_weights(loaded.model, Path(weights), by_order=by_order)
    return loaded


def load_weights(model: nn.Module, path: Path, *, by_order: bool = False) -> None:
    """Copy the tensors of ``path`` into ``model``: by name, or by their order if ``by_order``.

    Raises:
        ModelError: the file does not fit; the message names the first keys and counts them.
        FileFormatError: the file can't be read, or is not a state dict.
    """
    given, expected = _read_state(path), model.state_dict()
    if by_order:
        given = _renamed(given, expected, path)
    given, expected = _without_batch_counts(given), _without_batch_counts(expected)
    problems = _misfits(given, expected)
    if problems:
        hint = "" if by_order else "; if only the names differ, give --weights-by-order"
        raise ModelError(f"{path} does not fit the network: {'; '.join(problems)}{hint}.")
    model.load_state_dict(given, strict=False)


def _without_batch_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out how many batches a batch-norm layer has seen: it matters in training only, and old files lack it."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _renamed(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    if len(given) != len(expected):
        given, expected = _without_batch_counts(given), _without_batch_counts(expected)
    if len(given) != len(expected):
        raise ModelError(f"{path} has {len(given)} tensors and the network {len(expected)}; they can't go by order.")
    return dict(zip(expected, given.values(), strict=True))


def _misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    shapes = [
        f"{key} ({list(given[key].shape)} in the file, {list(expected[key].shape)} in the network)"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    found = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": shapes,
    }
    return [f"{len(keys)} {problem} ({_first(keys)})" for problem, keys in found.items() if keys]


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"weight file {path} is not there; give a .safetensors, .pt or .pth file that exists.")
    return read_state(path)


def _load_timm(name: str, weights: str | Path | None) -> LoadedModel:
    try:
        import timm
    except ImportError as error:
        raise _not_installed("timm") from error
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}.{nearest_name(name, timm.list_models())}")
    _, _, tag = name.partition(".")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(name.partition(".")[0] + ".*")]
    if tag and tag not in tags:
        raise ModelError(f"timm model {name!r} has an unknown tag.{nearest_name(tag, tags)}")
    model = _build(f"timm:{name}", weights, lambda: timm.create_model(name, pretrained=weights is None))
    config: Any = model.pretrained_cfg
    size = (config or {}).get("input_size")
    return LoadedModel(model, f"timm:{name}", preprocess.from_timm(model), tuple(size) if size else None)


def _load_torchvision(name: str, weights: str | Path | None) -> LoadedModel:
    try:
        from torchvision import models
    except ImportError as error:
        raise _not_installed("torchvision") from error
    architecture, _, tag = name.partition(".")
    dense = [n for room in (models.segmentation, models.detection) for n in models.list_models(module=room)]
    known = [*models.list_models(module=models), *dense]
    if architecture not in known:
        raise ModelError(f"torchvision has no image model {name!r}.{nearest_name(architecture, known)}")
    entries = models.get_model_weights(architecture)
    if tag and tag not in entries.__members__:
        raise ModelError(f"torchvision model {name!r} has an unknown tag.{nearest_name(tag, entries.__members__)}")
    entry = entries[tag or "DEFAULT"]
    pretrained = entry if weights is None else None
    # Weights of the whole network, or none: never those of the backbone alone.
    settings: dict[str, Any] = {"weights_backbone": None} if architecture in dense else {}
    model = _build(
        f"torchvision:{name}", weights, lambda: models.get_model(architecture, weights=pretrained, **settings)
    )
    detects = architecture in models.list_models(module=models.detection)
    preprocessing = preprocess.from_detector(model) if detects else preprocess.from_torchvision(entry)
    model = Core(model) if detects else model
    shape = None if preprocessing is None else (preprocessing.channels, *preprocessing.crop)
    return LoadedModel(model, f"torchvision:{name}", preprocessing, shape)


_LIBRARIES: dict[str, Callable[[str, str | Path | None], LoadedModel]] = {
    "timm": _load_timm,
    "torchvision": _load_torchvision,
}


def _build(spec: str, weights: str | Path | None, create: Callable[[], Any]) -> nn.Module:
    """Call ``create``, which downloads weights when ``weights`` is None; initialization is seeded."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = create()
    except Exception as error:
        if weights is None:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ModelError(
                f"the pretrained weights of {spec} can't be had ({reason}); check the network connection, or give them "
                "by --weights FILE (--weights random for none)."
            ) from error
        raise ModelError(f"{spec} can't be built ({type(error).__name__}: {error}).") from error
    return model.eval()


def _load_callable(spec: str, weights: str | Path | None) -> LoadedModel:
    if weights == RANDOM:
        raise ModelError(f"--weights random is for timm: and torchvision: models; {spec!r} makes its own weights.")
    model = call_dotted(spec, ModelError)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec!r} returned {type(model).__name__}, not a torch.nn.Module; return the network.")
    return LoadedModel(model, spec, None, None)


def _load_program(path: Path, weights: str | Path | None, trust: bool) -> LoadedModel:
    if not trust:
        raise ModelError(f"reading {path} can run code that is stored in it; if you trust its origin, add --trust.")
    if weights is not None:
        raise ModelError(f"{path} holds its own weights; leave --weights out.")
    if not path.is_file():
        raise ModelError(f"model {path} is not there; give a file that torch.export.save has written.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FileFormatError(
            f"{path} can't be read by torch.export.load ({reason}); save the program again."
        ) from error
    example: Any = program.example_inputs or ((), {})
    args, kwargs = example
    only = args[0] if len(args) == 1 and not kwargs else None
    return LoadedModel(program, path.name, None, tuple(only.shape[1:]) if isinstance(only, Tensor) else None)


def _not_installed(library: str) -> ModelError:
    return ModelError(f"{library} is not installed; install it with: pip install quiesce[models]")
