"""Results as a run would leave them, made up but of real shape."""

from __future__ import annotations

import copy
import math
import random
from itertools import pairwise

import pytest

from quiesce.recipe import Recipe
from quiesce.result import Result, Run, UnitRecord

# Losses of MobileNetV2's features.1 … features.13 under BRECQ, read off arXiv 2303.11906, Fig. 1.
CURVE = (1.0, 1.5, 7.0, 4.0, 5.1, 7.4, 5.2, 7.4, 8.1, 9.4, 7.3, 10.0, 14.5)


def curve(steps: int, start: float, end: float) -> list[list[float]]:
    points = range(steps // 20, steps + 1, steps // 20)
    return [[step, end + (start - end) * math.exp(-5 * step / steps)] for step in points]


def make_run(preset: str, granularity: str | None, names: list[str], top1: float, scale: float, merges=()) -> Run:
    """A run over ``names`` whose ``merges`` (lists of neighbours) became units."""
    chance = random.Random(f"{preset} {granularity}")
    losses = {
        name: scale * CURVE[i % len(CURVE)] * (1 + i // len(CURVE)) * chance.uniform(0.9, 1.1)
        for i, name in enumerate(names)
    }
    inside = {name for unit in merges for name in unit[1:]}
    heads = {unit[0]: list(unit) for unit in merges}
    units = [heads.get(name, [name]) for name in names if name not in inside]
    if granularity == "layer":
        units = [[f"{name}.conv.{j}"] for name in names for j in range(3)]
    values = list(losses.values())
    oscillation = sum((a - b) ** 2 for a, b in pairwise(values))
    scores = {}
    if granularity == "modcap":
        scores = {name: 2000.0 * 3 ** (i / 4) * chance.uniform(0.6, 1.6) for i, name in enumerate(names)}
    elif granularity == "loss":
        scores = losses
    return Run(
        preset=preset,
        granularity=granularity,
        weight_bits=2,
        activation_bits=4,
        seed=0,
        top1=top1,
        agreement=top1 * 1.05,
        sqnr_db=top1 / 5 - 2,
        seconds=1.2 if granularity is None else 41.7,
        units=[] if granularity is None else units,
        module_losses=losses,
        relative_losses={name: loss / (40 + 15 * (i % 4)) for i, (name, loss) in enumerate(losses.items())},
        peak_loss=max(values),
        final_loss=values[-1],
        oscillation=oscillation,
        relative_peak_loss=max(values) / 50,
        relative_final_loss=values[-1] / 50,
        relative_oscillation=oscillation / 2500,
        unit_records=[] if granularity is None else [record(unit, losses) for unit in units],
        capacities=scores,
        differentials=differentials(list(scores.values())),
    )


def differentials(scores: list[float]) -> list[float]:
    squares = [(a - b) ** 2 for a, b in pairwise(scores)]
    return [square / max(squares) for square in squares]


def record(unit: list[str], losses: dict[str, float]) -> UnitRecord:
    loss = losses.get(unit[-1], 1.0)
    steps = 400 * len(unit)
    return UnitRecord(modules=unit, steps=steps, seconds=2.1 * len(unit), loss_curve=curve(steps, 2.5 * loss, loss))


def make_result(count: int, model: str) -> Result:
    names = [f"features.{i}" for i in range(1, count + 1)]
    accepted, refused = [names[2], names[3]], [names[5], names[6]]
    runs = [
        make_run("nearest", None, names, 10.2, 400.0),
        make_run("adaround", "layer", names, 61.35, 2.4),
        make_run("brecq", "block", names, 85.1, 1.2),
        make_run("qdrop", "block", names, 87.45, 1.0),
        make_run("qdrop", "modcap", names, 87.6, 0.98, [[names[9], names[10], names[11]]]),
        make_run("qdrop", "loss", names, 88.2, 0.93, [accepted]),
    ]
    modcap, loss = runs[4], runs[5]
    modcap.proposed_merges = [[names[9], names[10], names[11]]]
    loss.proposed_merges = [accepted, refused]
    loss.guard = {
        "holdout": 128,
        "trials": [
            {"modules": accepted, "merged_error": 0.412, "unmerged_error": 0.455, "accepted": True},
            {"modules": refused, "merged_error": 0.521, "unmerged_error": 0.449, "accepted": False},
        ],
        "final": {"merged_error": 1.31, "block_error": 1.42},
        "kept": "merged",
    }
    for unit in loss.unit_records[:2]:
        unit.reused = True
    loss.reused_seconds = 4.2
    recipe = Recipe.preset("qdrop", weight_bits=2, granularity="loss", steps=400)
    return Result(
        model=model,
        float={"top1": 90.05},
        runs=runs,
        recipe=recipe.to_dict(),
        versions={"quiesce": "0.1.0", "python": "3.12.1", "torch": "2.15.0"},
        hardware={"device": "cpu", "machine": "x86_64", "threads": 2, "cpu": "Some Processor @ 2.00GHz"},
    )


@pytest.fixture(scope="session")
def finished() -> Result:
    """Six runs of a network of 13 modules; not to be changed."""
    return make_result(13, "demo: MobileNetV2 ×0.5")


@pytest.fixture
def result(finished: Result) -> Result:
    """The same, for a test to change."""
    return copy.deepcopy(finished)


@pytest.fixture
def long_result() -> Result:
    """The same six runs of a network of 60 modules."""
    return make_result(60, "timm:a_very_deep_network")
