"""Optimize one unit: learn its rounding and step sizes so that its output matches the float one.

One loop for all methods: AdaRound, BRECQ and QDrop differ in the unit's extent, the drop, and what is learned. A step
is a static function of images, β and learning rates: what is constant is made before the first one, and nothing is
read back from the device but every hundred steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from quiesce.errors import ModelError
from quiesce.quant.draws import Draws
from quiesce.quant.fake_quantize import (
    ActivationFakeQuantize,
    Drop,
    WeightFakeQuantize,
    fake_quantizers,
    float_mode,
    restore,
    snapshot,
)
from quiesce.quant.kernels import NO_CLIP
from quiesce.quant.rounding.rounding import Rounding
from quiesce.recipe import ReconstructionRecipe
from quiesce.reconstruct.batches import Batch, Batches, Problem
from quiesce.reconstruct.fuse import Clip, without_clips
from quiesce.reconstruct.losses import squared_error, weighted_squared_error

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
) -> Course:
    """Learn the unit's state in place and harden it.

    The unit must have something to learn (:meth:`~quiesce.reconstruct.streams.Network.learns`). ``fused`` runs
    elementwise maths as compiled kernels (:mod:`quiesce.quant.kernels`). A step works on ``micro_batch`` images at a
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
    try:
        with Batches(problem) as batches:
            step = Step(problem, recipe, learned, drop, regularizer_weight, steps, batches, micro_batch)
            return _run(step, seed, on_step)
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
                total += _loss(problem.module(*batch.float_inputs), batch) * (len(part) / len(chosen))
    finally:
        restore(problem.module, before)
    problem.processes.mean_([total])
    return float(total) / number


