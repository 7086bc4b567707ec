from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quiesce.errors import MemoryLimitError
from quiesce.memory import Memory
from quiesce.pipeline import job_of
from quiesce.preparation import Prepared, prepare
from quiesce.progress import Progress
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import Drop, restore, snapshot
from quiesce.recipe import Recipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.granular import block_pass
from quiesce.reconstruct.loop import Pass, _Walk
from quiesce.reconstruct.step import Learned, Step
from tiny import Chain, images, recipe, same_state

CPU = torch.device("cpu")


@pytest.fixture(params=[None, 0], ids=["device", "file"])
def problem(request: pytest.FixtureRequest, chain: Prepared) -> Problem:
    """A block with Fisher weights, all of its tensors on the device or in files."""
    settings = recipe(fisher=True)
    restore(chain.graph, chain.initial)
    walk = _Walk(job_of(chain, settings, Memory(CPU, request.param)))
    walk.advance(chain.modules[1].start)
    return walk._problem(chain.modules[1])


def test_batches_are_rows_of_the_problem_asked_for_in_any_order(problem: Problem) -> None:
    order = torch.stack([torch.randperm(24)[:5] for _ in range(4)])
    threads = threading.active_count()
    with Batches(problem) as batches:
        for number, following in ((0, 1), (1, 2), (2, 3), (1, 2), (3, None), (0, None)):
            batch = batches.of(order[number], None if following is None else order[following])
            groups = (problem.quantized_inputs, problem.float_inputs, problem.targets, problem.weights)
            found = (batch.quantized_inputs, batch.float_inputs, batch.targets, batch.weights)
            assert torch.equal(batch.images, order[number])
            for rows, taken in zip(groups, found, strict=True):
                assert rows and taken
                for r, t in zip(rows, taken, strict=True):
                    assert torch.equal(t, r[:][order[number]])
    assert threading.active_count() == threads


def test_a_tensor_of_both_streams_is_gathered_once(chain: Prepared) -> None:
    problem = _Walk(job_of(chain, recipe(), Memory(CPU, 0)))._problem(chain.modules[0])
    batch = Batch.of(problem, torch.arange(3))
    assert batch.quantized_inputs[0] is batch.float_inputs[0]


def gradients(problem: Problem, settings: Recipe, micro_batch: int) -> tuple[Tensor, list[Tensor]]:
    assert settings.reconstruction is not None
    before = snapshot(problem.module)
    drop = Drop(0.5, Draws(3, CPU))
    learned = Learned.attach(problem.module, settings.reconstruction, (), drop)
    for variable in learned.variables():
        variable.register_hook(lambda g: g)
    with Batches(problem) as batches:
        step = Step(problem, settings.reconstruction, learned, drop, 0.0, 10, batches, micro_batch)
        step.optimizers = [None, None, None]
        loss = step.take(2, torch.arange(8) * 3)
    found = [v.grad.clone() for v in learned.variables() if v.grad is not None]
    learned.harden()
    restore(problem.module, before)
    return loss, found


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize("fisher", [False, True])
def test_gradients_of_parts_add_up_to_the_batch(fisher: bool, micro_batch: int) -> None:
    """In float64, with QDrop's random elements, which depend on the image and not on its neighbours."""
    settings = recipe(fisher=fisher)
    prepared = prepare(Chain(2).double(), images(32).double(), settings)
    walk = _Walk(job_of(prepared, settings, Memory()))
    walk.advance(prepared.modules[1].start)
    problem = walk._problem(prepared.modules[1])
    loss, whole = gradients(problem, settings, 8)
    again, parts = gradients(problem, settings, micro_batch)
    assert len(whole) == len(parts) == 4
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for a, b in zip(parts, whole, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception, int], None]:
    """Lets steps on more than so many images run out of memory, from step number ``first`` on."""
    whole = Step.loss

    def install(most: int, error: Exception, first: int = 0) -> None:
        def loss(self: Step, step: int, batch: Batch) -> Tensor:
            if len(batch.images) > most and step >= first:
                raise error
            return whole(self, step, batch)

        monkeypatch.setattr(Step, "loss", loss)

    return install


def passed(prepared: Prepared, settings: Recipe, progress: Progress | None = None) -> Pass:
    restore(prepared.graph, prepared.initial)
    return block_pass(job_of(prepared, settings, Memory()), progress or Progress())


ERRORS = (torch.OutOfMemoryError("CUDA out of memory."), MemoryError())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_out_of_memory_halves_the_images_of_a_step_and_begins_the_unit_again(
    chain: Prepared, failing: Callable[[int, Exception, int], None], error: Exception
) -> None:
    """The result is that of a run that began with as many images: what failed half-way has left no trace."""
    settings = recipe(steps=6)
    failing(2, error, 0)
    expected = passed(chain, settings)
    failing(2, error, 3)
    ticks: list[tuple[str, int, int]] = []
    found = passed(chain, settings, Progress(lambda *a: ticks.append(a)))
    assert [r.micro_batch for r in found.records] == [2] * 6
    assert same_state(found.state, expected.state)
    assert [r.loss_curve for r in found.records] == [r.loss_curve for r in expected.records]
    assert ticks[-1][1] == ticks[-1][2] == 6 * 6 + 6 * 2 * 3  # what was done in vain is added to the plan
    failing(8, error, 0)
    whole = passed(chain, settings)
    assert [r.micro_batch for r in whole.records] == [None] * 6
    curves = [[loss for _, loss in made.records[0].loss_curve] for made in (found, whole)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)  # of the first unit: others are fed another rounding


def test_what_does_not_fit_at_one_image_is_an_error(
    chain: Prepared, failing: Callable[[int, Exception, int], None]
) -> None:
    failing(0, ERRORS[0], 0)
    with pytest.raises(MemoryLimitError, match="unit stem does not fit the memory of cpu, even at 1 images at a time"):
        passed(chain, recipe())


def test_other_errors_pass(chain: Prepared, failing: Callable[[int, Exception, int], None]) -> None:
    failing(2, RuntimeError("something else"), 0)
    with pytest.raises(RuntimeError, match="something else"):
        passed(chain, recipe())


STARVED = """
import resource, torch
from quiesce.pipeline import run
from quiesce.preparation import prepare
from tiny import Chain, images, recipe

settings = recipe(batch_size=64, steps=3, calibration_batch=4)
prepared = prepare(Chain(1, channels=64), images(64, size=64), settings)
torch.ones(1, requires_grad=True).sum().backward()  # starts autograd's threads
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
(report,), _ = run(prepared, settings)
print([r.micro_batch for r in report.unit_records])
"""


def test_a_process_that_may_take_no_more_memory_goes_on_with_fewer_images() -> None:
    # Each thread that has to wait for another one's allocation reserves 64 MiB of addresses for its own.
    once = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command, place = [sys.executable, "-c", STARVED], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=place, env=once, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(size in (32, 16, 8, 4, 2) for size in eval(done.stdout))
