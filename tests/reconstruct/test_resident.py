from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from quiesce.errors import MemoryLimitError
from quiesce.memory import Memory, Stored, parse_bytes
from quiesce.pipeline import job_of
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.fake_quantize import restore, snapshot
from quiesce.recipe import Recipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.granular import block_pass
from quiesce.reconstruct.loop import _Walk
from quiesce.reconstruct.optimize import batch_order
from quiesce.reconstruct.resident import Residents
from tiny import Chain, images, job, recipe, same_state

CPU = torch.device("cpu")


@pytest.fixture
def problem(chain: Prepared) -> Problem:
    """A block with Fisher weights, all of its tensors in files."""
    settings = recipe(fisher=True)
    restore(chain.graph, chain.initial)
    walk = _Walk(job_of(chain, settings, Memory(CPU, 0)))
    walk.advance(chain.modules[1].start)
    return replace(walk._problem(chain.modules[1]), first=100)


def same(first: Batch, second: Batch) -> bool:
    pairs = zip(first.tensors, second.tensors, strict=True)
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


@pytest.mark.parametrize("at_a_time", [1, 4, 7])
def test_batches_of_the_window_are_those_of_all_images(problem: Problem, at_a_time: int) -> None:
    order = batch_order(problem, 40, 4, 0, window=8)
    assert problem.images == 24 and order.first[-1] == 88
    with Batches(problem) as source:
        residents = Residents(source, order, at_a_time)
        assert all(len(rows) == 8 and not isinstance(rows, Stored) for rows in residents.problem.rows)
        for step in (*range(25), *range(13, 40), 0, 39):  # goes back twice
            residents.move_to(step)
            found = Batch.of(residents.problem, order.places[step])
            assert same(found, Batch.of(problem, order.images[step]))
            assert found.images.min() >= 100


def learned(settings: Recipe, memory: Memory) -> dict[str, torch.Tensor]:
    prepared = prepare(Chain(3), images(48), settings)
    block_pass(job(prepared, settings, memory), Progress())
    return snapshot(prepared.graph)


@pytest.mark.parametrize("preset", ["brecq-fast", "qdrop-fast"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_where_tensors_are_does_not_change_what_is_learned(
    preset: str, micro_batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    original = Residents.move_to
    monkeypatch.setattr(Residents, "move_to", lambda self, step: (moved.append(step), original(self, step)))
    if micro_batch:
        monkeypatch.setattr("quiesce.reconstruct.loop.step_images", lambda *_: micro_batch)
    settings = recipe(preset, resident_images=16, steps=30)
    near = learned(settings, Memory(CPU))
    assert not moved
    far = learned(settings, Memory(CPU, 0))
    assert moved
    assert same_state(near, far)
    assert not same_state(near, learned(recipe(preset, steps=30), Memory(CPU)))


def test_a_window_of_all_images_changes_nothing() -> None:
    settings = recipe(resident_images=48, steps=10)
    assert same_state(learned(settings, Memory(CPU, 0)), learned(recipe(steps=10), Memory(CPU)))


def test_room_is_kept_for_it() -> None:
    few, many = (least_budget(recipe(resident_images=n)) for n in (8, 40))
    rows = 3 * 8 * 8 * 8 * 4  # both inputs and the target, float32
    assert many - few == pytest.approx(1.01 * 32 * rows, rel=0.01)


def least_budget(settings: Recipe) -> float:
    """The bytes that the error of a budget that is too small asks for."""
    prepared = prepare(Chain(3), images(48), settings)
    with pytest.raises(MemoryLimitError, match="the least is ") as caught:
        block_pass(job(prepared, settings, Memory(CPU, 1000, stated=True)), Progress())
    return parse_bytes(re.findall(r"least is (.*?),", str(caught.value))[0])
