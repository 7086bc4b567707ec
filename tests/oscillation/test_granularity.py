from __future__ import annotations

from fractions import Fraction
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quiesce.errors import RecipeError
from quiesce.oscillation.granularity import (
    default_k,
    descent,
    differentials,
    merge,
    most_merges,
    scheme_groups,
    select,
)

# Module losses of MobileNetV2, features.1 … features.17, under BRECQ: read off arXiv 2303.11906, Fig. 1.
PUBLISHED_CURVE = (1.0, 1.5, 7.0, 4.0, 5.1, 7.4, 5.2, 7.4, 8.1, 9.4, 7.3, 10.0, 14.5, 6.8, 10.9, 16.7, 10.7)

# Few different values, so that ties are common; and any others.
gains_of_a_chain = st.lists(
    st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0)), min_size=0, max_size=11
)


def longest_run(mask: tuple[bool, ...]) -> int:
    longest = run = 0
    for merged in mask:
        run = run + 1 if merged else 0
        longest = max(longest, run)
    return longest


def brute_force(gains: list[float], k: int, lam: float | None, max_modules: int) -> list[bool] | None:
    """Try every mask; of equally good ones keep that with the earlier merges (the greatest in lexicographic order)."""
    allowed = [m for m in product([False, True], repeat=len(gains)) if longest_run(m) < max_modules]
    if lam is None:
        allowed = [m for m in allowed if sum(m) == k]

    def value(mask: tuple[bool, ...]) -> Fraction:
        gain = sum((Fraction(g) for g, m in zip(gains, mask, strict=True) if m), Fraction(0))
        return gain - Fraction(lam or 0) * (sum(mask) - k) ** 2

    return list(max(allowed, key=lambda mask: (value(mask), mask))) if allowed else None


@settings(max_examples=150)
@given(gains_of_a_chain, st.data())
def test_selection_is_the_exact_maximizer(gains: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(gains)))
    lam = data.draw(st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.25, 10.0]), st.floats(0.0, 2.0)))
    max_modules = data.draw(st.integers(1, 5))
    expected = brute_force(gains, k, lam, max_modules)
    if expected is None:
        with pytest.raises(RecipeError):
            select(gains, k, lam, max_modules)
    else:
        assert select(gains, k, lam, max_modules) == expected


def test_ties_go_to_the_earlier_pair() -> None:
    assert select([0.5, 0.5, 0.5, 0.5], 2, None, 2) == [True, False, True, False]
    assert select([0.0] * 6, 2, None, 3) == [True, True, False, False, False, False]
    assert select([1.0, 1.0, 1.0, 1.0], 1, 1000.0, 3) == [True, False, False, False]


def test_infinite_lambda_is_plain_top_k() -> None:
    gains = [0.3, 0.9, 0.1, 1.0, 0.2, 0.8]
    assert select(gains, 3, None, 3) == [False, True, False, True, False, True]
    assert select(gains, 3, 1e9, 3) == select(gains, 3, None, 3)


def test_a_finite_lambda_trades_merges_for_gain() -> None:
    gains = [1.0, 0.05, 0.9, 0.05]
    # A third merge gains at most 0.05 and costs lam * 1.
    assert sum(select(gains, 3, 0.2, 4)) == 3
    assert sum(select(gains, 3, 0.01, 4)) == 3
    assert sum(select(gains, 1, 0.2, 4)) == 2
    assert sum(select(gains, 1, 0.95, 4)) == 1
    assert sum(select(gains, 2, 0.0, 4)) == 3  # the cap of four modules is all that limits


def test_the_cap_holds_back_a_long_chain() -> None:
    falling = [1.0] * 5
    for max_modules, mask in [
        (1, [False] * 5),
        (2, [True, False, True, False, True]),
        (3, [True, True, False, True, True]),
    ]:
        assert most_merges(6, max_modules) == sum(mask)
        assert select(falling, sum(mask), None, max_modules) == mask


@pytest.mark.parametrize(("k", "lam", "max_modules"), [(6, None, 9), (6, 1.0, 9), (4, None, 2)])
def test_k_too_large_is_refused(k: int, lam: float | None, max_modules: int) -> None:
    with pytest.raises(RecipeError, match=rf"granularity\.k is {k}, and 6 modules allow [35] merges"):
        select([1.0] * 5, k, lam, max_modules)


def test_a_long_chain_is_quick_and_right() -> None:
    gains = [float(i % 7) for i in range(400)]
    mask = select(gains, 100, None, 3)
    assert sum(mask) == 100
    # 57 pairs have gain 6, 57 gain 5: the best hundred are neighbours in pairs and fit the cap.
    assert sum(g for g, m in zip(gains, mask, strict=True) if m) == 57 * 6 + 43 * 5


def test_differentials_are_shares_of_the_largest() -> None:
    assert differentials([1.0, 3.0, 2.0], "loss") == [1.0, 0.25]
    assert differentials([1e9, 3e9, 2e9], "modcap") == pytest.approx([1.0, 0.25])
    assert differentials([2.0, 2.0, 2.0], "loss") == [0.0, 0.0]
    assert differentials([5.0], "loss") == []


