from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from quiesce.graph.partition import partition
from quiesce.pipeline import run
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import fake_quantizers, restore
from quiesce.reconstruct.batches import Problem
from quiesce.reconstruct.granular import block_pass
from quiesce.reconstruct.guard import Guard
from quiesce.reconstruct.loop import _Walk, layer_pass, measure_pass, module_pass
from quiesce.reconstruct.optimize import optimize
from quiesce.reconstruct.streams import Network
from quiesce.result import Run
from tiny import Chain, absolute, images, job, recipe, same_state, without_times

NAMES = ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
LATE = [[0], [1], [2], [3, 4], [5]]


@pytest.fixture(scope="module")
def chains() -> dict[int, Prepared]:
    settings = recipe()
    return {depth: prepare(Chain(depth, channels=4), images(8), settings) for depth in (4, 8, 16)}


class TestLeftFloat:
    """Units that quantize nothing are passed through."""

    LEFT = ("blocks.1.*", "blocks.2.*", "blocks.3.conv1")

    def made(self, granularity: str, **settings: object) -> tuple[Run, list[tuple[str, int, int]]]:
        chosen = recipe(granularity=granularity, leave_float=self.LEFT, learn_step_sizes=False, **settings)
        ticks: list[tuple[str, int, int]] = []
        runs, _ = run(prepare(Chain(4), images(32), chosen), chosen, progress=lambda *a: ticks.append(a))
        return runs[-1], ticks

    @pytest.mark.parametrize("fisher", [False, True])
    def test_blocks(self, fisher: bool) -> None:
        made, ticks = self.made("block", fisher=fisher)
        assert {r.modules[0]: r.steps for r in made.unit_records} == {
            **dict.fromkeys(NAMES, 4),
            "blocks.1": 0,
            "blocks.2": 0,
        }
        assert [len(r.loss_curve) for r in made.unit_records] == [4, 4, 0, 0, 4, 4]
        assert list(made.module_losses) == NAMES and min(made.module_losses.values()) > 0
        assert {total for _, _, total in ticks} == {16} and ticks[-1][1] == 16

    def test_layers(self) -> None:
        made, ticks = self.made("layer")
        assert [r.modules[0] for r in made.unit_records if r.steps] == [
            "stem",
            "blocks.0.conv1",
            "blocks.0.conv2",
            "blocks.3.conv2",
            "head",
        ]
        assert {total for _, _, total in ticks} == {20} and ticks[-1][1] == 20

    @pytest.mark.parametrize("per_module", [True, False])
    def test_merged_units_get_the_steps_of_modules_that_learn(self, per_module: bool) -> None:
        scheme = [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3", "head"]]
        made, ticks = self.made("scheme", scheme=scheme, steps_per_module=per_module, guard=False)
        wanted = [4, 4, 8] if per_module else [4, 4, 4]
        assert [r.steps for r in made.unit_records] == wanted
        assert {total for _, _, total in ticks} == {sum(wanted)} and ticks[-1][1] == sum(wanted)

    @pytest.mark.parametrize("granularity", ["modcap", "loss", "loss-descent", "log-ratio"])
    def test_guarded_merges_come_to_their_end(self, granularity: str) -> None:
        made, ticks = self.made(granularity)
        assert made.guard is not None and [m for unit in made.units for m in unit] == NAMES
        assert ticks[-1][1] == ticks[-1][2] > 0

    def test_step_sizes_alone_are_learned(self) -> None:
        settings = recipe(leave_float="blocks.1.conv?", layers=[{"pattern": "blocks.2.*", "activation_bits": 4}])
        prepared = prepare(Chain(4), images(32), settings)
        (made,), done = run(prepared, settings)
        name = next(n for n, q in fake_quantizers(prepared.graph).items() if n.startswith("relu_4"))
        assert [r.steps for r in made.unit_records] == [4] * 6
        assert not torch.equal(done.state[f"{name}.scale"], prepared.initial[f"{name}.scale"])


def pairs(modules: int) -> list[list[int]]:
    return [[i, i + 1] for i in range(0, modules, 2)]


@pytest.mark.parametrize("kind", ["measure", "block", "layer", "pairs", "pairs on top of block", "overlapping pairs"])
def test_executed_nodes_grow_linearly_with_depth(chains: dict[int, Prepared], kind: str) -> None:
    """Twice the added blocks cost twice the added executions: nothing is ever run again from the start."""
    executed = {}
    for depth, prepared in chains.items():
        work = job(prepared, recipe(steps=1))
        restore(prepared.graph, prepared.initial)
        modules = len(prepared.modules)
        if kind == "measure":
            measure_pass(work)
        elif kind == "block":
            block_pass(work, Progress())
        elif kind == "layer":
            layer_pass(work, partition(prepared.graph, "layer"), Progress())
        else:
            previous = block_pass(work, Progress()) if "top" in kind else None
            work = replace(work, overlap=1 if "overlapping" in kind else 0)
            module_pass(work, pairs(modules), Progress(), previous)
        executed[depth] = work.network.executions
    assert executed[16] - executed[8] == 2 * (executed[8] - executed[4]) > 0


def test_the_guards_own_passes_are_counted_apart(chain: Prepared) -> None:
    work = job(chain, recipe())
    guard = Guard(Network(chain.graph), work.inputs, work.images, 64)
    guard.error_of_network()
    assert work.network.executions == 0 and guard.network.executions == 2 * guard.network.end


def test_every_module_is_a_unit_with_a_full_record(chain: Prepared) -> None:
    settings = recipe(steps=6)
    ticks: list[tuple[str, int, int]] = []
    (report,), done = run(chain, settings, progress=lambda *a: ticks.append(a))
    assert [m.name for m in chain.modules] == NAMES
    assert report.units == [[n] for n in NAMES] and done.groups == [[i] for i in range(6)]
    for name, record in zip(NAMES, report.unit_records, strict=True):
        assert record.modules == [name] and record.steps == 6 and record.seconds > 0 and not record.reused
        assert record.undecided is not None and record.undecided > 0.1  # six steps decide little
        assert [step for step, _ in record.loss_curve] == [1, 2, 3, 4, 5, 6]
        assert all(value >= 0 for _, value in record.loss_curve)
    assert list(report.module_losses) == list(report.relative_losses) == NAMES
    assert report.peak_loss == max(report.module_losses.values())
    assert report.final_loss == report.module_losses["head"]
    losses = list(report.module_losses.values())
    assert report.oscillation == pytest.approx(sum((a - b) ** 2 for a, b in itertools.pairwise(losses)))
    assert report.guard is None and report.reused_seconds == 0 and report.proposed_merges == []
    assert list(dict.fromkeys(stage for stage, _, _ in ticks)) == NAMES
    assert sorted({done for _, done, _ in ticks}) == list(range(37)) and {total for _, _, total in ticks} == {36}


def test_losses_are_those_of_the_hardened_network(chain: Prepared) -> None:
    settings = recipe(steps=6)
    _, done = run(chain, settings)
    measured = measure_pass(job(chain, settings))
    assert absolute(measured.losses) == pytest.approx(absolute(done.losses), rel=1e-5)


def test_losses_cover_the_same_modules_at_every_granularity(chain: Prepared) -> None:
    work = job(chain, recipe())
    passes = [
        measure_pass(work),
        block_pass(work, Progress()),
        module_pass(work, [[0, 1, 2], [3, 4], [5]], Progress()),
        layer_pass(work, partition(chain.graph, "layer"), Progress()),
    ]
    assert all(len(p.losses) == 6 for p in passes)
    assert len({tuple(absolute(p.losses)) for p in passes}) == 4


def test_reconstruction_lowers_the_networks_loss(chain: Prepared) -> None:
    """Steps enough for a block pass to leave every module but perhaps the first closer to float than nearest does."""
    _, nearest = run(chain, recipe("nearest"))
    _, done = run(chain, recipe("brecq-fast", steps=80, rounding_lr=2e-2, batch_size=16))
    assert sum(d < n for d, n in zip(absolute(done.losses), absolute(nearest.losses), strict=True)) >= 5
    assert done.losses[-1].absolute < 0.5 * nearest.losses[-1].absolute


@pytest.mark.parametrize("preset", ["adaround", "brecq", "qdrop"])
@pytest.mark.parametrize("granularity", ["layer", "block", "modcap", "loss", "loss-descent", "log-ratio", "scheme"])
def test_every_granularity_goes_with_every_preset(chain: Prepared, preset: str, granularity: str) -> None:
    scheme = [["blocks.0", "blocks.1"]] if granularity == "scheme" else None
    settings = recipe(preset, granularity=granularity, scheme=scheme, steps=2, measuring=1.0)
    runs, done = run(chain, settings)
    assert runs[-1].preset == preset and runs[-1].granularity == granularity
    assert set(runs[-1].module_losses) == set(NAMES)
    assert (len(runs) == 2) == (granularity not in ("layer", "block"))
    if granularity == "layer":
        assert [len(u) for u in runs[-1].units] == [1] * 10
    else:
        assert [n for unit in runs[-1].units for n in unit] == NAMES
    if granularity in ("modcap", "loss", "log-ratio"):
        assert sum(len(m) - 1 for m in runs[-1].proposed_merges) == 2  # a quarter of five pairs
        assert list(runs[-1].capacities) == NAMES and len(runs[-1].differentials) == 5
        assert max(runs[-1].differentials) == 1.0
    if len(runs) == 2:
        assert runs[0].granularity == "block" and runs[0].units == [[n] for n in NAMES]
        assert runs[-1].block_seconds > 0
        assert {t["accepted"] for t in runs[-1].guard["trials"]} <= {True, False}
    assert same_state(done.state, _state(chain))


def _state(prepared: Prepared) -> dict[str, torch.Tensor]:
    quantizers = fake_quantizers(prepared.graph)
    return {f"{n}.{key}": t for n, q in quantizers.items() for key, t in q.named_buffers(recurse=False)}


def test_layer_units_hold_one_layer_each(chain: Prepared) -> None:
    (report,), _ = run(chain, recipe("adaround-fast", granularity="layer"))
    layers = ["stem", *[f"blocks.{i}.conv{j}" for i in range(4) for j in (1, 2)], "head"]
    assert report.units == [[name] for name in layers]
    assert [r.steps for r in report.unit_records] == [4] * 10


def test_steps_of_a_merged_unit(chain: Prepared) -> None:
    for per_module, steps in ((True, [4, 4, 4, 8, 4]), (False, [4] * 5)):
        settings = recipe(
            granularity="scheme", scheme=[["blocks.2", "blocks.3"]], guard=False, steps_per_module=per_module
        )
        runs, _ = run(chain, settings)
        assert [r.steps for r in runs[-1].unit_records] == steps
        assert runs[-1].units[3] == ["blocks.2", "blocks.3"]


def test_without_guard_a_data_free_granularity_needs_no_block_pass(chain: Prepared) -> None:
    runs, _ = run(chain, recipe(granularity="modcap", guard=False))
    assert len(runs) == 1 and runs[0].guard is None and runs[0].block_seconds == runs[0].reused_seconds == 0


def test_a_block_pass_that_is_there_is_used(chain: Prepared) -> None:
    settings = recipe(granularity="loss", guard=False, measuring=1.0)
    both, expected = run(chain, settings)
    _, block = run(chain, recipe())
    alone, done = run(chain, settings, block=block)
    assert len(both) == 2 and len(alone) == 1
    assert same_state(done.state, expected.state)
    assert alone[0].block_seconds == block.seconds
    assert alone[0].seconds >= block.seconds


def test_activations_can_stay_float(chain: Prepared) -> None:
    settings = recipe("qdrop-fast", activation_bits=None, granularity="scheme", scheme=[["blocks.0", "blocks.1"]])
    prepared = prepare(Chain(2), images(24), settings)
    runs, _ = run(prepared, settings)
    assert runs[-1].activation_bits is None
    assert all("weight" in name for name in fake_quantizers(prepared.graph))


@pytest.mark.parametrize("preset", ["brecq-fast", "qdrop-fast"])
def test_the_same_seed_gives_the_same_network_and_result(preset: str) -> None:
    settings = recipe(preset, granularity="loss", steps=12)
    results, states = [], []
    for seed in (0, 0, 1):
        prepared = prepare(Chain(2), images(24), replace(settings, seed=seed), evaluate=images(8, seed=9))
        runs, done = run(prepared, replace(settings, seed=seed))
        results.append(without_times(prepared.result(runs, replace(settings, seed=seed))))
        states.append(done.state)
    assert same_state(states[0], states[1])
    assert results[0].to_json() == results[1].to_json()
    assert not same_state(states[0], states[2])
    assert results[0].run.module_losses != results[2].run.module_losses


def test_a_run_does_not_depend_on_what_was_run_before(chain: Prepared) -> None:
    settings = recipe(granularity="loss", steps=8)
    _, first = run(chain, settings)
    run(chain, recipe("adaround-fast", granularity="layer"))
    torch.rand(3)
    _, again = run(chain, settings)
    assert same_state(first.state, again.state)


def test_units_in_front_of_the_first_merge_are_reused(chain: Prepared) -> None:
    settings = recipe(granularity="scheme", scheme=[["blocks.2", "blocks.3"]], guard=False, steps=20)
    work = job(chain, settings)
    block = block_pass(work, Progress())
    before = work.network.executions
    merged = module_pass(work, LATE, Progress(), block)
    assert work.network.executions > before
    fresh = module_pass(work, LATE, Progress())
    names = list(_own(chain, range(3)))
    assert same_state(merged.state, fresh.state, *names) and same_state(merged.state, block.state, *names)
    assert absolute(merged.losses)[:3] == absolute(fresh.losses)[:3] == absolute(block.losses)[:3]
    assert [r.reused for r in merged.records] == [True, True, True, False, False]
    assert not any(r.reused for r in fresh.records)
    for taken, made in zip(merged.records[:3], block.records[:3], strict=True):
        assert taken == replace(made, reused=True)
    assert merged.reused_seconds == sum(r.seconds for r in block.records[:3]) > 0


def _own(prepared: Prepared, modules: range) -> set[str]:
    """The quantizers inside ``modules``, by name."""
    nodes = Network(prepared.graph).nodes
    weights = set(fake_quantizers(prepared.graph))
    found = set()
    for i in modules:
        for node in nodes[prepared.modules[i].start : prepared.modules[i].stop]:
            found |= {str(n.target) for n in (node, *node.all_input_nodes) if n.target in weights}
    return found


def test_a_merge_at_the_front_reuses_nothing(chain: Prepared) -> None:
    work = job(chain, recipe(guard=False))
    block = block_pass(work, Progress())
    merged = module_pass(work, [[0, 1], [2], [3], [4], [5]], Progress(), block)
    assert not any(r.reused for r in merged.records) and merged.reused_seconds == 0


def test_only_a_warm_start_takes_over_more_than_the_units_in_front(chain: Prepared) -> None:
    """Behind a merge, every unit starts from the calibrated state again, as without a block pass."""
    groups = [[0], [1, 2], [3], [4], [5]]
    for warm in (False, True):
        work = job(chain, recipe(granularity="loss", guard=False, warm_start=warm, steps=8))
        block = block_pass(work, Progress())
        merged, fresh = module_pass(work, groups, Progress(), block), module_pass(work, groups, Progress())
        assert same_state(merged.state, fresh.state) is not warm


def test_reused_seconds_are_reported(chain: Prepared) -> None:
    for guard in (True, False):
        scheme = [["blocks.3", "head"]]
        runs, _ = run(chain, recipe(granularity="scheme", scheme=scheme, guard=guard, steps=3, measuring=1.0))
        if guard:
            assert runs[-1].reused_seconds == pytest.approx(sum(r.seconds for r in runs[0].unit_records[:4]), rel=0.5)
            assert runs[-1].reused_seconds > 0
        else:
            assert runs[-1].reused_seconds == 0  # nothing to take over: a scheme needs no block pass


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_the_calibration_batch_changes_speed_not_results(batch: int) -> None:
    settings = recipe("brecq-fast", steps=10, granularity="loss")
    reports = []
    for size in (64, batch):
        changed = replace(settings, calibration_batch=size)
        reports.append(run(prepare(Chain(2), images(24), changed), changed)[0][-1])
    assert reports[0].proposed_merges == reports[1].proposed_merges
    assert list(reports[0].module_losses.values()) == pytest.approx(list(reports[1].module_losses.values()), rel=0.02)


def test_a_quantized_run_learns_from_the_quantized_stream(chain: Prepared) -> None:
    """The second unit's result depends on what the first one left: streams carry the student's errors on."""
    work = job(chain, recipe(steps=20))
    usual = block_pass(work, Progress())
    other = block_pass(replace(work, recipe=recipe(steps=20, seed=3)), Progress())
    assert absolute(usual.losses)[1] != absolute(other.losses)[1]


class TestOverlap:
    """Units that are optimized along with modules behind them."""

    def test_what_is_optimized(self, chain: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each unit reaches over the module behind it, whose weights the next one starts from."""
        units: list[str] = []
        warm: list[set[str]] = []
        names = {quantizer: name for name, quantizer in fake_quantizers(chain.graph).items()}

        def spied(problem: Problem, *args: object, **settings: object) -> object:
            units.append(problem.name)
            warm.append({names[quantizer] for quantizer in settings["warm"]})  # type: ignore[attr-defined]
            return optimize(problem, *args, **settings)  # type: ignore[arg-type]

        monkeypatch.setattr("quiesce.reconstruct.loop.optimize", spied)
        made = module_pass(replace(job(chain, recipe()), overlap=1), [[0], [1, 2], [3], [4], [5]], Progress())
        assert units == [
            "stem + blocks.0",
            "blocks.0 + blocks.1 + blocks.2",
            "blocks.2 + blocks.3",
            "blocks.3 + head",
            "head",
        ]
        weights = [{n for n in _own(chain, range(i, i + 1)) if "weight" in n} for i in range(6)]
        assert warm == [set(), weights[1], weights[3], weights[4], weights[5]]
        assert [r.modules for r in made.records] == [["stem"], ["blocks.0", "blocks.1"], *([n] for n in NAMES[3:])]
        assert [r.steps for r in made.records] == [4, 8, 4, 4, 4]

    def test_it_ends_with_the_network(self, chain: Prepared) -> None:
        made = module_pass(replace(job(chain, recipe()), overlap=50), [[i] for i in range(6)], Progress())
        assert len(made.records) == len(made.losses) == 6

    def test_what_was_learned_ahead_is_built_on(self, chain: Prepared) -> None:
        """A unit whose own steps change nothing keeps what the unit before it learned."""
        work = replace(job(chain, recipe(steps=20)), overlap=1)
        walk = _Walk(work)
        restore(chain.graph, work.initial)
        first, second = work.modules[:2]
        walk.optimize(first, ["stem"], 20, False, Progress())
        ahead = {n: t.clone() for n, t in _state(chain).items() if n.partition(".")[0] in _own(chain, range(1, 2))}
        assert any(not torch.equal(t, work.initial[n]) for n, t in ahead.items())
        frozen = replace(work.reconstruction, rounding_lr=1e-9, step_size_lr=1e-12)
        walk.job = replace(work, reconstruction=frozen, overlap=0)
        walk.optimize(second, ["blocks.0"], 2, False, Progress())
        after = _state(chain)
        assert all(torch.equal(after[n], t) for n, t in ahead.items() if n.endswith("quantized"))

    @pytest.mark.parametrize("method", ["modcap", "loss-descent", "scheme"])
    @pytest.mark.parametrize("guard", [False, True])
    def test_merges_are_decided_without(self, chain: Prepared, method: str, guard: bool) -> None:
        scheme = [["blocks.0", "blocks.1"]] if method == "scheme" else None
        plain = recipe(granularity=method, scheme=scheme, guard=guard, steps=30, measuring=0.7)
        (before,), _ = run(chain, plain)
        (made,), done = run(chain, plain.with_settings(overlap=1))
        assert made.units == before.units and made.guard == before.guard
        assert made.module_losses != before.module_losses
        assert same_state(done.state, _state(chain))

    def test_full_passes_can_decide(self, chain: Prepared) -> None:
        settings = recipe(granularity="loss", measuring=1.0, overlap=1)
        (made,), _ = run(chain, settings)
        (_, plain), _ = run(chain, settings.with_settings(overlap=0))
        assert made.proposed_merges == plain.proposed_merges and made.guard == plain.guard
        assert made.measuring_steps == 4 and made.measuring_seconds > 0


def test_huge_seeds_work(chain: Prepared) -> None:
    settings = replace(recipe(steps=1), seed=2**62)
    _, done = run(chain, settings)
    assert len(done.losses) == 6
