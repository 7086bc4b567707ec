from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quiesce.errors import MemoryLimitError
from quiesce.graph.partition import partition
from quiesce.memory import Memory
from quiesce.pipeline import job_of, run
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore
from quiesce.reconstruct.granular import block_pass, merged_pass
from quiesce.reconstruct.loop import Job, Pass, layer_pass, measure_pass
from quiesce.reconstruct.plan import Sizes, plan, reserve
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
    sizes = Sizes.of(chosen, 1)
    reserve(Network(prepared.graph, working), prepared.modules, sizes)
    budgets = (None, 0, working.reserved + 70_000)  # on the device, in files, in both
    for budget in budgets:
        restore(prepared.graph, prepared.initial)
        memory = Memory(CPU, budget, narrow=stream_dtype == "bf16")
        done = make(job_of(prepared, chosen, memory))
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
    rows = plan(Network(prepared.graph, planned), prepared.modules, 32, sizes)
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


BUDGETED = """
import sys, torch
from quiesce.memory import Peak
from quiesce.pipeline import run
from quiesce.preparation import prepare
from tiny import Chain, images, recipe

prepare(Chain(1), images(8), recipe())  # what torch loads when it is first used is no part of the run
settings = recipe(batch_size=4, steps=3, calibration_batch=8)
calibration = images(256, size=64)
memory = None if sys.argv[1] == "none" else sys.argv[1]
with Peak(torch.device("cpu")) as peak:
    prepared = prepare(Chain(2, channels=32), calibration, settings, memory=memory)
    (report,), done = run(prepared, settings)
print(peak.bytes, report.memory.file, hash(tuple(done.state["stem_weight_quantizer.quantized"].flatten().tolist())))
"""


def test_a_run_stays_within_its_budget() -> None:
    found = {}
    for budget in ("none", "200MB"):
        done = subprocess.run(
            [sys.executable, "-c", BUDGETED, budget],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        found[budget] = [int(word) for word in done.stdout.split()]
    assert found["200MB"][0] < 200 * 10**6 < 400 * 10**6 < found["none"][0]
    assert found["none"][1] == 0 < 400 * 10**6 < found["200MB"][1]
    assert found["200MB"][2] == found["none"][2]


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_done() -> None:
    with pytest.raises(MemoryLimitError, match=r"a memory budget of 20 MB is too small .* the least is 3\d\.\d MB"):
        prepare(Chain(2), images(16), recipe(), memory="20MB")


def test_a_small_budget_makes_steps_of_fewer_images(chain: Prepared) -> None:
    """The budget that the message of the least names suffices."""
    settings = recipe()
    with pytest.raises(MemoryLimitError) as refused:
        prepare(Chain(4), images(32), settings, memory=10**6)
    least = str(refused.value).split("the least is ")[1].split(",")[0].replace(" ", "")
    (report,), _ = run(prepare(Chain(4), images(32), settings, memory=least), settings)
    assert {r.micro_batch for r in report.unit_records} <= {None, 1, 2, 4}
    assert min(r.micro_batch or 8 for r in report.unit_records) < 8
    assert report.memory.budget is not None and report.memory.file > 0


@pytest.mark.gpu
def test_places_beside_a_gpu_give_the_same_bits() -> None:
    device = torch.device("cuda")
    chosen = recipe(fisher=True)
    prepared = prepare(Assorted().to(device), images(32), chosen)
    found = {}
    for place, memory in {
        "device": Memory(device),
        "host": Memory(device, 0),
        "file": Memory(device, 0, 0),
    }.items():
        restore(prepared.graph, prepared.initial)
        done = block(job_of(prepared, chosen, memory))
        found[place] = done.state
        assert memory.most[place] > 0
    assert same_state(found["device"], found["host"]) and same_state(found["device"], found["file"])


def test_resnet50_at_4096_images_fits_four_gigabytes() -> None:
    torchvision = pytest.importorskip("torchvision")
    prepared = prepare(torchvision.models.resnet50(weights=None).eval(), images(2, size=224), recipe("nearest"))
    memory = Memory(torch.device("cuda"), 4 * 10**9, stated=True)
    rows = plan(Network(prepared.graph, memory), prepared.modules, 4096, Sizes(32, 64))
    assert max(row.device for row in rows) < 3.2 * 10**9
    assert {row.step_images for row in rows} == {32}
    # Four tensors [4096, 256, 56, 56] of 4 bytes, inputs and outputs of both streams, behind the first block.
    assert max(row.streams["host"] for row in rows) == 4 * 4096 * 256 * 56 * 56 * 4
