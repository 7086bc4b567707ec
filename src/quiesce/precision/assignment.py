"""Mixed precision: bits for every layer, with the least sum of errors that a budget allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape

from quiesce.errors import RecipeError
from quiesce.precision.sensitivity import LayerSensitivity, Sensitivity
from quiesce.recipe import LayerOverride, Recipe

FLOAT_BITS = 32
"""Bits of a float input, where bit operations are counted."""
_LARGEST = 1e6
"""What the largest error is scaled to for the solver, whose tolerances are absolute and about 1e-6."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the weights may cost: exactly one of the three.

    Raises:
        RecipeError: none or several are given, or one is not above 0.
    """

    average_bits: float | None = None
    """Mean number of bits of a weight, over the layers whose bits are chosen."""
    size: float | None = None
    """Bytes of the integers of all quantized weights."""
    bops: float | None = None
    """Bit operations for one image: Σ multiplications × bits of the weight × bits of the input (32 for a float one)."""

    def __post_init__(self) -> None:
        given = [v for v in (self.average_bits, self.size, self.bops) if v is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise RecipeError("a budget is one of average_bits, size and bops, and a number above 0; give one such.")

    def cost(self, row: LayerSensitivity, bits: int, chosen: bool) -> int:
        """Return what ``row`` costs at ``bits``; ``chosen`` says whether its bits are chosen."""
        if self.average_bits is not None:
            return row.weights * bits * chosen
        if self.size is not None:
            return -(-row.weights * bits // 8)
        return row.macs * bits * (row.input_bits or FLOAT_BITS)

    def limit(self, weights: int) -> float:
        """Return what all layers may cost; ``weights`` are those of the layers whose bits are chosen."""
        return next(v for v in (self.bops, self.size, (self.average_bits or 0) * weights) if v is not None)

    def show(self, cost: float, weights: int) -> str:
        """Write a cost as the budget is given."""
        if self.average_bits is not None:
            return f"{cost / weights:.4g} bits a weight"
        return f"{cost:,.0f} {'bytes' if self.size is not None else 'bit operations'}"


@dataclass(frozen=True)
class MixedPrecision:
    """Bits that were chosen for each layer."""

    recipe: Recipe
    """With an override for each layer, so that it says all by itself; its name ends in "mixed bits"."""
    bits: dict[str, int]
    """Of the weight of every quantized layer, in network order."""
    error: float
    """Sum of the layers' errors, each alone; what was minimized."""
    cost: str
    """What the weights cost with these bits, as the budget was given."""
    sensitivity: Sensitivity


def mixed_precision(
    recipe: Recipe, sensitivity: Sensitivity, free: Sequence[str], budget: Budget, bits: Sequence[int]
) -> MixedPrecision:
    """Return :func:`choose`'s bits, and ``recipe`` with an override for each layer behind those that it has.

    Raises:
        RecipeError: as :func:`choose`.
    """
    chosen = choose(sensitivity, free, budget, bits)
    rows = {row.layer: row for row in sensitivity.layers}
    overrides = [
        LayerOverride(pattern=escape(shared), weight_bits=b)
        for name, b in chosen.items()
        for shared in (name, *rows[name].shared_with)
    ]
    cost = sum(budget.cost(rows[name], b, name in free) for name, b in chosen.items())
    return MixedPrecision(
        recipe=replace(recipe, name=f"{recipe.name}, mixed bits", layers=(*recipe.layers, *overrides)),
        bits=chosen,
        error=sum(rows[name].weight_errors[b] for name, b in chosen.items()),
        cost=budget.show(cost, sum(row.weights for row in sensitivity.layers if row.layer in free)),
        sensitivity=sensitivity,
    )


def choose(sensitivity: Sensitivity, free: Sequence[str], budget: Budget, bits: Sequence[int]) -> dict[str, int]:
    """Return the bits of every layer: of ``free`` ones by :func:`assign_bits`, of all others those that they have.

    Raises:
        RecipeError: there is nothing to choose, or the budget is below what the fewest bits cost.
    """
    if not free:
        raise RecipeError("the bits of every quantized layer are given already, so there are none to choose.")
    rows = sensitivity.layers
    choices = [{b: row.weight_errors[b] for b in (bits if row.layer in free else [row.weight_bits])} for row in rows]
    costs = [
        {b: budget.cost(row, b, row.layer in free) for b in errors} for row, errors in zip(rows, choices, strict=True)
    ]
    weights = sum(row.weights for row in rows if row.layer in free)
    least, limit = sum(min(c.values()) for c in costs), budget.limit(weights)
    if least > limit:
        raise RecipeError(
            f"the budget of {budget.show(limit, weights)} is too small: {min(bits)} bits for each of {len(free)} "
            f"layers, and what the others have, take {budget.show(least, weights)}; give at least that."
        )
    chosen = assign_bits(choices, costs, math.floor(limit))
    return {row.layer: b for row, b in zip(rows, chosen, strict=True)}


def assign_bits(errors: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, int]], budget: int) -> list[int]:
    """Return one key of each layer's ``errors`` with the least sum of errors whose ``costs`` sum to ``budget`` or less.

    min Σ_l Σ_b e_lb x_lb subject to Σ_b x_lb = 1 for each layer l and Σ_l Σ_b c_lb x_lb ≤ budget, x binary: a
    multiple-choice knapsack, solved by HiGHS (scipy). Costs count as exact integers.

    Raises:
        ValueError: there is no such choice.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    places = [(layer, b) for layer, choices in enumerate(errors) for b in choices]
    least = [min(c.values()) for c in costs]
    # Above each layer's least cost, in units of what all of them share: as small numbers as there are.
    extra = [costs[layer][b] - least[layer] for layer, b in places]
    unit = math.gcd(*extra) or 1
    room = (budget - sum(least)) // unit
    if room < 0:
        raise ValueError(f"a budget of {budget} is below the least cost, {sum(least)}")
    largest = max(max(e.values()) for e in errors) or 1.0
    scaled = [errors[layer][b] / largest * _LARGEST for layer, b in places]
    one_each = np.array([[float(layer == row) for layer, _ in places] for row in range(len(errors))])
    # From 0 to 1, and half a unit of room: HiGHS has absolute tolerances, and complains of others on stdout.
    most = max(extra) // unit or 1
    costs_row = np.array([[e // unit / most for e in extra]])
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(costs_row, -np.inf, (room + 0.5) / most)]
    while True:
        solved = milp(
            scaled,
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        assert solved.x is not None, solved.message
        taken = solved.x > 0.5
        chosen = [place for place, x in zip(places, taken, strict=True) if x]
        if sum(costs[layer][b] for layer, b in chosen) <= budget:
            return [b for _, b in chosen]
        # The solver computes in floats, and may exceed a large budget by a hair: anything but this choice.
        constraints.append(LinearConstraint(taken.astype(float)[None], -np.inf, len(errors) - 1))
