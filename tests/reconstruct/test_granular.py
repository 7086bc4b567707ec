from __future__ import annotations

import itertools

import pytest

from quiesce.errors import RecipeError
from quiesce.pipeline import Prepared
from quiesce.progress import Progress
from quiesce.recipe import GranularityRecipe
from quiesce.reconstruct.granular import Outcome, _without, check_granularity, merged_pass, propose
from tiny import job, recipe

NAMES = [f"m{i}" for i in range(7)]
LOSSES = [1.0, 5.0, 2.0, 3.0, 9.0, 1.0, 2.0]


def merged(groups: list[list[int]]) -> list[list[int]]:
    return [g for g in groups if len(g) > 1]


def test_proposals_come_from_the_capacities() -> None:
    top = propose(NAMES, GranularityRecipe(method="loss", k=3), LOSSES)
    assert merged(top.groups) == [[0, 1], [3, 4, 5]]  # squares 16 9 1 36 64 1
    assert top.capacities == LOSSES and top.differentials == [16 / 64, 9 / 64, 1 / 64, 36 / 64, 1.0, 1 / 64]
    assert merged(propose(NAMES, GranularityRecipe(method="modcap", k=3), LOSSES).groups) == merged(top.groups)
    ratio = propose(NAMES, GranularityRecipe(method="log-ratio", k=2), LOSSES)
    assert merged(ratio.groups) == [[0, 1], [4, 5]]  # ratios 5, 2.5, 1.5, 3, 9, 2
    fall = propose(NAMES, GranularityRecipe(method="loss-descent"), LOSSES)
    assert merged(fall.groups) == [[1, 2], [4, 5]]


def test_k_defaults_to_a_quarter_and_the_cap_is_kept() -> None:
    assert sum(len(g) - 1 for g in propose(NAMES, GranularityRecipe(method="loss"), LOSSES).groups) == 2
    capped = propose(NAMES, GranularityRecipe(method="loss", k=3, max_modules=2), LOSSES)
    assert merged(capped.groups) == [[0, 1], [2, 3], [4, 5]]
    assert propose(NAMES, GranularityRecipe(method="loss", max_modules=1), LOSSES).groups == [[i] for i in range(7)]


def test_a_scheme_needs_no_numbers() -> None:
    proposal = propose(NAMES, GranularityRecipe(method="scheme", scheme=(("m2", "m3"),)), LOSSES)
    assert merged(proposal.groups) == [[2, 3]] and proposal.capacities == proposal.differentials == []


def test_one_module_has_nothing_to_merge() -> None:
    for method in ("modcap", "loss", "loss-descent", "log-ratio"):
        assert propose(["all"], GranularityRecipe(method=method), [3.0]).groups == [[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GranularityRecipe(method="loss", k=7), r"granularity\.k is 7, and 7 modules have 6 pairs"),
        (GranularityRecipe(method="modcap", k=7, lam=0.5), r"granularity\.k is 7"),
        (GranularityRecipe(method="modcap", k=5), r"granularity\.k is 5, and 7 modules allow 4 merges with at most 3"),
        (GranularityRecipe(method="scheme", scheme="resnet18"), "'layer1.1' is unknown"),
        (GranularityRecipe(method="scheme", scheme=(("m1", "m3"),)), "not neighbours"),
        (GranularityRecipe(method="scheme", scheme="resnet19"), "Did you mean 'resnet18'"),
    ],
)
def test_what_can_not_be_done_is_refused_before_any_optimization(settings: GranularityRecipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_granularity(NAMES, settings)


@pytest.mark.parametrize("method", ["layer", "block", "loss", "loss-descent", "modcap", "log-ratio"])
def test_what_can_be_done_passes(method: str) -> None:
    check_granularity(NAMES, GranularityRecipe(method=method))


def descend(chain: Prepared, **settings: object) -> Outcome:
    found = recipe("brecq-fast", granularity="loss-descent", steps=3, **settings)
    assert found.granularity is not None
    return merged_pass(job(chain, found), found.granularity, Progress(), None)


def falls(losses: list[float], groups: list[list[int]], max_modules: int) -> list[tuple[int, ...]]:
    """Neighbouring units whose loss falls and that would fit into one."""
    ends = [losses[g[-1]] for g in groups]
    pairs = zip(groups, groups[1:], ends, ends[1:], strict=False)
    return [(*a, *b) for a, b, first, second in pairs if first > second and len(a) + len(b) <= max_modules]


@pytest.mark.parametrize("max_modules", [2, 3, 6])
def test_loss_descent_goes_on_until_no_loss_falls(chain: Prepared, max_modules: int) -> None:
    """Without a guard, each fall that is left in the end would exceed the cap."""
    outcome = descend(chain, guard=False, max_modules=max_modules)
    assert outcome.block is not None and outcome.guard is None
    losses = [loss.absolute for loss in outcome.kept.losses]
    assert outcome.merges and falls(losses, outcome.kept.groups, max_modules) == []
    assert max(len(g) for g in outcome.kept.groups) <= max_modules
    assert [i for g in outcome.kept.groups for i in g] == list(range(6))


def test_loss_descent_takes_several_passes(chain: Prepared) -> None:
    """On this network the merged unit's loss falls again behind its predecessor: it grows to the front."""
    outcome = descend(chain, guard=False, max_modules=6)
    assert outcome.block is not None
    first = propose(
        [m.name for m in chain.modules],
        GranularityRecipe(method="loss-descent", max_modules=6),
        [loss.absolute for loss in outcome.block.losses],
    )
    assert len(outcome.merges) > len(merged(first.groups))
    assert len(merged(outcome.kept.groups)) == 1
    assert set(outcome.merges[-1]) > set(outcome.merges[0])


def test_loss_descent_tries_no_unit_twice(chain: Prepared) -> None:
    outcome = descend(chain, guard=True, max_modules=6, holdout=0.25)
    assert outcome.guard is not None
    tried = [tuple(t["modules"]) for t in outcome.guard["trials"]]
    assert len(tried) == len(set(tried)) and {tuple(m) for m in outcome.merges} >= set(tried)


def test_a_unit_that_was_taken_back_is_split_again() -> None:
    parts = [[0], [1, 2], [3], [4], [5, 6]]
    tried = {(0, 1, 2), (1, 2), (3, 4), (5, 6)}
    # (0, 1, 2) and (3, 4) were rejected, (1, 2) and (5, 6) accepted; (4, 5, 6) is new.
    assert _without([[0, 1, 2], [3, 4], [5, 6]], tried, parts) == parts
    assert _without([[0], [1, 2], [3], [4, 5, 6]], tried, parts) == [[0], [1, 2], [3], [4, 5, 6]]


def test_a_high_tolerance_merges_nothing(chain: Prepared) -> None:
    outcome = descend(chain, tolerance=0.999)
    assert outcome.merges == [] and outcome.kept.groups == [[i] for i in range(6)]
    assert outcome.guard is not None and outcome.guard["trials"] == [] and outcome.guard["kept"] == "block"


def test_losses_choose_the_merges(chain: Prepared) -> None:
    settings = recipe("brecq-fast", granularity="loss", guard=False, k=1)
    assert settings.granularity is not None
    outcome = merged_pass(job(chain, settings), settings.granularity, Progress(), None)
    assert outcome.block is not None
    losses = [loss.absolute for loss in outcome.block.losses]
    assert outcome.proposal.capacities == losses
    squares = [(a - b) ** 2 for a, b in itertools.pairwise(losses)]
    largest = squares.index(max(squares))
    names = [m.name for m in chain.modules]
    assert outcome.merges == [[names[largest], names[largest + 1]]]
