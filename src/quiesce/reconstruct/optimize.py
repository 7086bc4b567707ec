"""Optimize one unit: learn its rounding and step sizes so that its output matches the float one.

One loop for all methods: AdaRound, BRECQ and QDrop differ in the unit's extent, the drop, and what is learned. Nothing
is read back from the device but every hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quiesce.errors import ModelError
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import (
    Drop,
    WeightFakeQuantize,
    fake_quantizers,
    float_mode,
    restore,
    snapshot,
)
from quiesce.recipe import ReconstructionRecipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.cuda_graph import WARM_STEPS, StepGraph, captured, obstacle, on_a_stream
from quiesce.reconstruct.fuse import Clip, without_clips
from quiesce.reconstruct.losses import reconstruction_loss
from quiesce.reconstruct.order import Order, draw_order
from quiesce.reconstruct.resident import Residents
from quiesce.reconstruct.step import Learned, Step

CURVE_POINTS = 50
"""Points of the loss curve that is kept."""
CHECKED_STEPS = 100
"""Steps after which it is looked whether losses are still finite, and where a unit goes back to if they are not."""
SLOWER = 0.1
"""Factor on the learning rates after going back."""
MOST_RETURNS = 3
"""Times that a unit goes back before it is given up."""


@dataclass(frozen=True)
class Course:
    """How an optimization went."""

    curve: list[list[float]]
    """Pairs ``[step, loss]``: the reconstruction loss (no regularizer) averaged since the pair before."""
    returns: int = 0
    """Times it went back to an earlier step, as the loss was no longer finite."""
    undecided: float = 0.0
    """Share of weights whose rounding was still more than a tenth of a step size from an integer at the end."""
    cuda_graph: str | None = None
    """How steps were launched on a GPU: "captured", as a CUDA graph, or "eager", and why; None elsewhere."""


def optimize(
    problem: Problem,
    recipe: ReconstructionRecipe,
    *,
    steps: int,
    regularizer_weight: float | None,
    warm: Collection[WeightFakeQuantize] = (),
    seed: int,
    on_step: Callable[[], None],
    fused: bool = False,
    micro_batch: int | None = None,
    graphs: bool = True,
) -> Course:
    """Learn the unit's state in place and harden it.

    The unit must have something to learn (:meth:`~quiesce.reconstruct.streams.Network.learns`). ``fused`` runs
    elementwise maths as compiled kernels (:mod:`quiesce.quant.kernels`), ``graphs`` steps on a GPU as a CUDA graph
    (:mod:`quiesce.reconstruct.cuda_graph`), where that can be. A step works on ``micro_batch`` images at a
    time (None: all of its batch). The weights of the quantizers ``warm`` start from the integers they hold.
    ``regularizer_weight`` None is ``recipe.relative_regularizer`` times the unit's :func:`error_per_weight`.

    Raises:
        ModelError: the loss is not finite, however small the learning rates; the unit is hardened as it was before.
    """
    if regularizer_weight is None:
        assert recipe.relative_regularizer is not None
        regularizer_weight = recipe.relative_regularizer * error_per_weight(problem, recipe.batch_size, micro_batch)
    draws = Draws(seed, problem.device, fused=fused)
    drop = Drop(recipe.drop_prob, draws) if recipe.drop_prob > 0 else None
    clips: dict[str, Clip] = {}
    if fused:
        module, clips = without_clips(problem.module)
        problem = replace(problem, module=module)
    learned = Learned.attach(problem.module, recipe, warm, drop, fused=fused, clips=clips)
    order = batch_order(problem, steps, recipe.batch_size, seed, recipe.resident_images)
    try:
        with on_a_stream(problem.device), Batches(problem) as batches:
            residents = None
            if batches.ahead and order.size < problem.images:
                residents = Residents(batches, order, recipe.batch_size)
                problem, batches = residents.problem, Batches(residents.problem)
            step = Step(problem, recipe, learned, drop, regularizer_weight, steps, batches, micro_batch, fused)
            return _run(step, order, residents, on_step, graphs)
    finally:
        learned.harden()


@torch.no_grad()
def error_per_weight(problem: Problem, images: int, at_a_time: int | None = None) -> float:
    """Return the loss of the unit when nothing but its weights is quantized, to nearest, over the number of weights.

    It is measured on the first ``images``, ``at_a_time`` of them (None: all), with float inputs, and leaves the unit as
    it is. It is 0 for a unit without weights to round.
    """
    quantizers = fake_quantizers(problem.module)
    weights = {name: q for name, q in quantizers.items() if isinstance(q, WeightFakeQuantize)}
    number = sum(q.quantized.numel() for q in weights.values())
    if number == 0:
        return 0.0
    before = snapshot(problem.module)
    for node in problem.module.graph.nodes:
        if node.op == "call_module" and str(node.target) in weights:
            weights[str(node.target)].round_to_nearest(getattr(problem.module, str(node.args[0].target)))
    chosen = torch.arange(min(images, problem.images))
    total = torch.zeros((), dtype=problem.targets[0].dtype, device=problem.device)
    try:
        with float_mode(problem.module):
            for quantizer in weights.values():
                quantizer.enabled = True
            for part in torch.split(chosen, at_a_time or len(chosen)):
                batch = Batch.of(problem, part)
                outputs = problem.module(*batch.float_inputs)
                total += reconstruction_loss(outputs, batch.targets, batch.weights) * (len(part) / len(chosen))
    finally:
        restore(problem.module, before)
    problem.processes.mean_([total])
    return float(total) / number


def batch_order(problem: Problem, steps: int, batch_size: int, seed: int, window: int | None = None) -> Order:
    """Return the batches of all steps (:func:`~quiesce.reconstruct.order.draw_order`); each process has its own."""
    generator = torch.Generator().manual_seed(problem.processes.seed(seed))
    return draw_order(problem.images, steps, batch_size, generator, window=window, together=problem.together)


def _run(step: Step, order: Order, residents: Residents | None, on_step: Callable[[], None], graphs: bool) -> Course:
    """Take all steps; when the loss is no longer finite, go back to where it was, and on at smaller rates."""
    problem, steps = step.problem, step.steps
    images = order.images if residents is None else order.places
    losses = torch.zeros(steps, device=problem.device)
    good, state, returns, number = 0, step.state(), 0, 0
    reported = 0
    graph: StepGraph | str | None = obstacle(step) if graphs else "not asked for"
    while number < steps:
        if residents is not None:
            residents.move_to(number)
        if graph is None and number == WARM_STEPS:
            graph = captured(step, images, losses, number)
        if isinstance(graph, StepGraph):
            graph.take(number)
        else:
            following = images[number + 1] if number + 1 < steps else None
            losses[number].copy_(step.take(number, images[number], following))
        number += 1
        if number > reported:
            on_step()
            reported = number
        if number % CHECKED_STEPS == 0 or number == steps:
            if _finite([losses[good:number], *step.learned.variables()]):
                good, state = number, step.state()
                continue
            step.go_back(state)
            returns += 1
            if returns > MOST_RETURNS:
                raise ModelError(
                    f"unit {problem.name}: the loss gets NaN or infinite behind step {good}, at learning rates of "
                    f"{SLOWER**MOST_RETURNS:g} of the recipe's too; leave its layers float, or lower rounding_lr and "
                    "step_size_lr."
                )
            step.schedule.slow_down(SLOWER)
            number = good
    launched = None
    if problem.device.type == "cuda":
        launched = "captured" if isinstance(graph, StepGraph) else f"eager: {graph}"
    return Course(_curve(losses), returns, step.learned.undecided(), launched)


def _finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def _curve(losses: Tensor) -> list[list[float]]:
    values = losses.tolist()
    size = max(1, math.ceil(len(values) / CURVE_POINTS))
    return [
        [min(i + size, len(values)), sum(values[i : i + size]) / len(values[i : i + size])]
        for i in range(0, len(values), size)
    ]
