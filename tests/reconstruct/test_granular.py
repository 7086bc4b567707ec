from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from quiesce.errors import RecipeError
from quiesce.pipeline import run
from quiesce.preparation import Prepared
from quiesce.progress import Progress
from quiesce.recipe import GranularityRecipe, Recipe, ReconstructionRecipe
from quiesce.reconstruct.granular import (
    Outcome,
    _without,
    block_pass,
    check_granularity,
    measuring_job,
    merged_pass,
    propose,
)
from quiesce.reconstruct.guard import Guard
from quiesce.reconstruct.loop import module_pass
from quiesce.reconstruct.streams import Network
from tiny import absolute, job, recipe, same_state

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
    found = recipe("brecq-fast", granularity="loss-descent", steps=3, measuring=1.0, **settings)
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
    settings = recipe("brecq-fast", granularity="loss", guard=False, k=1, measuring=1.0)
    assert settings.granularity is not None
    outcome = merged_pass(job(chain, settings), settings.granularity, Progress(), None)
    assert outcome.block is not None
    losses = [loss.absolute for loss in outcome.block.losses]
    assert outcome.proposal.capacities == losses
    squares = [(a - b) ** 2 for a, b in itertools.pairwise(losses)]
    largest = squares.index(max(squares))
    names = [m.name for m in chain.modules]
    assert outcome.merges == [[names[largest], names[largest + 1]]]


FULL = ReconstructionRecipe()


@pytest.mark.parametrize(
    ("share", "steps", "faster"), [(1.0, 20_000, 1.0), (0.1, 2_000, 10.0), (0.25, 5_000, 4.0), (1e-9, 20, 100.0)]
)
def test_fewer_steps_come_with_higher_rates(chain: Prepared, share: float, steps: int, faster: float) -> None:
    short = measuring_job(replace(job(chain, recipe()), reconstruction=FULL), share)
    made = short.reconstruction
    assert made.steps == steps
    rates = {"rounding_lr": 1e-3, "step_size_lr": 4e-5, "weight_step_size_lr": 1e-4}
    assert {name: getattr(made, name) for name in rates} == pytest.approx({n: r * faster for n, r in rates.items()})
    assert replace(made, steps=20_000, **rates) == FULL


@pytest.mark.parametrize(("rate", "short"), [(0.04, 0.1), (0.1, 0.1), (0.5, 0.5)])
def test_rates_that_are_high_already_rise_no_further(chain: Prepared, rate: float, short: float) -> None:
    high = replace(FULL, steps=500, rounding_lr=rate, step_size_lr=1e-3)
    made = measuring_job(replace(job(chain, recipe()), reconstruction=high), 0.1).reconstruction
    assert made.rounding_lr == pytest.approx(short) and made.step_size_lr == pytest.approx(1e-3 * short / rate)


MERGE = [["blocks.2", "blocks.3"]]


def test_few_steps_are_no_fewer_in_passes_that_measure(chain: Prepared) -> None:
    for steps, fewer in ((60, 20), (15, 15)):
        work = replace(job(chain, recipe()), reconstruction=replace(FULL, steps=steps))
        assert measuring_job(work, 0.1).reconstruction.steps == fewer
    chosen = recipe(steps=15, granularity="loss")
    assert chosen.granularity is not None
    outcome = merged_pass(job(chain, chosen), chosen.granularity, Progress(), None)
    assert outcome.measuring_steps == 0 and outcome.block is not None  # full passes decide, and are used


