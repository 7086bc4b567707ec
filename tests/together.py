"""What two processes do that share the images, to compare with one: ``together.py FOLDER`` leaves a file of each there.

Both are children of a process that has imported everything, and meet by a file in the folder.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from killed import child, wait
from quiesce.errors import QuiesceError
from quiesce.pipeline import job_of, quantize, run
from quiesce.preparation import Prepared, prepare
from quiesce.processes import Processes
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import Drop
from quiesce.recipe import Recipe
from quiesce.reconstruct import optimize as optimizing
from quiesce.reconstruct.batches import Batches, Problem
from quiesce.reconstruct.loop import _Walk
from quiesce.reconstruct.optimize import optimize
from quiesce.reconstruct.order import Order
from quiesce.reconstruct.step import Learned, Step
from quiesce.result import Result
from tiny import Chain, images, recipe
from transformer import transformer

SIZE = 2
STEPS = 50
SEED = 5
WHOLE = {"steps": 20, "batch_size": 8}
"""Settings of runs over the whole network; so few steps that merges are not decided by shorter passes."""
Found = dict[str, Any]


def exact() -> Recipe:
    return recipe("qdrop", steps=STEPS, batch_size=8)


def problem(processes: Processes, settings: Recipe) -> tuple[Problem, Recipe]:
    """The third block of a network in float64, quantized in front of it, and the recipe of each process."""
    start = prepare(Chain(4).double(), images(32).double(), settings, processes=processes)
    job = job_of(start, settings)
    walk, unit = _Walk(job), job.modules[2]
    walk.advance(unit.start)
    return walk._problem(unit), replace(job.recipe, reconstruction=job.reconstruction)


def orders(given: Problem, steps: int, batch: int, seed: int, window: None = None) -> Order:
    """Images of each step, those that ``SIZE`` processes would take, in the order of ranks."""
    found = []
    for rank in range(SIZE):
        part = Processes(rank, SIZE).share(given.images, given.together)
        share = replace(given, images=part.stop - part.start, processes=Processes(rank, SIZE))
        found.append(optimizing.batch_order(share, steps, batch // SIZE, seed).images + part.start)
    chosen = torch.cat(found, dim=1)
    return Order(chosen, chosen, torch.arange(given.images), torch.zeros(steps, dtype=torch.int64), given.images)


def steps(given: Problem, local: Recipe) -> dict[str, Tensor]:
    """Take steps with all that there is (drop, step sizes, penalty), and return losses and gradients of each."""
    learning = local.reconstruction
    assert learning is not None
    make = optimizing.batch_order if given.processes.size > 1 else orders
    order = make(given, STEPS, learning.batch_size, SEED).images
    drop = Drop(learning.drop_prob, Draws(SEED, given.device))
    learned = Learned.attach(given.module, learning, (), drop)
    step = Step(given, learning, learned, drop, 0.01, STEPS, Batches(given))
    losses, gradients = [], []
    for number in range(STEPS):
        losses.append(step.take(number, order[number]))
        gradients.append(torch.cat([v.grad.reshape(-1) for v in learned.variables() if v.grad is not None]))
    values = torch.cat([v.detach().reshape(-1) for v in learned.variables()])
    learned.harden()
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "values": values}


def prepared(processes: Processes, granularity: str) -> Prepared:
    """A small network, with held-out images if it is to be merged."""
    return prepare(
        Chain(4), images(64), whole(granularity), evaluate=images(256, seed=3), processes=processes, name="chain"
    )


def whole(granularity: str, seed: int = 0) -> Recipe:
    # λ as it is: where it is measured, processes measure it on other images than one does.
    return recipe(granularity=granularity, seed=seed, regularizer_weight=0.01, **WHOLE)


def made(start: Prepared, settings: Recipe, **more: Any) -> tuple[Result, dict[str, Tensor]]:
    runs, done = run(start, settings, **more)
    return start.result(runs, settings), done.state


def calibrated(processes: Processes | None) -> dict[str, Tensor]:
    """Scales and zero points of ranges that take random values of each image, and of layer norms."""
    settings = recipe("nearest", activation_range="percentile", activation_bits=8)
    found = prepare(Chain(2), images(33), settings, processes=processes).initial
    settings = recipe("nearest", activation_range="lp", activation_layer_norm="reparameterized", activation_bits=8)
    network = prepare(transformer(), images(9), settings, processes=processes)
    norms = {key: t for key, t in network.graph.named_buffers() if "_gain" in key or "_offset" in key}
    return {**{f"chain.{k}": t for k, t in found.items()}, **network.initial, **norms}


def fisher(start: Prepared) -> float:
    """How far the mean of all processes' Fisher weights, which each has scaled, is from 1."""
    job = job_of(start, recipe("brecq", fisher=True, **WHOLE))
    assert job.fisher is not None
    found = [start.processes.gather(rows[: len(rows)].reshape(len(rows), -1)).mean() for rows in job.fisher.values()]
    return max(abs(float(mean) - 1) for mean in found)


