"""What can be said of a network without optimizing it: its capacities, its sensitivities, and the bits these imply."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.export import ExportedProgram

from quiesce.data import Samples, gather
from quiesce.errors import DataError, RecipeError
from quiesce.export.export import require
from quiesce.graph.attention import split_attention
from quiesce.graph.backends import BACKENDS
from quiesce.graph.fold import fold
from quiesce.graph.partition import partition
from quiesce.graph.place import annotate, insert, layers_at_common_bits
from quiesce.oscillation.capacity import modcap
from quiesce.precision.assignment import Budget, MixedPrecision, mixed_precision
from quiesce.precision.sensitivity import Sensitivity, layer_sensitivities
from quiesce.preparation import Prepared, capture_on, check_together, inputs_of, left_float, model_device, prepare
from quiesce.progress import Progress, ProgressCallback
from quiesce.recipe import BACKENDS as BACKEND_DEMANDS
from quiesce.recipe import GranularityRecipe, Recipe, check_bits
from quiesce.reconstruct.granular import propose
from quiesce.reconstruct.streams import Network


@dataclass(frozen=True)
class Analysis:
    """What the network's structure says before any optimization."""

    modules: list[str]
    capacities: dict[str, float]
    differentials: list[float]
    merges: list[list[str]]
    layers: dict[str, list[str]]
    """Module → its weight layers."""
    float_layers: dict[str, str]
    """Layers with weights that stay float, with the reason of each."""


def analyze(model: nn.Module | ExportedProgram, example: Samples, recipe: Recipe) -> Analysis:
    """Return blocks, data-free capacities, differentials, and the merges they imply. Takes seconds.

    A recipe with a data-dependent granularity is analyzed by ``modcap``, with its other settings.
    """
    settings = recipe.granularity or GranularityRecipe()
    if settings.method != "scheme":
        settings = GranularityRecipe(
            method="modcap", k=settings.k, lam=settings.lam, alpha=settings.alpha, max_modules=settings.max_modules
        )
    folded, _ = fold(capture_on(model, example, model_device(model)))
    folded = split_attention(folded)
    graph = insert(folded, annotate(folded, BACKENDS[recipe.backend], recipe))
    units = partition(graph, "block")
    names = [u.name for u in units]
    capacities = modcap(graph, units, settings.alpha)
    proposal = propose(names, settings, capacities)
    return Analysis(
        modules=names,
        capacities=dict(zip(names, capacities, strict=True)),
        differentials=proposal.differentials,
        merges=[[names[i] for i in group] for group in proposal.groups if len(group) > 1],
        layers={u.name: list(u.layers) for u in units},
        float_layers=left_float(folded, recipe),
    )


def measure_sensitivity(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    bits: Collection[int] = (2, 4, 8),
    holdout: float = 0.25,
    device: torch.device | str | None = None,
    progress: ProgressCallback | None = None,
) -> Sensitivity:
    """Measure how much error quantizing each weight layer alone, to nearest, causes at the network's outputs.

    Args:
        model: as for :func:`quiesce.quantize`.
        calibration: likewise. The last ``holdout`` of the images, a share, are what errors are measured on; ranges are
            taken from the others.
        recipe: what is quantized to how many bits; its reconstruction has no part in it.
        bits: 2 to 8; the weight alone is measured at each of them, besides at the bits that the recipe gives it.
        device: as for :func:`quiesce.quantize`.
        progress: called as ``progress(layer, trials_done, trials_planned)``.

    Raises:
        QuiesceError: one sentence on what is wrong with the model, the data or the settings.
    """
    return _sensitivity(model, calibration, recipe, bits, holdout, device, progress)[1]


def choose_bits(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    *,
    average_bits: float | None = None,
    size: float | None = None,
    bops: float | None = None,
    bits: Collection[int] = tuple(range(2, 9)),
    holdout: float = 0.25,
    device: torch.device | str | None = None,
    progress: ProgressCallback | None = None,
) -> MixedPrecision:
    """Choose the weight bits of each layer from its sensitivity: least error within a budget, exactly.

    The first and the last layer, and those with ``weight_bits`` in an override of ``recipe``, keep their bits. The
    recipe that is returned has an override for every quantized layer: :func:`quiesce.quantize` takes it as any other.

    Args:
        model: as for :func:`measure_sensitivity`, and so are ``calibration``, ``recipe``, ``holdout``, ``device``,
            ``progress``.
        average_bits: the budget as the mean number of bits of a weight, over the layers whose bits are chosen; or
        size: as bytes of the integers of all quantized weights; or
        bops: as bit operations for one image (:class:`~quiesce.precision.assignment.Budget`). One of the three.
        bits: to choose from, 2 to 8.

    Raises:
        RecipeError: there is nothing to choose, or the budget is below what the fewest bits cost.
        ModelError: scipy is not installed.
        QuiesceError: as for :func:`measure_sensitivity`.
    """
    require(("scipy",), "mixed")
    budget = Budget(average_bits=average_bits, size=size, bops=bops)
    if "weights.bits" in BACKEND_DEMANDS[recipe.backend]:
        raise RecipeError(f"backend {recipe.backend!r} demands one number of bits, so there are none to choose.")
    choices = sorted(set(bits))
    prepared, sensitivity = _sensitivity(model, calibration, recipe, choices, holdout, device, progress)
    free = layers_at_common_bits(prepared.graph, recipe)
    return mixed_precision(recipe, sensitivity, free, budget, choices)


def _sensitivity(
    model: nn.Module | ExportedProgram,
    calibration: object,
    recipe: Recipe,
    bits: Collection[int],
    holdout: float,
    device: torch.device | str | None,
    progress: ProgressCallback | None,
) -> tuple[Prepared, Sensitivity]:
    began = time.perf_counter()
    for number in bits:
        check_bits("the number of bits", number)
    samples = gather(calibration, "calibration")
    first = len(samples) - round(holdout * len(samples))
    if not 0 < first < len(samples):
        raise DataError(
            f"a share of {holdout} of {len(samples)} calibration images can't be held out and leave others; "
            "give more images or another share."
        )
    prepared = prepare(
        model, samples.select(slice(first)), replace(recipe, granularity=None, reconstruction=None), device=device
    )
    held = samples.select(slice(first, None))
    check_together(prepared.together, recipe, {"held-out images": len(held)})
    layers, passes = layer_sensitivities(
        prepared.graph, inputs_of(Network(prepared.graph), held), recipe, bits, Progress(progress)
    )
    seconds = time.perf_counter() - began
    return prepared, Sensitivity(layers, len(held), first, passes, seconds, prepared.float_layers)
