"""Granularity: which neighbouring modules are optimized jointly; pure functions of scores along their chain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

from quiesce.errors import RecipeError, nearest_name

Groups = list[list[int]]
"""Modules by index, grouped into units, in order; every module is in one group."""


def differentials(scores: Sequence[float], method: str) -> list[float]:
    """Return the differential of each pair of neighbours, divided by the largest.

    (CM_i − CM_{i+1})² (arXiv 2303.11906, eq. 11), or (log CM_i − log CM_{i+1})² for ``"log-ratio"``. They are divided
    by their maximum so that one λ fits networks of any size.
    """
    if method == "log-ratio":
        smallest = min((s for s in scores if s > 0), default=1.0)
        scores = [math.log(max(s, smallest)) for s in scores]
    squares = [(a - b) ** 2 for a, b in itertools.pairwise(scores)]
    largest = max(squares, default=0.0)
    return [s / largest for s in squares] if largest > 0 else squares


def default_k(pairs: int) -> int:
    """A quarter of all pairs, rounded up: the published schemes merge 2/9, 4/17, 7/17 and 4/17 pairs."""
    return math.ceil(pairs / 4)


def most_merges(modules: int, max_modules: int) -> int:
    """The largest number of pairs that can be merged with at most ``max_modules`` modules in a unit."""
    return modules - math.ceil(modules / max_modules)


def select(gains: Sequence[float], k: int, lam: float | None, max_modules: int) -> list[bool]:
    """Return the merges m that maximize Σ m_i·gains_i − λ(1ᵀm − k)² (arXiv 2303.11906, eq. 11), exactly.

    No unit may hold more than ``max_modules`` modules, that is no ``max_modules`` merges in a row. ``lam=None`` is an
    infinite λ: exactly k merges. Of equally good choices the one with the earlier merges is returned. Solved by a
    dynamic program along the chain, in exact arithmetic.

    Raises:
        RecipeError: k is more than the pairs, or, for infinite λ, more than ``max_modules`` allows.
    """
    pairs = len(gains)
    possible = pairs if lam is not None else most_merges(pairs + 1, max_modules)
    if k > possible:
        raise RecipeError(
            f"granularity.k is {k}, and {pairs + 1} modules allow {possible} merges with at most {max_modules} modules "
            "in a unit; give a smaller k or a larger max_modules."
        )
    exact = [Fraction(g) for g in gains]

    @cache
    def best(pair: int, run: int, merges: int) -> Fraction | None:
        """The most gain from ``pair`` on with exactly ``merges`` merges, ``run`` of them directly in front."""
        if merges == 0:
            return Fraction(0)
        if pair == pairs:
            return None
        skip = best(pair + 1, 0, merges)
        rest = best(pair + 1, run + 1, merges - 1) if run + 1 < max_modules else None
        take = None if rest is None else exact[pair] + rest
        return max((v for v in (skip, take) if v is not None), default=None)

    def trace(merges: int) -> list[bool]:
        mask, run = [], 0
        for pair in range(pairs):
            rest = best(pair + 1, run + 1, merges - 1) if merges and run + 1 < max_modules else None
            take = rest is not None and exact[pair] + rest == best(pair, run, merges)
            mask.append(take)
            run, merges = (run + 1, merges - 1) if take else (0, merges)
        return mask

    if lam is None:
        return trace(k)
    totals = {
        j: value - Fraction(lam) * (j - k) ** 2
        for j in range(most_merges(pairs + 1, max_modules) + 1)
        if (value := best(0, 0, j)) is not None
    }
    top = max(totals.values())
    return max(trace(j) for j, total in totals.items() if total == top)


def descent(losses: Sequence[float], tolerance: float, sizes: Sequence[int], max_modules: int) -> list[bool]:
    """Return a merge wherever the loss falls from a unit to the next by more than ``tolerance`` of itself.

    The rule that gives the authors' published schemes from their published loss curve. ``sizes`` are the modules each
    unit holds already; a merge that would exceed ``max_modules`` is left out, the earlier one having been made.
    """
    mask, held = [], sizes[0] if sizes else 0
    for i in range(len(losses) - 1):
        falls = losses[i] - losses[i + 1] > tolerance * losses[i]
        fits = held + sizes[i + 1] <= max_modules
        mask.append(falls and fits)
        held = held + sizes[i + 1] if mask[-1] else sizes[i + 1]
    return mask


def merge(groups: Groups, mask: Sequence[bool]) -> Groups:
    """Join group i with group i + 1 wherever ``mask[i]`` holds; chains join further."""
    merged: Groups = [list(groups[0])]
    for joined, group in zip(mask, groups[1:], strict=True):
        if joined:
            merged[-1] += group
        else:
            merged.append(list(group))
    return merged


def scheme_groups(modules: Sequence[str], scheme: Sequence[Sequence[str]]) -> Groups:
    """Return the groups of a scheme given by hand; modules it does not name stay single.

    Raises:
        RecipeError: it names an unknown module, one module twice, modules that are not neighbours in order, or a unit
            of none.
    """
    position = {name: i for i, name in enumerate(modules)}
    starts: dict[int, list[int]] = {}
    taken: set[int] = set()
    for unit in scheme:
        if not unit:
            raise RecipeError("granularity.scheme: a unit is empty; name its modules or leave it out.")
        if len(set(unit)) < len(unit):
            raise RecipeError(f"granularity.scheme: {', '.join(unit)} names a module twice; name each module once.")
        # The parts of a joined module (features.0 and features.1) are one place.
        group = list(dict.fromkeys(_position(name, position) for name in unit))
        if group != list(range(group[0], group[0] + len(group))):
            raise RecipeError(
                f"granularity.scheme: {', '.join(unit)} are not neighbours in network order; name adjacent modules."
            )
        if taken & set(group):
            raise RecipeError(
                f"granularity.scheme: a module of {', '.join(unit)} is in two units; name each module once."
            )
        taken |= set(group)
        starts[group[0]] = group
    return [starts.get(i, [i]) for i in range(len(modules)) if i in starts or i not in taken]


def _position(name: str, position: dict[str, int]) -> int:
    """A module's place, by its name or by one of the parts of a joined name (``features.0+features.1``)."""
    if name in position:
        return position[name]
    joined = [i for known, i in position.items() if name in known.split("+")]
    if joined:
        return joined[0]
    raise RecipeError(f"granularity.scheme: module {name!r} is unknown.{nearest_name(name, position)}")
