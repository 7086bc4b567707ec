from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiesce.errors import RecipeError
from quiesce.precision.assignment import Budget, assign_bits, choose, mixed_precision
from quiesce.precision.sensitivity import LayerSensitivity, Sensitivity
from quiesce.recipe import LayerOverride, Recipe

pytest.importorskip("scipy")

Table = list[dict[int, Any]]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Table, Table, int]:
    """Errors, costs and a budget that the least costs keep; sizes like those of layers."""
    layers = draw(st.integers(1, 5))
    errors, costs = [], []
    for _ in range(layers):
        bits = draw(st.sets(st.integers(2, 8), min_size=1, max_size=4))
        weights = draw(st.integers(1, 50) | st.integers(1, 10**8))
        errors.append({b: draw(st.just(0.0) | st.floats(1e-8, 10.0)) for b in sorted(bits)})
        costs.append({b: weights * b for b in sorted(bits)})
    least, most = (sum(f(c.values()) for c in costs) for f in (min, max))
    return errors, costs, draw(st.integers(least, most + 1))


@given(instances())
def test_the_choice_is_the_best_of_all(instance: tuple[Table, Table, int]) -> None:
    errors, costs, budget = instance
    every = itertools.product(*errors)
    allowed = [c for c in every if sum(table[b] for table, b in zip(costs, c, strict=True)) <= budget]
    best = min(math.fsum(table[b] for table, b in zip(errors, c, strict=True)) for c in allowed)
    chosen = assign_bits(errors, costs, budget)
    assert tuple(chosen) in allowed
    largest = max(max(table.values()) for table in errors)
    assert math.fsum(table[b] for table, b in zip(errors, chosen, strict=True)) <= best + 1e-10 * largest


def test_a_budget_is_used_to_the_last_unit() -> None:
    errors, costs = [{2: 3.0, 4: 1.0}, {2: 2.0, 4: 1.0}], [{2: 2 * 10**9, 4: 4 * 10**9}, {2: 6, 4: 12}]
    assert assign_bits(errors, costs, 4 * 10**9 + 6) == [4, 2]
    assert assign_bits(errors, costs, 4 * 10**9 + 5) == [2, 4]
    assert assign_bits(errors, costs, 2 * 10**9 + 11) == [2, 2]
    with pytest.raises(ValueError, match="below the least cost, 2000000006"):
        assign_bits(errors, costs, 2 * 10**9 + 5)


def row(name: str, weights: int, macs: int, own: int, errors: dict[int, float], inputs: int | None) -> LayerSensitivity:
    return LayerSensitivity(
        name, (f"{name} too",) * (name == "wide"), weights, macs, own, inputs, errors[own], 0.0, errors
    )


ROWS = [
    row("first", 10, 1000, 8, {2: 9.0, 4: 1.0, 8: 0.1}, 8),
    row("wide", 100, 100, 4, {2: 0.4, 4: 0.1, 8: 0.01}, 4),
    row("deep[0]", 60, 600, 4, {2: 0.9, 4: 0.1, 8: 0.02}, None),
    row("last", 20, 20, 8, {2: 9.0, 4: 1.0, 8: 0.1}, 8),
]
FOUND = Sensitivity(ROWS, 8, 24, 1.0, 1.0, {})
FREE = ["wide", "deep[0]"]


@pytest.mark.parametrize(
    ("budget", "bits"),
    [
        (Budget(average_bits=2), (2, 2)),
        (Budget(average_bits=2.75), (2, 4)),
        (Budget(average_bits=3.3), (2, 4)),
        (Budget(average_bits=4), (4, 4)),
        (Budget(average_bits=3.9), (2, 4)),
        (Budget(average_bits=100), (8, 8)),
        # 10 + 20 bytes of the ends, 25 and 30 of 2 and 4 bits.
        (Budget(size=30 + 25 + 30), (2, 4)),
        (Budget(size=30 + 50 + 30 - 1), (2, 4)),
        (Budget(size=30 + 50 + 30), (4, 4)),
        # Inputs of 8, 4, 32 and 8 bits.
        (Budget(bops=8 * 8 * 1020 + 100 * 8 * 4 + 600 * 2 * 32), (8, 2)),
        (Budget(bops=8 * 8 * 1020 + 100 * 2 * 4 + 600 * 4 * 32), (2, 4)),
    ],
)
def test_budgets(budget: Budget, bits: tuple[int, int]) -> None:
    assert choose(FOUND, FREE, budget, (2, 4, 8)) == {"first": 8, "wide": bits[0], "deep[0]": bits[1], "last": 8}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(average_bits=1.5), "budget of 1.5 bits a weight .* 2 bits for each of 2 layers.* take 2 bits a weight"),
        (Budget(size=50), "budget of 50 bytes is too small.* take 70 bytes; give at least that"),
        (Budget(bops=10), "take 104,480 bit operations"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_the_least(budget: Budget, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose(FOUND, FREE, budget, (2, 4, 8))


def test_nothing_to_choose_is_refused() -> None:
    with pytest.raises(RecipeError, match="given already, so there are none to choose"):
        choose(FOUND, [], Budget(size=1e9), (2, 4))


@pytest.mark.parametrize(
    "budget", [{}, {"size": 3, "bops": 4}, {"average_bits": 0}, {"size": -1}, {"bops": math.inf}, {"size": math.nan}]
)
def test_a_budget_is_one_number_above_0(budget: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="a budget is one of average_bits, size and bops"):
        Budget(**budget)


def test_the_recipe_says_all_by_itself() -> None:
    earlier = LayerOverride(pattern="first", activation_bits=8)
    base = Recipe.preset("qdrop", weight_bits=3, layers=[earlier])
    made = mixed_precision(base, FOUND, FREE, Budget(average_bits=2.75), (2, 4, 8))
    assert made.recipe.layers == (
        earlier,
        LayerOverride(pattern="first", weight_bits=8),
        LayerOverride(pattern="wide", weight_bits=2),
        LayerOverride(pattern="wide too", weight_bits=2),
        LayerOverride(pattern="deep[[]0]", weight_bits=4),
        LayerOverride(pattern="last", weight_bits=8),
    )
    assert made.recipe.name == "qdrop, mixed bits" and made.recipe.weights == base.weights
    assert made.error == pytest.approx(0.1 + 0.4 + 0.1 + 0.1) and made.cost == "2.75 bits a weight"