def test_log_ratio_sees_ratios() -> None:
    assert differentials([1.0, 10.0, 1.0, 100.0], "log-ratio") == pytest.approx([0.25, 0.25, 1.0])
    # Equal steps of the ratio weigh the same wherever they are; equal differences do not.
    assert differentials([1.0, 2.0, 1000.0, 2000.0], "log-ratio")[0] == pytest.approx(
        differentials([1.0, 2.0, 1000.0, 2000.0], "log-ratio")[2]
    )
    assert differentials([0.0, 1.0, 4.0], "log-ratio") == [0.0, 1.0]  # a lossless module counts as the best other
    assert differentials([0.0, 0.0], "log-ratio") == [0.0]


@pytest.mark.parametrize(("pairs", "k"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3), (17, 5)])
def test_default_k_is_a_quarter_of_the_pairs(pairs: int, k: int) -> None:
    assert default_k(pairs) == k


def test_descent_on_the_published_curve_gives_the_modcap_scheme() -> None:
    """First pass: the authors' ModCap scheme, features.N counted from 1."""
    mask = descent(PUBLISHED_CURVE, 0.0, [1] * 17, 3)
    groups = merge([[i] for i in range(1, 18)], mask)
    assert [g for g in groups if len(g) > 1] == [[3, 4], [6, 7], [10, 11], [13, 14], [16, 17]]


def test_top_k_on_the_published_curve_does_not() -> None:
    mask = select(differentials(PUBLISHED_CURVE, "loss"), 7, None, 3)
    groups = merge([[i] for i in range(1, 18)], mask)
    assert [g for g in groups if len(g) > 1] != [[3, 4], [6, 7], [10, 11], [13, 14], [16, 17]]


def test_descent_respects_tolerance_and_cap() -> None:
    assert descent([4.0, 3.0, 2.9, 5.0], 0.0, [1] * 4, 3) == [True, True, False]
    assert descent([4.0, 3.0, 2.9, 5.0], 0.1, [1] * 4, 3) == [True, False, False]
    assert descent([4.0, 3.0, 2.0, 1.0], 0.0, [1] * 4, 3) == [True, True, False]
    assert descent([4.0, 3.0, 2.0, 1.0], 0.0, [1] * 4, 2) == [True, False, True]
    assert descent([4.0, 3.0], 0.0, [2, 2], 3) == [False]
    assert descent([3.0, 3.0], 0.0, [1, 1], 3) == [False]
    assert descent([3.0], 0.0, [1], 3) == [] and descent([], 0.0, [], 3) == []


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12), st.integers(1, 4))
def test_descent_merges_only_falls_and_keeps_the_cap(losses: list[float], max_modules: int) -> None:
    mask = descent(losses, 0.0, [1] * len(losses), max_modules)
    assert all(losses[i] > losses[i + 1] for i, merged in enumerate(mask) if merged)
    assert longest_run(tuple(mask)) < max_modules
    if max_modules > len(losses):
        assert mask == [a > b for a, b in pairwise(losses)]


@given(st.lists(st.booleans(), max_size=11))
def test_merging_keeps_every_module_once_in_order(mask: list[bool]) -> None:
    groups = merge([[i] for i in range(len(mask) + 1)], mask)
    assert [i for g in groups for i in g] == list(range(len(mask) + 1))
    assert len(groups) == len(mask) + 1 - sum(mask)
    starts = {g[0] for g in groups}
    assert all((i + 1 not in starts) == joined for i, joined in enumerate(mask))


MODULES = ["stem+blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]


def test_a_scheme_names_modules_and_leaves_the_others_single() -> None:
    assert scheme_groups(MODULES, [["blocks.1", "blocks.2"]]) == [[0], [1, 2], [3], [4]]
    assert scheme_groups(MODULES, [["blocks.3", "head"], ["blocks.0", "blocks.1"]]) == [[0, 1], [2], [3, 4]]
    assert scheme_groups(MODULES, [["stem", "blocks.0", "blocks.1"]]) == [[0, 1], [2], [3], [4]]
    assert scheme_groups(MODULES, [["blocks.2"]]) == [[i] for i in range(5)]
    assert scheme_groups(MODULES, []) == [[i] for i in range(5)]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ([["blocks.1", "block.2"]], r"'block\.2' is unknown\. Did you mean 'blocks\.2'\?"),
        ([["blocks.1", "blocks.3"]], "blocks.1, blocks.3 are not neighbours"),
        ([["blocks.2", "blocks.1"]], "are not neighbours in network order"),
        ([["blocks.1", "blocks.2"], ["blocks.2", "blocks.3"]], "blocks.2, blocks.3 is in two units"),
        ([["blocks.1", "blocks.1"]], "blocks.1, blocks.1 names a module twice"),
        ([["stem"], ["blocks.0", "blocks.1"]], "is in two units"),
        ([[]], "empty"),
        ([["blocks.1", "blocks.2"], []], "empty"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: list[list[str]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        scheme_groups(MODULES, scheme)


@given(st.integers(1, 9), st.data())
def test_any_contiguous_scheme_is_taken_as_given(modules: int, data: st.DataObject) -> None:
    names = [f"m{i}" for i in range(modules)]
    cuts = sorted(data.draw(st.sets(st.integers(1, modules - 1)))) if modules > 1 else []
    edges = [0, *cuts, modules]
    groups = [list(range(a, b)) for a, b in pairwise(edges)]
    scheme = data.draw(st.permutations([[names[i] for i in g] for g in groups]))
    assert scheme_groups(names, scheme) == groups


def test_brute_force_counts_every_mask() -> None:
    """The reference of these tests, checked by hand on a chain of four."""
    assert brute_force([1.0, 2.0, 3.0], 2, None, 2) == [True, False, True]