def _loss(outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """Return the reconstruction loss: the squared errors of all outputs, weighted where there are weights."""
    total = []
    for i, (output, target) in enumerate(zip(outputs, batch.targets, strict=True)):
        if batch.weights is None:
            total.append(squared_error(output, target))
        else:
            total.append(weighted_squared_error(output, target, batch.weights[i]))
    return total[0] if len(total) == 1 else torch.stack(total).sum()


@dataclass
class Learned:
    """What a unit learns: a rounding per weight, a step size per activation."""

    weights: list[WeightFakeQuantize]
    activations: list[ActivationFakeQuantize]
    step_sizes: list[Tensor]

    @classmethod
    def attach(
        cls,
        module: fx.GraphModule,
        recipe: ReconstructionRecipe,
        warm: Collection[WeightFakeQuantize],
        drop: Drop | None,
        *,
        fused: bool = False,
        clips: Mapping[str, Clip] = MappingProxyType({}),
    ) -> Learned:
        weights: list[WeightFakeQuantize] = []
        activations: list[ActivationFakeQuantize] = []
        for node in module.graph.nodes:
            quantizer = getattr(module, str(node.target)) if node.op == "call_module" else None
            if isinstance(quantizer, WeightFakeQuantize):
                weight = getattr(module, str(node.args[0].target))
                quantizer.start_rounding(recipe.rounding, weight, quantizer in warm, fused=fused)
                weights.append(quantizer)
            elif isinstance(quantizer, ActivationFakeQuantize):
                clip, number = clips.get(str(node.target), NO_CLIP), len(activations)
                quantizer.start_learning(recipe.learn_step_sizes, drop, number, fused=fused, clip=clip)
                activations.append(quantizer)
        return cls(weights, activations, [q.scale for q in activations if recipe.learn_step_sizes])

    def roundings(self) -> list[Rounding]:
        return [q.rounding for q in self.weights if q.rounding is not None]

    def variables(self) -> list[Tensor]:
        return [*(r.V for r in self.roundings()), *self.step_sizes, *self.weight_step_sizes()]

    def weight_step_sizes(self) -> list[nn.Parameter]:
        return [r.step_sizes for r in self.roundings() if r.step_sizes is not None]

    def harden(self) -> None:
        for quantizer in self.weights:
            quantizer.harden()
        for activation in self.activations:
            activation.stop_learning()


class Step:
    """One step: draw, forward, backward, update."""

    def __init__(
        self,
        problem: Problem,
        recipe: ReconstructionRecipe,
        learned: Learned,
        drop: Drop | None,
        regularizer_weight: float,
        steps: int,
        batches: Batches | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """``micro_batch`` images are worked on at a time, None: all of a batch; ``batches`` gathers them ahead."""
        self.batches = batches or Batches(problem)
        self.micro_batch = micro_batch or recipe.batch_size
        self.problem, self.recipe, self.learned, self.drop, self.steps = problem, recipe, learned, drop, steps
        self.roundings = learned.roundings()
        self.rounding_optimizers = _adam([r.V for r in self.roundings], recipe.rounding_lr)
        self.step_size_optimizers = _adam(learned.step_sizes, recipe.step_size_lr)
        self.weight_step_size_optimizers = _adam(learned.weight_step_sizes(), recipe.weight_step_size_lr)
        self.floors = [scale.detach() * 1e-3 for scale in learned.step_sizes]
        self.slowness = 1.0
        """Factor on the learning rates."""
        self.warmup = int(recipe.warmup * steps) if regularizer_weight > 0 else steps
        device, dtype = problem.device, problem.targets[0].dtype
        self.numbers = torch.arange(steps, device=device)
        self.betas = torch.tensor([_beta(t, steps, recipe) for t in range(steps)], dtype=dtype, device=device)
        self.regularizer_weight = torch.tensor(regularizer_weight, dtype=dtype, device=device)

    def take(self, step: int, images: Tensor, following: Tensor | None = None) -> Tensor:
        """Take step number ``step`` on ``images`` (their numbers), and return the reconstruction loss before it.

        Gradients of parts of the batch add up to the batch's, as losses are means over images; so those of several
        processes, which take as many images each, are averaged. ``following`` are the images of the next step.
        """
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts = torch.split(images, self.micro_batch)
        total = torch.zeros_like(self.regularizer_weight)
        for part, behind in zip(parts, [*parts[1:], following], strict=True):
            loss = self.loss(step, self.batches.of(part, None if behind is None else behind[: self.micro_batch]))
            if len(parts) > 1:
                loss = loss * (len(part) / len(images))
            loss.backward()
            total += loss.detach()
        gradients = [v.grad for v in self.learned.variables() if v.grad is not None]
        self.problem.processes.mean_([total, *gradients])
        if step >= self.warmup:
            for rounding in self.roundings:
                rounding.add_penalty(self.betas[step], self.regularizer_weight)
        self._set_rates(step)
        for optimizer in self._optimizers:
            optimizer.step()
        self._keep_positive()
        return total

    def loss(self, step: int, batch: Batch) -> Tensor:
        """Return the reconstruction loss on ``batch`` with the draws of ``step``."""
        drop = self.drop
        if drop is not None:
            drop.draws.begin(self.numbers[step], batch.images)
        inputs = []
        # Activations are numbered 0, 1, …, and inputs −1, −2, …
        for i, (q, f) in enumerate(zip(batch.quantized_inputs, batch.float_inputs, strict=True)):
            inputs.append(q if drop is None or q is f else drop.mix(-1 - i, q, f))
        return _loss(self.problem.module(*inputs), batch)

    def state(self) -> dict[str, Any]:
        """Return a copy of all that steps change."""
        return {
            "variables": [v.detach().clone() for v in self.learned.variables()],
            "optimizers": [copy.deepcopy(o.state_dict()) for o in self._optimizers],
        }

    @torch.no_grad()
    def go_back(self, state: dict[str, Any]) -> None:
        for variable, value in zip(self.learned.variables(), state["variables"], strict=True):
            variable.copy_(value)
        for optimizer, value in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)

    @property
    def _optimizers(self) -> list[torch.optim.Adam]:
        return self.rounding_optimizers + self.step_size_optimizers + self.weight_step_size_optimizers

    def _set_rates(self, step: int) -> None:
        """Rounding learns at a constant rate, step sizes at one with a cosine decay to 0."""
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for optimizers, rate, factor in (
            (self.rounding_optimizers, self.recipe.rounding_lr, 1.0),
            (self.step_size_optimizers, self.recipe.step_size_lr, decay),
            (self.weight_step_size_optimizers, self.recipe.weight_step_size_lr, decay),
        ):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = self.slowness * rate * factor

    @torch.no_grad()
    def _keep_positive(self) -> None:
        """A step size that learning would push through zero stops at a thousandth of where it started."""
        for scale, floor in zip(self.learned.step_sizes, self.floors, strict=True):
            torch.maximum(scale, floor, out=scale)


def _run(step: Step, seed: int, on_step: Callable[[], None]) -> Course:
    """Take all steps; when the loss is no longer finite, go back to where it was, and on at smaller rates."""
    problem, recipe, steps = step.problem, step.recipe, step.steps
    order = _batch_order(problem, steps, recipe.batch_size, seed)
    losses = torch.zeros(steps, device=problem.device)
    good, state, returns, number = 0, step.state(), 0, 0
    reported = 0
    while number < steps:
        following = order[number + 1] if number + 1 < steps else None
        losses[number].copy_(step.take(number, order[number], following))
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
            step.slowness *= SLOWER
            number = good
    return Course(_curve(losses), returns)


def _finite(tensors: list[Tensor]) -> bool:
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())


def _adam(variables: Sequence[Tensor], rate: float) -> list[torch.optim.Adam]:
    """An optimizer, or none where there is nothing to learn: a unit may have float weights, or step sizes only."""
    return [torch.optim.Adam(list(variables), lr=rate, fused=True)] if variables else []


def _batch_order(problem: Problem, steps: int, batch_size: int, seed: int) -> Tensor:
    """Indices [steps, batch_size], on the CPU, of each step's images, none twice in a step; neighbours ``together``.

    Each process has an order of its own.
    """
    together, generator = problem.together, torch.Generator().manual_seed(problem.processes.seed(seed))
    clips, size = problem.images // together, batch_size // together
    draws = torch.stack([torch.randperm(clips, generator=generator)[:size] for _ in range(steps)])
    return (draws.unsqueeze(-1) * together + torch.arange(together)).flatten(1)


def _beta(step: int, steps: int, recipe: ReconstructionRecipe) -> float:
    """β falls linearly from start to end over the steps behind the warm-up (AdaRound's code)."""
    start = recipe.warmup * steps
    progress = max(0.0, (step - start) / max(1.0, steps - start))
    return recipe.beta_start + (recipe.beta_end - recipe.beta_start) * progress


def _curve(losses: Tensor) -> list[list[float]]:
    values = losses.tolist()
    size = max(1, math.ceil(len(values) / CURVE_POINTS))
    return [
        [min(i + size, len(values)), sum(values[i : i + size]) / len(values[i : i + size])]
        for i in range(0, len(values), size)
    ]