def collectives(processes: Processes) -> float:
    """The largest error of means, sums and gathered rows of random tensors."""
    worst = 0.0
    for seed in range(30):
        shape = torch.randint(0, 4, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
        each = []
        for rank in range(processes.size):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            rows = int(torch.randint(0, 5, (), generator=generator))
            each.append((torch.randn(shape, generator=generator).double(), torch.randn(rows, 3, generator=generator)))
        mine, rows = each[processes.rank]
        expected = sum(value for value, _ in each)
        total = processes.sum(mine)
        means = [mine.clone().t(), mine.float()]
        processes.mean_(means)
        worst = max(worst, _error(total, expected), _error(means[0], expected.t() / processes.size))
        worst = max(worst, _error(means[1].double(), sum(v.float().double() for v, _ in each) / processes.size))
        worst = max(worst, _error(processes.gather(rows), torch.cat([r for _, r in each])))
    texts = processes.texts("é" * processes.rank)
    assert texts == ["", "é"] and processes.from_first({"rank": processes.rank}) == {"rank": 0}
    assert processes.place(3 + processes.rank) == ((0, 7) if processes.first else (3, 7))
    return worst


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) if found.numel() else 0.0


def said(work: Callable[[], object]) -> str:
    try:
        work()
    except QuiesceError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def not_finite(given: Problem, local: Recipe) -> str:
    """What a unit says whose targets are NaN in one of the processes alone."""
    if given.processes.rank == 1:
        given = replace(given, targets=[torch.full_like(t[: len(t)], math.nan) for t in given.targets])
    learning = local.reconstruction
    assert learning is not None
    settings: Found = {"steps": 4, "regularizer_weight": 0.01, "warm": (), "seed": 0, "on_step": lambda: None}
    return said(lambda: optimize(given, learning, **settings))


class InterruptError(Exception):
    pass


def interrupted(start: Prepared, place: Path) -> tuple[Result, dict[str, Tensor]]:
    """Stop a run behind some units, in all processes, and begin it again."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "blocks.2":
            raise InterruptError

    try:
        run(start, whole("loss"), progress_folder=place, progress=stop)
        raise AssertionError("the run was to be stopped")
    except InterruptError:
        return made(start, whole("loss"), progress_folder=place)


def work(folder: Path, rank: int) -> None:
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    processes = Processes.current()
    about: Found = {"processes": [processes.rank, processes.size], "collectives": collectives(processes)}
    given = problem(processes, exact())
    tensors = {f"steps.{k}": t for k, t in steps(*given).items()}
    about["not finite"] = not_finite(*given)
    tensors |= {f"calibrated.{k}": t for k, t in calibrated(processes).items()}
    plain, merged = prepared(processes, "block"), prepared(processes, "loss")
    about["fisher"] = fisher(plain)
    found = {"plain": made(plain, whole("block")), "merged": made(merged, whole("loss"))}
    found["resumed"] = interrupted(merged, folder / f"progress-{rank}")  # only the first one's is used
    for name, (result, state) in found.items():
        about[name] = json.loads(result.to_json())
        tensors |= {f"{name}.{k}": t for k, t in state.items()}
    about["unlike"] = said(lambda: quantize(Chain(1, seed=rank), images(8), recipe("nearest"), processes=processes))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{rank}.safetensors")
    if rank == 0:
        about["lost"] = said(lambda: processes.gather(torch.zeros(1)))  # the other one is gone
    (folder / f"{rank}.json").write_text(json.dumps(about))
    os._exit(0)


def told(work: Callable[[], object]) -> None:
    """Do ``work``, and let an error be read in the log of the child process."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        raise


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    prepare(Chain(1), images(8), recipe("nearest"))  # imports all that is imported late
    begun = [child(lambda rank=rank: told(lambda: work(place, rank)), place / f"log-{rank}") for rank in range(SIZE)]  # type: ignore
    sys.exit(max(abs(wait(process)) for process in begun))
