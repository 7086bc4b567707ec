from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quiesce.graph.partition import partition
from quiesce.memory import Memory
from quiesce.pipeline import Prepared, _job, prepare, run
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore
from quiesce.reconstruct.granular import block_pass, merged_pass
from quiesce.reconstruct.loop import Job, Pass, layer_pass, measure_pass
from quiesce.reconstruct.plan import Needs, Sizes, plan, reserve
from quiesce.reconstruct.streams import Network
from tiny import Assorted, Chain, absolute, images, job, recipe, same_state

CPU = torch.device("cpu")


def block(work: Job) -> Pass:
    return block_pass(work, Progress())


def layers(work: Job) -> Pass:
    return layer_pass(work, partition(work.network.gm, "layer"), Progress())


def guarded(work: Job) -> Pass:
    assert work.recipe.granularity is not None
    return merged_pass(work, work.recipe.granularity, Progress(), None).kept


PASSES: dict[str, tuple[Callable[[Job], Pass], dict[str, object]]] = {
    "block": (block, {}),
    "layer": (layers, {"granularity": "layer"}),
    "Fisher": (block, {"fisher": True}),
    "guarded": (guarded, {"granularity": "loss"}),
    "measured": (measure_pass, {}),
}


@pytest.mark.parametrize("stream_dtype", ["same", "bf16"])
@pytest.mark.parametrize("name", PASSES)
def test_results_are_the_same_bit_for_bit_wherever_streams_are(name: str, stream_dtype: str) -> None:
    make, settings = PASSES[name]
    chosen = recipe(stream_dtype=stream_dtype, **settings)
    prepared = prepare(Assorted(), images(32), chosen)
    found = {}
    working = Memory()
    reserve(working, [Needs.of(Network(prepared.graph), m) for m in prepared.modules], Sizes.of(chosen, 1))
    budgets = (None, 0, working.reserved + 70_000)  # on the device, in files, in both
    for budget in budgets:
        restore(prepared.graph, prepared.initial)
        memory = Memory(CPU, budget, narrow=stream_dtype == "bf16")
        done = make(_job(prepared, chosen, memory))
        found[budget] = (done.state, absolute(done.losses), [r.loss_curve for r in done.records])
        assert (memory.most["file"] > 0) is (budget is not None)
        assert memory.held == dict.fromkeys(memory.held, 0) or name == "Fisher"
    for budget in budgets[1:]:
        assert same_state(found[None][0], found[budget][0]) and found[None][1:] == found[budget][1:]


def test_streams_in_bfloat16_change_little(chain: Prepared) -> None:
    losses = {}
    for stream_dtype in ("same", "bf16"):
        (report,), _ = run(chain, recipe("nearest", stream_dtype=stream_dtype))
        losses[stream_dtype] = list(report.module_losses.values())
    assert losses["bf16"] != losses["same"]
    assert losses["bf16"] == pytest.approx(losses["same"], rel=0.02)


def test_networks_in_float64_keep_it() -> None:
    found = []
    for stream_dtype in ("same", "bf16"):
        chosen = recipe(stream_dtype=stream_dtype)
        prepared = prepare(Chain(2).double(), images(16).double(), chosen)
        _, done = run(prepared, chosen)
        found.append(done.state)
    assert same_state(*found)


@pytest.mark.parametrize("budget", [0, 32_600_000, None])
def test_the_plan_is_what_a_walk_does(budget: int | None) -> None:
    prepared = prepare(Assorted(), images(32), recipe())
    sizes = Sizes(8, 64)
    planned, walked = Memory(CPU, budget), Memory(CPU, budget)
    rows = plan(Network(prepared.graph, planned), prepared.modules, planned, 32, sizes)
    work = job(prepared, recipe(), walked)
    seen = []
    made = walked.room

    def room(like: torch.Tensor, count: int) -> object:
        rows = made(like, count)
        seen.append(dict(walked.held))
        return rows

    walked.room = room  # type: ignore[method-assign, assignment]
    block(work)
    assert planned.most == walked.most
    assert [row.streams for row in rows] == [held for held in seen if held in [row.streams for row in rows]]
    assert [row.unit for row in rows] == [m.name for m in prepared.modules]
