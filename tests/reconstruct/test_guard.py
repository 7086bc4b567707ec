"""The guard, on real optimization: one network where a merge must be accepted, one recipe where it must be rejected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore
from quiesce.recipe import LayerOverride, Recipe
from quiesce.reconstruct.granular import block_pass, merged_pass
from quiesce.reconstruct.guard import Guard
from quiesce.reconstruct.loop import module_pass
from quiesce.reconstruct.streams import Network, Streams
from tiny import Chain, images, job, recipe, same_state

WIDTH, WIDE, NARROW = 16, 32, 4


class Pair(nn.Module):
    """Two linear layers of orthogonal weights."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, middle, bias=False)
        self.second = nn.Linear(middle, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Narrowing(nn.Module):
    """``coarse`` has 32 outputs and its second layer 2 bits; ``fine``, at 4 bits, reads 4 combinations of them.

    So most of what ``coarse`` gets wrong does not matter, and what does is seen only behind ``fine``: jointly, its
    rounding errors can be made to cancel there.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
        self.coarse = Pair(WIDTH, WIDE, WIDE)
        self.fine = Pair(WIDE, NARROW, NARROW)
        self.head = nn.Linear(NARROW, NARROW, bias=False)
        for weight in self.parameters():
            nn.init.orthogonal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fine(self.coarse(self.stem(x))))


BITS = (LayerOverride(pattern="coarse.second", weight_bits=2), LayerOverride(pattern="fine.*", weight_bits=4))
SETTINGS = Recipe.preset(
    "brecq",
    weight_bits=8,
    activation_bits=None,
    layers=BITS,
    granularity="scheme",
    scheme=[["coarse", "fine"]],
    measuring=1.0,
    holdout=0.5,
    batch_size=32,
    steps=150,
    rounding_lr=1e-2,
    step_size_lr=4e-4,
    regularizer_weight=0.01,
)
# Without the regularizer no rounding is decided while it is learned: a merged unit fits the float weights, and is
# hardened to nearest all at once, where block by block `fine` still makes up for how `coarse` was hardened.
UNDECIDED = SETTINGS.with_settings(regularizer_weight=0.0, warm_start=False)


def narrowing(seed: int = 0) -> Prepared:
    prepared = prepare(Narrowing(seed).eval(), torch.randn(256, WIDTH), SETTINGS)
    assert [m.name for m in prepared.modules] == ["stem", "coarse", "fine", "head"]
    return prepared


@pytest.fixture(scope="module")
def network() -> Prepared:
    torch.manual_seed(0)
    return narrowing()


def held_out_error(prepared: Prepared) -> float:
    """‖ŷ − y‖² / ‖y‖² of the network as it is, on the images that were held out, from the float module itself."""
    x = prepared.samples.args[0][prepared.images :]
    y = Narrowing(0)(x).double()
    return ((prepared.graph(x)[0].double() - y).square().sum() / y.square().sum()).item()


def test_a_merge_that_helps_is_accepted(network: Prepared) -> None:
    (block, merged), done = run(network, SETTINGS)
    assert merged.guard is not None and merged.guard["holdout"] == 128
    (trial,) = merged.guard["trials"]
    assert trial["modules"] == ["coarse", "fine"] and trial["accepted"]
    assert trial["merged_error"] < 0.8 * trial["unmerged_error"]
    final = merged.guard["final"]
    assert merged.guard["kept"] == "merged" and final["merged_error"] < 0.8 * final["block_error"]
    assert merged.units == [["stem"], ["coarse", "fine"], ["head"]] and merged.proposed_merges == [["coarse", "fine"]]
    assert block.units == [["stem"], ["coarse"], ["fine"], ["head"]] and block.guard is None
    # The network that is left is the one that was kept, and its error is the one reported.
    assert held_out_error(network) == pytest.approx(final["merged_error"], rel=1e-3)
    restore(network.graph, done.state)
    assert held_out_error(network) == pytest.approx(final["merged_error"], rel=1e-3)
    assert merged.final_loss < block.final_loss


def test_a_merge_that_harms_is_taken_back(network: Prepared) -> None:
    _, alone = run(network, UNDECIDED.with_settings(granularity="block", scheme=None))
    (block, merged), done = run(network, UNDECIDED)
    assert merged.guard is not None
    (trial,) = merged.guard["trials"]
    assert not trial["accepted"] and trial["merged_error"] > 1.3 * trial["unmerged_error"]
    assert merged.guard["kept"] == "block"
    assert merged.guard["final"]["merged_error"] == merged.guard["final"]["block_error"]
    assert merged.proposed_merges == [["coarse", "fine"]]
    assert merged.units == block.units == [["stem"], ["coarse"], ["fine"], ["head"]]
    assert merged.module_losses == block.module_losses
    # Nothing of the trial is left: the network is the block pass's, bit for bit.
    assert same_state(done.state, alone.state)
    assert held_out_error(network) == pytest.approx(merged.guard["final"]["block_error"], rel=1e-3)


def test_without_the_guard_the_harmful_merge_stays(network: Prepared) -> None:
    recipe_ = replace(UNDECIDED, granularity=replace(UNDECIDED.granularity, guard=False))  # type: ignore[type-var]
    (merged,), _ = run(network, recipe_)
    unguarded = held_out_error(network)
    assert merged.guard is None and merged.units[1] == ["coarse", "fine"]
    run(network, UNDECIDED)
    assert held_out_error(network) < unguarded


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_both_decisions_hold_for_other_networks(seed: int) -> None:
    prepared = narrowing(seed)
    for settings, accepted in ((SETTINGS, True), (UNDECIDED, False)):
        runs, _ = run(prepared, settings)
        assert runs[-1].guard is not None
        assert [t["accepted"] for t in runs[-1].guard["trials"]] == [accepted]


def test_errors_are_relative_to_the_float_output_on_held_out_images(network: Prepared) -> None:
    work = job(network, SETTINGS)
    guard = Guard(Network(network.graph), work.inputs, work.images, 50)
    restore(network.graph, network.initial)
    assert guard.images == 128
    assert guard.error_of_network() == pytest.approx(held_out_error(network), rel=1e-4)


def test_behind_the_unit_the_network_is_float(network: Prepared) -> None:
    restore(network.graph, network.initial)
    work = job(network, SETTINGS)
    guard = Guard(Network(network.graph), work.inputs, work.images, 50)
    coarse = network.modules[1]
    streams = Streams.at_input(work.inputs).advance(work.network, coarse.start, 64)
    error = guard.error_behind(streams, coarse.stop)
    model = Narrowing(0)
    held = network.samples.args[0][network.images :]
    quantized = work.network.run(0, coarse.stop, {work.network.inputs[0]: held}, 64, quantized=True)
    (behind_coarse,) = quantized.values()
    with torch.no_grad():
        y = model(held).double()
        noise = model.head(model.fine(behind_coarse)).double() - y
    assert error == pytest.approx((noise.square().sum() / y.square().sum()).item(), rel=1e-4)
    assert error != guard.error_of_network()


def test_the_held_out_images_are_not_optimized_on() -> None:
    """Other held-out images change the guard's errors, and nothing that is learned."""
    settings = recipe(granularity="scheme", scheme=[["blocks.0", "blocks.1"]], steps=6, holdout=0.25, guard=False)
    states = []
    for seed in (1, 2):
        data = images(32)
        data[24:] = images(8, seed=seed)
        prepared = prepare(Chain(2), data, settings, holdout=8)
        assert prepared.images == 24
        prepared.initial.update(states[0][0] if states else {})  # ranges are calibrated on all images
        _, done = run(prepared, settings)
        states.append((dict(prepared.initial), done.state))
    assert same_state(states[0][1], states[1][1])


@pytest.mark.parametrize(("holdout", "images_out"), [(0.125, 4), (0.5, 16), (0.001, 1)])
def test_the_recipe_says_how_many_are_held_out(holdout: float, images_out: int) -> None:
    settings = recipe(granularity="scheme", scheme=[["blocks.0", "blocks.1"]], holdout=holdout, steps=1)
    prepared = prepare(Chain(2), images(32), settings)
    assert prepared.images == 32 - images_out
    runs, _ = run(prepared, settings)
    assert runs[-1].guard is not None and runs[-1].guard["holdout"] == images_out


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_nothing_is_held_out_without_merges(granularity: str) -> None:
    assert prepare(Chain(1), images(16), recipe(granularity=granularity)).images == 16


def test_after_a_rejection_everything_is_as_if_nothing_had_been_tried(network: Prepared) -> None:
    work = job(network, UNDECIDED)
    block = block_pass(work, Progress())
    guard = Guard(Network(network.graph), work.inputs, work.images, 64)
    done = module_pass(work, [[0], [1, 2], [3]], Progress(), block, guard)
    assert [t.accepted for t in done.trials] == [False]
    assert done.groups == block.groups and all(r.reused for r in done.records)
    assert same_state(done.state, block.state)
    assert done.losses == block.losses


def test_progress_adds_up_whatever_the_guard_decides(network: Prepared) -> None:
    for settings in (SETTINGS, UNDECIDED):
        seen: list[tuple[int, int]] = []
        short = settings.with_settings(steps=20)
        run(network, short, progress=lambda stage, done, total, seen=seen: seen.append((done, total)))
        assert all(done <= total for done, total in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]


def test_a_merged_pass_reports_what_it_relied_on(network: Prepared) -> None:
    short = SETTINGS.with_settings(steps=10)
    outcome = merged_pass(job(network, short), short.granularity, Progress(), None)  # type: ignore[arg-type]
    assert outcome.block is not None and outcome.block_seconds == outcome.block.seconds
    assert outcome.seconds >= outcome.block_seconds > 0
    given = merged_pass(job(network, short), short.granularity, Progress(), outcome.block)  # type: ignore[arg-type]
    assert given.block is outcome.block and given.seconds > outcome.block_seconds