class TestMeasuring:
    """Merges decided by short passes: 21 steps of 30."""

    def made(self, chain: Prepared, progress: Progress | None = None, **settings: object) -> tuple[Outcome, Recipe]:
        chosen = recipe(steps=30, measuring=0.7, **settings)
        assert chosen.granularity is not None
        counted = progress or Progress()
        return merged_pass(job(chain, chosen), chosen.granularity, counted, None), chosen

    @pytest.mark.parametrize("per_module", [True, False])
    def test_its_steps_are_counted_exactly(self, chain: Prepared, per_module: bool) -> None:
        seen: list[tuple[int, int]] = []
        progress = Progress(lambda stage, done, total: seen.append((done, total)))
        outcome, _ = self.made(chain, progress, granularity="scheme", scheme=MERGE, steps_per_module=per_module)
        assert outcome.guard is not None and outcome.measuring_steps == 21
        (trial,) = outcome.guard["trials"]
        measured = (
            6 * 21 + (42 if per_module else 21) + 21 * trial["accepted"]
        )  # blocks, the merge, and the head behind it
        final = sum(r.steps for r in outcome.kept.records)
        assert final == (150 if outcome.guard["kept"] == "merged" and not per_module else 180)
        assert seen[-1] == (measured + final, measured + final)
        assert seen[0] == (0, 126 + 180) and all(done <= total for done, total in seen)

    def test_without_a_guard_and_losses_nothing_is_measured(self, chain: Prepared) -> None:
        outcome, _ = self.made(chain, granularity="scheme", scheme=MERGE, guard=False)
        assert outcome.measuring_steps == outcome.measuring_seconds == 0 and outcome.block is None

    @pytest.mark.parametrize("method", ["loss", "loss-descent", "log-ratio"])
    def test_short_passes_choose(self, chain: Prepared, method: str) -> None:
        outcome, chosen = self.made(chain, granularity=method, guard=False)
        work = job(chain, chosen)
        assert chosen.granularity is not None
        short = block_pass(measuring_job(work, 0.7), Progress())
        assert outcome.proposal.capacities == absolute(short.losses)
        assert outcome.merges[: len(merged(outcome.proposal.groups))] == [
            [chain.modules[i].name for i in group] for group in merged(outcome.proposal.groups)
        ]
        assert [r.steps for r in outcome.kept.records] == [30 * len(g) for g in outcome.kept.groups]

    def test_the_guards_errors_are_those_of_short_passes(self, chain: Prepared) -> None:
        outcome, chosen = self.made(chain, granularity="scheme", scheme=MERGE)
        short = measuring_job(job(chain, chosen), 0.7)
        guard = Guard(Network(chain.graph), short.inputs, short.images, 64)
        by_hand = module_pass(short, [[0], [1], [2], [3, 4], [5]], Progress(), block_pass(short, Progress()), guard)
        assert outcome.guard is not None
        assert [(t["merged_error"], t["unmerged_error"]) for t in outcome.guard["trials"]] == [
            (t.merged_error, t.unmerged_error) for t in by_hand.trials
        ]

    def test_one_full_pass_on_all_images_from_the_calibrated_state_follows(self, chain: Prepared) -> None:
        outcome, chosen = self.made(chain, granularity="scheme", scheme=MERGE)
        work = job(chain, chosen)
        assert work.images < work.all_images == len(chain.samples)
        alone = module_pass(replace(work, images=work.all_images), outcome.kept.groups, Progress())
        assert same_state(outcome.kept.state, alone.state) and outcome.kept.losses == alone.losses
        assert not any(r.reused for r in outcome.kept.records) and outcome.reused_seconds == 0
        assert outcome.seconds >= outcome.measuring_seconds > 0 and outcome.block_seconds == 0

    def test_nothing_kept_is_the_plain_block_result(self, chain: Prepared) -> None:
        """Nothing helps where there is nothing left to gain: the regularizer alone, at a rate that moves nothing."""
        still = {"rounding_lr": 1e-12, "step_size_lr": 1e-12, "warm_start": False}
        outcome, chosen = self.made(chain, granularity="scheme", scheme=MERGE, **still)
        assert outcome.guard is not None and [t["accepted"] for t in outcome.guard["trials"]] == [False]
        assert outcome.guard["kept"] == "block" and outcome.kept.groups == [[i] for i in range(6)]
        assert same_state(outcome.kept.state, block_pass(job(chain, chosen), Progress()).state)

    def test_a_block_pass_that_is_there_decides_instead(self, chain: Prepared) -> None:
        settings = recipe(steps=30, measuring=0.7, granularity="loss")
        _, block = run(chain, recipe(steps=30))
        steps: list[int] = []
        (shared,), done = run(chain, settings, block=block, progress=lambda stage, step, total: steps.append(total))
        (full,), expected = run(chain, settings.with_settings(measuring=1.0), block=block)
        assert shared.measuring_steps == 0 and shared.block_seconds == block.seconds
        assert shared.capacities == dict(zip(shared.capacities, absolute(block.losses), strict=True))
        assert same_state(done.state, expected.state) and shared.guard == full.guard
        assert max(steps) <= 180

    def test_the_result_says_so(self, chain: Prepared) -> None:
        settings = recipe(steps=30, granularity="loss", measuring=0.7)
        (first,), done = run(chain, settings)
        (again,), same = run(chain, settings)
        assert first.measuring_steps == 21 and first.seconds > first.measuring_seconds > 0
        assert first.guard is not None and len(first.guard["trials"]) == len(first.proposed_merges) > 0
        assert same_state(done.state, same.state) and first.guard == again.guard
